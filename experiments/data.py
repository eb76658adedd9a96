"""The model and the text of an experiment: loaded, checked and packed from the common flags."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from experiments.stored import check_identity
from experiments.text import check_text, held_out_rows, sides, text_fingerprint, training_rows
from sparse_jax.activations import ActivationStore, Blocks, BlocksAt, SiteBlocks, StoredBlocks
from sparse_jax.activations.blocks import CHUNK_ROWS
from sparse_jax.activations.spread import Spread
from sparse_jax.errors import InputError
from sparse_jax.lm.joining import row_bos
from sparse_jax.lm.load import load, logical_axes, read_config_json, resolve
from sparse_jax.lm.model import LanguageModel, check_site, site_width
from sparse_jax.lm.row_stream import RowStream
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sharding import rules_over
from sparse_jax.lm.sites import Site
from sparse_jax.lm.tokenizer import Tokenizer, load_tokenizer
from sparse_jax.lm.weights import weight_files
from sparse_jax.numerics.axes import FEATURES
from sparse_jax.numerics.whole import to_local
from sparse_jax.training.mesh import batch_sharding

# A token is an outlier when its activation's norm exceeds this many times the median (DESIGN of the masks).
OUTLIER_RATIO = 10.0


@dataclass(frozen=True)
class Data:
    """What an experiment works on.

    Attributes:
        lm: the language model, in the experiment's compute dtype.
        tokenizer: its tokenizer.
        site: the checked site.
        train, evaluation: packed rows; no document is in both. With a store, its rows are those to train on.
        flags: the experiment's flags.
        outlier_ratio: a token whose norm exceeds this many times the median is an outlier.
        spread: how training blocks lie over the mesh that the model's weights lie over; None: on one device.
    """

    lm: LanguageModel
    tokenizer: Tokenizer
    site: Site
    train: Rows | RowStream | ActivationStore
    evaluation: Rows
    flags: Any
    outlier_ratio: float = OUTLIER_RATIO
    spread: Spread | None = None

    @property
    def width(self) -> int:
        """Numbers per token at the site."""
        return site_width(self.lm.config, self.site)

    def on_one_device(self) -> "Data":
        """The same with the model on this process's default device; all processes call it at the same place."""
        if self.spread is None:
            return self
        return dataclasses.replace(self, lm=to_local(self.lm), spread=None)

    def in_float32(self) -> "Data":
        """The same with a model that computes in float32: final figures do not depend on the training dtype."""
        return dataclasses.replace(self, lm=dataclasses.replace(self.lm, dtype="float32"))

    def identity(self) -> dict:
        """What decides the activations, for `config.json` and a dictionary's card."""
        flags = self.flags
        return {
            "model": flags.model,
            "revision": flags.revision,
            "weights_sha256": weights_sha256(flags.model, flags.revision),
            "tokenizer_sha256": self.tokenizer.sha256,
            "site": str(self.site),
            "width": self.width,
            "text": flags.text,
            "text_fingerprint": text_fingerprint(flags),
            "text_field": flags.text_field,
            "eval_text": flags.eval_text,
            "holdout": flags.holdout,
            "context": flags.context,
            "stride": flags.stride,
            "packing": flags.packing,
            "bos": flags.bos,
            "skip_positions": flags.skip_positions,
            "train_tokens_available": self.train.n_tokens,
            "eval_tokens_available": self.evaluation.n_tokens,
        }


def site_blocks(sites: Sequence[Data], seed: int, max_norms: dict[str, float]) -> SiteBlocks | StoredBlocks:
    """Training activations of several sites: from the store where there is one, else from the model.

    Args:
        sites: of one model and text.
        seed: decides their order.
        max_norms: site -> norm above which tokens do not count there.
    """
    data = sites[0]
    names, rows = tuple(each.site for each in sites), data.flags.block_rows
    if isinstance(data.train, ActivationStore):
        return StoredBlocks(data.train, names, seed, rows, max_norms, spread=data.spread)
    return SiteBlocks(data.lm, data.train, names, seed, rows, max_norms, spread=data.spread)


def blocks_at(data: Data, seed: int, max_norm: float = float("inf")) -> Blocks | BlocksAt:
    """Training activations of one site, as `site_blocks`."""
    if isinstance(data.train, ActivationStore):
        return BlocksAt(site_blocks([data], seed, {str(data.site): max_norm}), data.site)
    return Blocks(data.lm, data.train, data.site, seed, data.flags.block_rows, max_norm, spread=data.spread)


def passes(tokens: int, rows: Rows | RowStream | ActivationStore) -> float | None:
    """How often so many tokens go through the text; None where its end has not been reached."""
    return None if rows.n_tokens is None else tokens / rows.n_tokens


def statistics_tokens(flags: Any, rows: Rows | RowStream | ActivationStore) -> int:
    """Tokens that the normaliser and the floors are fitted from."""
    wanted = min(flags.statistics_tokens, flags.tokens)
    return wanted if rows.n_tokens is None else min(wanted, rows.n_tokens)


