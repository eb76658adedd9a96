"""Codes of a batch of rows where they count: one compiled program that every search reads a text or prompts through.

A feature fires where its code is above 0 and the place counts: the text's mask is true, and the activation's norm is
not above `max_norm` (outliers). Codes stay on the device, for sums there; `chosen_firings` brings the firings of some
features to the host. `firings.firings` does so for all features.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64

from sparse_jax.activations.blocks import activations
from sparse_jax.dictionaries import Normalised
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import RowBatch, Rows
from sparse_jax.lm.sites import Site
from sparse_jax.numerics import safe_norm

# Rows that go through model and encoder at once: their codes are rows x context x n_features x 4 bytes.
BATCH_ROWS = 8


@partial(jax.jit, static_argnames=("site",))
def counted_codes(
    lm: LanguageModel,
    coder: Normalised,
    tokens: Int32[jax.Array, "rows position"],
    mask: Bool[jax.Array, "rows position"],
    max_norm: Float[jax.Array, ""],
    site: Site,
    features: Int32[jax.Array, " chosen"] | None = None,
) -> tuple[Float[jax.Array, "rows position features"], Bool[jax.Array, "rows position"]]:
    """(codes, 0 where a feature does not fire; which places count).

    Args:
        lm, site: where activations come from.
        coder: the dictionary.
        tokens, mask: a batch of rows, and where tokens may count.
        max_norm: places where the raw activation has a larger norm do not count.
        features: numbers of the features that are wanted; None: all.
    """
    x = activations(lm, tokens, site)
    counted = mask & (safe_norm(x) <= max_norm)
    codes = coder.encode(x.reshape(-1, x.shape[-1]))
    codes = codes if features is None else codes[:, features]
    codes = codes.reshape(*tokens.shape, -1)
    return jnp.where(counted[..., None], jnp.maximum(codes, 0), 0), counted


def row_batches(
    text: Rows, numbers: Int64[np.ndarray, " rows"], batch_rows: int = BATCH_ROWS
) -> Iterator[tuple[np.ndarray, RowBatch]]:
    """(numbers, rows) in batches of one shape; the last is filled up with empty rows, number -1."""
    padded = np.concatenate([numbers, np.full(-len(numbers) % batch_rows, -1, np.int64)])
    for start in range(0, len(padded), batch_rows):
        part = padded[start : start + batch_rows]
        yield part, text[part]


class ChosenFirings(NamedTuple):
    """The firings of some features in one batch, in the order of the text.

    Attributes:
        row, position: `[firings]` where in the batch.
        feature: `[firings]` which of those that were asked for, counted among them.
        value: `[firings]` codes, above 0.
        rows: the batch.
        counted: `[rows, position]` which places count.
    """

    row: Int64[np.ndarray, " firings"]
    position: Int64[np.ndarray, " firings"]
    feature: Int64[np.ndarray, " firings"]
    value: Float32[np.ndarray, " firings"]
    rows: RowBatch
    counted: Bool[np.ndarray, "rows position"]


def chosen_firings(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    text: Rows,
    numbers: Int64[np.ndarray, " rows"],
    features: np.ndarray,
    *,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> Iterator[ChosenFirings]:
    """The firings of some features on a text, a batch of rows at a time.

    Args:
        lm, site, coder: model, place, dictionary.
        text, numbers: which rows of which text.
        features: `[chosen]` their numbers; only their codes come to the host.
        max_norm: places with a larger activation do not count.
        batch_rows: rows at once, a multiple of 8 or fewer.
    """
    chosen, limit = jnp.array(features, jnp.int32), jnp.float32(max_norm)
    for _, rows in row_batches(text, numbers, batch_rows):
        codes, counted = counted_codes(lm, coder, jnp.array(rows.tokens), jnp.array(rows.mask), limit, site, chosen)
        codes = np.asarray(codes)
        row, position, feature = np.nonzero(codes > 0)
        yield ChosenFirings(row, position, feature, codes[row, position, feature], rows, np.asarray(counted))


@partial(jax.jit, static_argnames=("site",))
def _fired(lm, coder, tokens, mask, max_norm, site):
    codes, counted = counted_codes(lm, coder, tokens, mask, max_norm, site)
    return jnp.sum(codes > 0, axis=(0, 1), dtype=jnp.int32), jnp.sum(counted, dtype=jnp.int32)


def count_firings(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    text: Rows,
    numbers: Int64[np.ndarray, " rows"],
    *,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> tuple[Int64[np.ndarray, " features"], int]:
    """(at how many places each feature fires, how many places count)."""
    total, places = np.zeros(coder.dictionary.n_features, np.int64), 0
    for _, rows in row_batches(text, numbers, batch_rows):
        fired, counted = _fired(lm, coder, jnp.array(rows.tokens), jnp.array(rows.mask), jnp.float32(max_norm), site)
        total += np.asarray(fired)
        places += int(counted)
    return total, places
