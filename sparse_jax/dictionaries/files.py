"""A trained dictionary on disk: `dictionary.json` (static choices, where it came from) and `params.safetensors`."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.dictionaries.protocol import Dictionary, from_json, to_json
from sparse_jax.errors import InputError

_PARAMS, _CARD = "params.safetensors", "dictionary.json"
# Of the dictionaries in a run folder, how many an error names.
_NAMED = 8


def save(folder: str | Path, trained: Normalised, provenance: dict) -> None:
    """Write a trained dictionary, whole or not at all: the card comes last, and without a card there is none.

    Args:
        folder: made if it does not exist.
        trained: the dictionary.
        provenance: JSON-able facts: model, revision, site, text, tokens, seed, ...
    """
    arrays = {f"params.{name}": np.asarray(value) for name, value in trained.params.items()}
    arrays |= {"normaliser.centre": trained.normaliser.centre, "normaliser.scale": trained.normaliser.scale}
    card = {"format": 1, "dictionary": to_json(trained.dictionary), "provenance": provenance}
    write_with_card(Path(folder), arrays, card, _CARD)


def write_with_card(folder: Path, arrays: dict, card: dict, card_name: str) -> None:
    """Write `params.safetensors` and a JSON card beside it, whole or not at all: without a card there is nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors writes the buffer as it lies: a transposed view must be copied first.
    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in arrays.items()}
    text = json.dumps(card, indent=1) + "\n"
    save_file(arrays, folder / (_PARAMS + ".tmp"))
    (folder / (card_name + ".tmp")).write_text(text, encoding="utf8")
    # An old card must not stand beside new parameters, not even for a moment.
    (folder / card_name).unlink(missing_ok=True)
    os.replace(folder / (_PARAMS + ".tmp"), folder / _PARAMS)
    os.replace(folder / (card_name + ".tmp"), folder / card_name)


def read_card(folder: str | Path) -> dict:
    """`dictionary.json` of a saved dictionary, or of the only dictionary of a run folder.

    Raises:
        InputError: there is none, several, or it is damaged.
    """
    path = _saved_folder(folder) / _CARD
    try:
        card = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("dictionary"), dict):
        raise InputError(f"{path} is damaged: it describes no dictionary")
    return card


def load(folder: str | Path) -> Normalised:
    """A saved dictionary, from its own folder or from a run folder that holds just one.

    Raises:
        InputError: no dictionary, several, or damaged files.
    """
    folder = _saved_folder(folder)
    dictionary = from_json(read_card(folder)["dictionary"])
    try:
        arrays = {name: jnp.array(value) for name, value in load_file(folder / _PARAMS).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / _PARAMS} cannot be read: {error}") from error
    found = {name: value.shape for name, value in arrays.items()}
    if found != (due := _shapes(dictionary)):
        raise InputError(f"{folder / _PARAMS} does not fit {_CARD} beside it: it holds {found}, due are {due}")
    params = {name.removeprefix("params."): value for name, value in arrays.items() if name.startswith("params.")}
    return Normalised(dictionary, params, Normaliser(arrays["normaliser.centre"], arrays["normaliser.scale"]))


def _shapes(dictionary: Dictionary) -> dict[str, tuple[int, ...]]:
    """The arrays that belong to a saved dictionary, and their shapes."""
    params = jax.eval_shape(dictionary.init, jax.random.key(0))
    shapes = {f"params.{name}": value.shape for name, value in params.items()}
    return {**shapes, "normaliser.centre": (dictionary.d_in,), "normaliser.scale": ()}


def _saved_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if (folder / _CARD).is_file():
        return folder
    found = sorted(folder.glob(f"dictionaries/**/{_CARD}"))
    if len(found) == 1:
        return found[0].parent
    if not found:
        raise InputError(f"{folder} holds no dictionary ({_CARD}); give a run folder or one of its dictionaries/*")
    names = ", ".join(str(card.parent) for card in found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    raise InputError(f"{folder} holds {len(found)} dictionaries; give one of {names}")