def summary(sites: list[Data]) -> str:
    """What is about to be done with one model and text at one or several sites, in a few lines."""
    data = sites[0]
    flags, train, held, config = data.flags, data.train, data.evaluation, data.lm.config
    epochs = passes(flags.tokens, train)
    if epochs is None:
        there = "read as it goes"
        seen = f"{flags.tokens:,} tokens will be seen"
    else:
        there = f"{train.n_tokens:,} tokens of {len(train.documents)} documents to train on"
        share = f"{epochs:.2f} of the text" if epochs <= 1 else f"{epochs:.2f} epochs: more than the text holds"
        seen = f"{flags.tokens:,} will be seen ({share})"
    store = f"activations from {train.folder}: {stored(train)}\n" if isinstance(train, ActivationStore) else ""
    return (
        f"model {flags.model}: {config.n_layers} layers, d_model {config.d_model}; "
        f"{', '.join(f'site {each.site} of width {each.width}' for each in sites)}\n{store}"
        f"text {flags.text}: {there}; {seen}\n"
        f"held out: {held.n_tokens:,} tokens of {len(held.documents)} documents, "
        f"{min(flags.eval_tokens, held.n_tokens):,} of them for evaluation"
    )


def stored(store: ActivationStore) -> str:
    """What a store holds, in a few words."""
    return ", ".join(f"{entry.name} in {entry.dtype}" for entry in store.manifest.entries)


def check_numbers(flags: Any) -> None:
    """Raises InputError for numbers that no run can use, before anything is loaded."""
    check_text(flags)
    check_positive(flags, "tokens", "eval_tokens", "batch", "block_rows", "statistics_tokens", "dead_window",
                   "log_every", "checkpoint_every")  # fmt: skip
    if flags.seed < 0:
        raise InputError(f"--seed {flags.seed}: a seed cannot be negative")
    if flags.tokens < flags.batch:
        raise InputError(f"--tokens {flags.tokens} is below one batch of {flags.batch}: give more tokens")
    if flags.block_rows % CHUNK_ROWS:
        raise InputError(f"--block-rows {flags.block_rows}: give a multiple of {CHUNK_ROWS}")
    if flags.block_rows * flags.context % flags.batch:
        raise InputError(
            f"--batch {flags.batch} does not divide a block of {flags.block_rows} rows x {flags.context} tokens "
            f"({flags.block_rows * flags.context}); change --batch or --block-rows"
        )


def check_positive(flags: Any, *names: str) -> None:
    """Raises InputError unless each of these flags, a number or several, is above zero."""
    for name in names:
        value = getattr(flags, name)
        if not all(number > 0 for number in (value if isinstance(value, tuple) else (value,))):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"--{name.replace('_', '-')} {shown}: give a positive number")


def resolve_bos(flags: Any) -> Any:
    """The flags with `bos` as "none" or "row": "auto" is the rule of the model's family.

    Raises:
        InputError: the model's folder cannot be had; its family has no rule; its tokenizer does not fit the rule.
    """
    if flags.bos != "auto":
        return flags
    folder = resolve(flags.model, flags.revision)
    tokenizer = load_tokenizer(folder)
    model_type = read_config_json(folder).get("model_type")
    return dataclasses.replace(flags, bos=row_bos(model_type, bos_id=tokenizer.bos_id, adds_bos=tokenizer.adds_bos))


def check_fits(lm: LanguageModel, tokenizer: Tokenizer, flags: Any) -> None:
    """Raises InputError for a context that the model is too short for, or a tokenizer that is not its own."""
    if flags.context > lm.config.max_positions:
        raise InputError(f"--context {flags.context}: {flags.model} has at most {lm.config.max_positions} positions")
    if tokenizer.vocab_size > lm.config.vocab_size:
        raise InputError(
            f"the tokenizer of {flags.model} has {tokenizer.vocab_size} ids, the model {lm.config.vocab_size}: "
            "they do not belong together"
        )


def load_data(flags: Any, *sites: str, store: ActivationStore | None = None, mesh: Mesh | None = None) -> list[Data]:
    """Load the model, check the sites, read and pack the text: one Data for each site, of the same model and text.

    With a store, its rows are those to train on, and only the held-out text is read. On a mesh the model's weights lie
    over its axis "features", as far as that divides them, and blocks over "data".

    Raises:
        InputError: whatever of these cannot be used, cheap checks first.
    """
    tokenizer = load_tokenizer(resolve(flags.model, flags.revision))
    rules = None if mesh is None else rules_over(mesh, FEATURES, logical_axes(flags.model, flags.revision))
    lm = load(flags.model, flags.revision, dtype=flags.compute_dtype, mesh=mesh, rules=rules)
    spread = None if mesh is None else Spread(batch_sharding(mesh), flags.batch)
    checked = [check_site(lm.config, site) for site in sites]
    for site in checked:
        site_width(lm.config, site)
        if store is not None:
            store.entry(str(site))
    check_fits(lm, tokenizer, flags)
    if store is not None:
        check_identity(store, flags, weights_sha256(flags.model, flags.revision), tokenizer)
    to_train, to_evaluate = sides(flags, tokenizer)
    train = training_rows(flags, to_train, tokenizer) if store is None else store
    evaluation = held_out_rows(flags, to_evaluate, tokenizer, flags.eval_tokens)
    return [Data(lm, tokenizer, site, train, evaluation, flags, spread=spread) for site in checked]


def weights_sha256(model: str, revision: str | None) -> str:
    """SHA-256 over the bytes of the model's weight files, in order."""
    digest = hashlib.sha256()
    for path in weight_files(resolve(model, revision)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
