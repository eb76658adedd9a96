"""`--store`: activations that were harvested before, in place of a model and a text."""

import dataclasses
from typing import Any

from experiments.text import text_fingerprint
from experiments.text_flags import TextFlags
from sparse_jax.activations import ActivationStore, open_store
from sparse_jax.errors import InputError
from sparse_jax.lm.tokenizer import Tokenizer

# The flags that a store decides. The compute dtype is not among them: training may use another than the harvest did.
DECIDED = tuple(name for name in TextFlags.__dataclass_fields__ if name != "compute_dtype")


def with_store(flags: Any) -> tuple[Any, ActivationStore | None]:
    """The flags with what the store decides filled in, and the store; as they are where there is none.

    `flags` may lack some of the flags of `TextFlags`.

    Raises:
        InputError: no such store, it is unfinished or damaged, it holds the wrong documents, or a flag was given that
            says something else.
    """
    if flags.store is None:
        return flags, None
    store = open_store(flags.store, unfinished=flags.unfinished_store)
    identity = store.manifest.identity
    if identity.get("side") != "train":
        raise InputError(
            f"the store in {flags.store} holds {identity.get('side')} documents, which no dictionary may be trained "
            "on; harvest with --side train"
        )
    decided = {}
    for name in DECIDED:
        field = type(flags).__dataclass_fields__.get(name)
        if field is None or name not in identity:
            continue
        given, due = getattr(flags, name), identity[name]
        if given not in (due, field.default):
            raise InputError(
                f"--{name.replace('_', '-')} {given}: the store in {flags.store} was made with {due}; leave that out"
            )
        decided[name] = due
    return dataclasses.replace(flags, **decided), store


def check_identity(store: ActivationStore, flags: Any, weights_sha256: str, tokenizer: Tokenizer) -> None:
    """Raises InputError unless the model, tokenizer and text at hand are those that the store was made of."""
    due = {
        "weights_sha256": weights_sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "text_fingerprint": text_fingerprint(flags),
    }
    for name, value in due.items():
        found = store.manifest.identity.get(name)
        if found != value:
            what = {"weights_sha256": "model", "tokenizer_sha256": "tokenizer", "text_fingerprint": "text"}[name]
            raise InputError(
                f"the store in {store.folder} was made with another {what} ({name} {str(found)[:12]}..., now "
                f"{value[:12]}...): harvest again, or put back the {what} that it was made with"
            )
