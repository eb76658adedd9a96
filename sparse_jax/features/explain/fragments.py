"""Rows of text cut into fragments of equal length, and how strongly each feature fires in each.

A fragment is `length` tokens of one row; fragments of a row follow each other and never overlap, what is left at the
end of a row belongs to none. A fragment of which less than half counts (padding, what an earlier row has had already)
is left out.

Memory: the codes of ROWS rows of all features at once, and on the host a float32 for each fragment and each feature
that is asked for.

Source: Bills et al. 2023, "Language models can explain neurons in language models" (fragments of 64 tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from sparse_jax.activations.blocks import activations
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site
from sparse_jax.numerics import safe_norm

# Rows of text that go through model and encoder at once.
ROWS = 8


@dataclass(frozen=True)
class Fragments:
    """Fragments of a text.

    Attributes:
        length: tokens in each.
        rows: the row of the text that each is in, ascending.
        starts: where in its row each begins.
        tokens: the ids.
        counts: True where a token counts: elsewhere a feature is taken for silent, and nothing is scored.
        documents: the first and the last document that each has tokens of.
    """

    length: int
    rows: Int64[np.ndarray, " n"]
    starts: Int32[np.ndarray, " n"]
    tokens: Int32[np.ndarray, "n length"]
    counts: np.ndarray
    documents: Int32[np.ndarray, "n 2"]

    def __len__(self) -> int:
        return len(self.rows)


def cut(text: Rows, numbers: np.ndarray, length: int = 64) -> Fragments:
    """The fragments of some rows, in the order of the text whatever the order of the numbers.

    Args:
        text: rows of tokens.
        numbers: `[rows]` which of them; none negative.
        length: tokens in a fragment.

    Raises:
        InputError: a row is shorter than a fragment.
    """
    if not 1 <= length <= text.context:
        raise InputError(
            f"fragments of {length} tokens do not fit rows of {text.context}: give --fragment {text.context} or less"
        )
    numbers, pieces = np.unique(np.asarray(numbers, np.int64)), text.context // length
    tokens, _, mask, document = (a[:, : pieces * length].reshape(-1, length) for a in text[numbers])
    rows = np.repeat(numbers, pieces)
    starts = np.tile(np.arange(pieces, dtype=np.int32) * length, len(numbers))
    first = np.where(document >= 0, document, np.iinfo(np.int32).max).min(axis=1)
    # What fills a short row up is no text, to be shown or paid for.
    keep = (2 * mask.sum(axis=1) >= length) & (document >= 0).all(axis=1)
    documents = np.stack([first, document.max(axis=1)], axis=1).astype(np.int32)
    return Fragments(length, rows[keep], starts[keep], tokens[keep], mask[keep], documents[keep])


def _codes(lm, coder, tokens, mask, max_norm, site):
    """Codes `[rows, position, n_features]`, 0 where a feature does not fire or the token does not count."""
    x = activations(lm, tokens, site)
    codes = coder.encode(x.reshape(-1, x.shape[-1])).reshape(*tokens.shape, -1)
    mask = mask & (safe_norm(x) <= max_norm)
    return jnp.where(mask[..., None], jnp.maximum(codes, 0), 0)


@partial(jax.jit, static_argnames=("site", "length"))
def _maxima(lm, coder, tokens, mask, max_norm, site, length):
    codes = _codes(lm, coder, tokens, mask, max_norm, site)
    pieces = tokens.shape[1] // length
    maxima = codes[:, : pieces * length].reshape(len(tokens), pieces, length, -1).max(axis=2)
    fired, sums = jnp.sum(codes > 0, axis=(0, 1), dtype=jnp.int32), jnp.sum(codes, axis=(0, 1))
    return maxima, fired, sums, jnp.sum(mask, dtype=jnp.int32)


@partial(jax.jit, static_argnames=("site",))
def _some_codes(lm, coder, tokens, mask, max_norm, features, site):
    return _codes(lm, coder, tokens, mask, max_norm, site)[..., features]


class Reading(NamedTuple):
    """What codes are made of: model, text and dictionary; and the largest norm of activations that count."""

    lm: LanguageModel
    site: Site
    text: Rows
    coder: Normalised
    max_norm: float = float("inf")

    @property
    def limit(self) -> jax.Array:
        """`max_norm`, for compiled functions."""
        return jnp.array(self.max_norm, jnp.float32)

    def batches(self, numbers: np.ndarray):
        """(numbers, tokens, mask) of ROWS rows at a time; the last batch is filled up with empty rows."""
        padded = np.concatenate([numbers, np.full(-len(numbers) % ROWS, -1, np.int64)])
        for part in padded.reshape(-1, ROWS):
            tokens, _, mask, _ = self.text[part]
            yield part[part >= 0], jnp.array(tokens), jnp.array(mask)


class Activity(NamedTuple):
    """How often features fire.

    fragments: `[n_features]` in how many fragments each is active.
    fired: `[n_features]` on how many tokens.
    sums: `[n_features]` of activations.
    tokens: how many tokens count.
    """

    fragments: Int64[np.ndarray, " n_features"]
    fired: Int64[np.ndarray, " n_features"]
    sums: Float64[np.ndarray, " n_features"]
    tokens: int

    @property
    def l0(self) -> float:
        """Features that fire on a token, on average."""
        return float(self.fired.sum()) / max(1, self.tokens)


def _fragment_maxima(reading: Reading, fragments: Fragments):
    """(which fragments, their maxima `[m, n_features]`, firings, sums, tokens) batch by batch."""
    numbers, first = np.unique(fragments.rows, return_index=True)
    of_row = dict(zip(numbers.tolist(), np.split(np.arange(len(fragments)), first[1:])))
    for part, tokens, mask in reading.batches(numbers):
        found = _maxima(reading.lm, reading.coder, tokens, mask, reading.limit, reading.site, fragments.length)
        of_rows, fired, sums, counted = map(np.asarray, found)
        which = [of_row[int(row)] for row in part]
        values = [of_rows[i, fragments.starts[these] // fragments.length] for i, these in enumerate(which)]
        yield np.concatenate(which), np.concatenate(values), fired, sums, int(counted)


def activity(reading: Reading, fragments: Fragments) -> Activity:
    """How often every feature of the dictionary fires."""
    n = reading.coder.dictionary.n_features
    active, fired, sums, tokens = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n), 0
    for _, values, firings, total, counted in _fragment_maxima(reading, fragments):
        active += (values > 0).sum(axis=0)
        fired += firings
        sums += total
        tokens += counted
    return Activity(active, fired, sums, tokens)


def maxima(reading: Reading, fragments: Fragments, features: Sequence[int]) -> Float32[np.ndarray, "n_fragments n"]:
    """The largest activation of some features in each fragment; 0 where a feature is silent."""
    found = np.zeros((len(fragments), len(features)), np.float32)
    for which, values, _, _, _ in _fragment_maxima(reading, fragments):
        found[which] = values[:, np.asarray(features, np.int64)]
    return found


def token_activations(
    reading: Reading, fragments: Fragments, wanted: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Float32[np.ndarray, " length"]]:
    """Activations at the tokens of some fragments.

    Args:
        reading, fragments: what is read.
        wanted: pairs (feature, fragment).

    Returns:
        Pair -> activations, 0 where the feature is silent or a token does not count.
    """
    features = sorted({feature for feature, _ in wanted})
    column = {feature: i for i, feature in enumerate(features)}
    pairs: dict[int, list[tuple[int, int]]] = {}
    for pair in wanted:
        pairs.setdefault(int(fragments.rows[pair[1]]), []).append(pair)
    found, index = {}, jnp.array(features, jnp.int32)
    for part, tokens, mask in reading.batches(np.array(sorted(pairs), np.int64)):
        codes = np.asarray(_some_codes(reading.lm, reading.coder, tokens, mask, reading.limit, index, reading.site))
        for i, row in enumerate(part):
            for feature, fragment in pairs[int(row)]:
                start = fragments.starts[fragment]
                found[feature, fragment] = codes[i, start : start + fragments.length, column[feature]].copy()
    return found
