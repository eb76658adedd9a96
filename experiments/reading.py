"""A trained dictionary, and the model and the text that it is read on: the part that experiments on features share.

    subject = open_subject(Path("runs/demo"), eval_tokens=212_992)
    subject.coder.encode(x)              codes of raw activations, in float32
    subject.data.evaluation              rows of held-out text, `subject.numbers` those that are read

The dictionary is the folder of a run, of one dictionary in it, or SAELens'. Model, site and text are those it was
trained on, by its own card, unless they are given.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.data import Data, blocks_at, load_data, resolve_bos
from experiments.measuring import eval_rows, in_float32
from experiments.text_flags import TextFlags
from sparse_jax.activations import Statistics, collect_statistics
from sparse_jax.dictionaries import Normalised, load, read_card
from sparse_jax.errors import InputError
from sparse_jax.formats import load_saelens
from sparse_jax.lm.model import check_site
from sparse_jax.training import fit_floors

# What a dictionary's card decides of the text flags.
TEXT = tuple(name for name in TextFlags.__dataclass_fields__ if name not in ("compute_dtype", "window_rows"))
# Rows of training text come in blocks of so many.
BLOCK_ROWS = 32
# Bases that a dictionary is read beside.
CONTROLS = ("neurons", "pca", "random")
# Training tokens from which they are fitted where the run kept no statistics, and from which the random gain is.
STATISTICS_TOKENS, GAIN_TOKENS = 131_072, 16_384


@dataclass(frozen=True)
class DataFlags(TextFlags):
    """What `load_data` asks of an experiment's flags."""

    eval_tokens: int = 0
    tokens: int = 0
    block_rows: int = BLOCK_ROWS


@dataclass(frozen=True)
class Subject:
    """What is read, and on what.

    Attributes:
        path: where the dictionary was read from.
        coder: the dictionary with its normaliser, in float32.
        data: model (float32), tokenizer, site, rows of text.
        numbers: `[rows]` int64, which rows of `data.evaluation` are read.
        provenance: what the dictionary's card says of its training.
    """

    path: Path
    coder: Normalised
    data: Data
    numbers: np.ndarray
    provenance: dict


def read_dictionary(path: Path) -> tuple[Normalised, dict]:
    """(the dictionary in float32, where it came from): ours, or SAELens'.

    Raises:
        InputError: neither is there.
    """
    if (path / "cfg.json").is_file():
        trained, provenance = load_saelens(path)
        return in_float32(trained), provenance
    return in_float32(load(path)), read_card(path).get("provenance") or {}


def open_data(
    path: Path, provenance: dict, given: dict, *, eval_tokens: int, tokens: int, like: Subject | None = None
) -> Data:
    """Model, site and rows: as the dictionary was trained, unless said otherwise. Float32.

    Args:
        path: of the dictionary, for messages.
        provenance: what its card says.
        given: names of `TextFlags` (and "site") -> what to take instead; None: what the card says.
        eval_tokens: held-out tokens, at most.
        tokens: training tokens that will be asked for.
        like: whose model and text are shared where they are the same.

    Raises:
        InputError: neither the dictionary nor a flag says which model and site; what they say cannot be used.
    """
    given = {name: value for name, value in given.items() if value is not None}
    site = given.pop("site", None) or provenance.get("site")
    if site is None:
        raise InputError(f"the dictionary in {path} does not say which site it was trained on: give --site")
    decided = {name: provenance[name] for name in TEXT if provenance.get(name) is not None} | given
    if "text" in given and "eval_text" not in given:  # a text of its own is read, not what training measured on
        decided.pop("eval_text", None)
    if "model" not in decided:
        raise InputError(f"the dictionary in {path} does not say of which model it is: give --model")
    flags = resolve_bos(DataFlags(**decided, compute_dtype="float32", eval_tokens=eval_tokens, tokens=tokens))
    if like is not None and like.data.flags == flags:
        return dataclasses.replace(like.data, site=check_site(like.data.lm.config, site))
    (data,) = load_data(flags, site)
    return data.in_float32()


def check_width(coder: Normalised, data: Data, path: Path) -> None:
    """Raises InputError where the dictionary does not read as many numbers as the site has."""
    if coder.dictionary.d_in != data.width:
        raise InputError(
            f"the dictionary in {path} reads {coder.dictionary.d_in} numbers, site {data.site} of {data.flags.model} "
            f"has {data.width}: give its own --model"
        )


def open_subject(
    path: Path,
    given: dict | None = None,
    *,
    eval_tokens: int,
    tokens: int = STATISTICS_TOKENS,
    like: Subject | None = None,
) -> Subject:
    """The dictionary in a folder with its model and its held-out text.

    Args:
        path: a run's folder, or one dictionary's (ours or SAELens').
        given: what to take instead of what its card says, see `open_data`.
        eval_tokens: held-out tokens to read, at most.
        tokens: training tokens that will be asked for.
        like: another subject, whose model and text are shared where this one's are the same.

    Raises:
        InputError: there is none, or its model or text cannot be used.
    """
    coder, provenance = read_dictionary(path)
    data = open_data(path, provenance, given or {}, eval_tokens=eval_tokens, tokens=tokens, like=like)
    check_width(coder, data, path)
    return Subject(path, coder, data, eval_rows(data, eval_tokens), provenance)


def max_norm_of(given: float | None, subject: Subject) -> float:
    """The largest norm that counts: as given, else as in the dictionary's training."""
    return given or subject.provenance.get("max_norm") or float("inf")


def check_features(coder: Normalised, features: tuple[int, ...]) -> None:
    """Raises InputError for numbers that are none of its features."""
    n = coder.dictionary.n_features
    if wrong := [feature for feature in features if not 0 <= feature < n]:
        raise InputError(f"features {', '.join(map(str, wrong))}: the dictionary has 0 to {n - 1}")


def read_where_trained(subject: Subject) -> bool:
    """Whether site, model and text are those of the dictionary's card."""
    card, flags = subject.provenance, subject.data.flags
    now = (str(subject.data.site), flags.model, flags.text)
    return (card.get("site"), card.get("model"), card.get("text")) == now


def controls(subject: Subject, k: int, seed: int = 0) -> dict[str, Normalised]:
    """Neurons, PCA and a random dictionary of as many features, each token keeping its k largest coefficients.

    By name, as in CONTROLS. Fitted from the run's statistics where it kept them (and is read where it was trained),
    else from training text. Their codes have both signs; features are read where they are positive.
    """
    data, path = subject.data, subject.path / "statistics.npz"
    blocks = blocks_at(data, seed)
    if path.is_file() and read_where_trained(subject):
        statistics = Statistics.load(path)
    else:
        statistics = collect_statistics(blocks, max(1, STATISTICS_TOKENS // blocks.tokens_per_block))
    x = []
    for number in range(-(-GAIN_TOKENS // blocks.tokens_per_block)):
        block = blocks[number]
        x.append(np.asarray(block.x)[np.asarray(block.weight) > 0])
    fitted = fit_floors(statistics, jnp.array(np.concatenate(x)), k, subject.coder.dictionary.n_features, seed)
    return {name: fitted[name].params for name in CONTROLS}


def given_of(flags: object, *names: str) -> dict:
    """Those flags by name, for `open_subject`."""
    return {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags) if field.name in names}
