"""All firings of all features on a text, batch after batch: model and encoder compiled, what fires read on the host."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.blocks import CHUNK_ROWS, activations, check_finite, first_not_finite
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site
from sparse_jax.numerics import safe_norm
from sparse_jax.numerics.sparse_codes import SparseCodes, top_k_codes

# Rows at once, and bytes of their codes, where the caller leaves it open.
BATCH_ROWS, BATCH_BYTES = 32, 128 << 20
# Slots for the firings of a token that are transferred from an accelerator.
SLOTS = 256


class Firings(NamedTuple):
    """The firings on some rows of text.

    rows: `[rows]` int64 numbers of the rows in the text; -1 is an empty row.
    tokens: `[rows, position]` int32 ids.
    counted: `[rows, position]` bool: the text's mask, and the norm is not too large.
    places: `[firings]` int64: row x context + position, ascending.
    features: `[firings]` int64.
    values: `[firings]` float32 codes, above 0.
    """

    rows: np.ndarray
    tokens: np.ndarray
    counted: np.ndarray
    places: np.ndarray
    features: np.ndarray
    values: np.ndarray


class _Codes(NamedTuple):
    dense: jax.Array  # [tokens, n_features], 0 where nothing fires
    sparse: SparseCodes | None
    most: jax.Array | None  # firings of the token with most
    counted: jax.Array
    first_bad: jax.Array
    finite: jax.Array


@partial(jax.jit, static_argnames=("site", "slots"))
def _codes(lm, tokens, mask, coder, max_norm, site, slots) -> _Codes:
    x = activations(lm, tokens, site)
    counted = mask & (safe_norm(x) <= max_norm)
    x = x.reshape(-1, x.shape[-1])
    codes = jnp.where(counted.reshape(-1, 1), jnp.maximum(coder.encode(x), 0), 0)
    sparse = most = None
    if slots is not None:
        sparse = top_k_codes(codes, slots)
        most = jnp.max(jnp.sum(codes > 0, axis=1, dtype=jnp.int32))
    # Of sums: testing every code took half as long as the encoder itself.
    finite = jnp.all(jnp.isfinite(jnp.sum(codes, axis=1)))
    return _Codes(codes, sparse, most, counted, first_not_finite(x), finite)


def rows_at_once(batch_rows: int | None, context: int, n_features: int) -> int:
    """`batch_rows`, or as many as have codes of a bounded size.

    Raises:
        InputError: the model cannot take so many.
    """
    if batch_rows is None:
        rows = BATCH_ROWS
        while rows > 1 and 4 * rows * context * n_features > BATCH_BYTES:
            rows //= 2
        return rows
    if batch_rows < 1 or (batch_rows > CHUNK_ROWS and batch_rows % CHUNK_ROWS):
        raise InputError(f"batch_rows {batch_rows}: give a multiple of {CHUNK_ROWS}, or 1 to {CHUNK_ROWS}")
    return batch_rows


def checked_rows(text: Rows, row_numbers: np.ndarray) -> np.ndarray:
    """The rows' numbers as int64.

    Raises:
        InputError: none, one twice, or one that the text does not have.
    """
    numbers = np.asarray(row_numbers)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise InputError(f"row numbers of shape {numbers.shape} and type {numbers.dtype}: give a list of at least one")
    if numbers.min() < 0 or numbers.max() >= text.n_rows:
        raise InputError(f"rows {numbers.min()} to {numbers.max()}: the text has 0 to {text.n_rows - 1}")
    if len(np.unique(numbers)) < len(numbers):
        raise InputError(f"{len(numbers)} rows, of which {len(np.unique(numbers))} differ: give each once")
    return numbers.astype(np.int64)


def firings(
    lm: LanguageModel,
    site: Site,
    text: Rows,
    row_numbers: np.ndarray,
    coder: Normalised,
    *,
    max_norm: float = float("inf"),
    batch_rows: int | None = None,
    slots: int | None = None,
) -> Iterator[Firings]:
    """The firings on rows of text, all batches of one shape; while one is used the next is computed.

    Args:
        lm, site, text, row_numbers: where activations come from.
        coder: gives codes of activations; a feature fires where its code is above 0.
        max_norm: tokens whose activation has a larger norm do not count.
        batch_rows: rows at once; None: 32, or fewer where their codes would have more than 128 MB.
        slots: firings of a token that are transferred; of a batch in which some token has more, all codes are. None:
            all codes on a CPU, where that costs nothing, else 256 firings.

    Raises:
        InputError: rows or `batch_rows` that cannot be, an activation or code that is not finite.
    """
    n = coder.dictionary.n_features
    batch_rows = rows_at_once(batch_rows, text.context, n)
    numbers = checked_rows(text, row_numbers)
    if slots is None and jax.default_backend() != "cpu":
        slots = SLOTS
    if slots is not None and slots < 1:
        raise InputError(f"slots {slots}: give at least 1")
    slots = None if slots is None else min(slots, n)
    padded = np.concatenate([numbers, np.full(-len(numbers) % batch_rows, -1, np.int64)]).reshape(-1, batch_rows)
    limit, before = jnp.array(max_norm, jnp.float32), None
    for batch in padded:
        tokens, _, mask, _ = text[batch]
        # jnp.array copies: device_put may alias a host buffer on CPU. Nothing waits for the result here.
        codes = _codes(lm, jnp.array(tokens), jnp.array(mask), coder, limit, site, slots)
        if before is not None:
            yield _read(*before, site)
        before = batch, tokens, codes
    yield _read(*before, site)


def _read(batch: np.ndarray, tokens: np.ndarray, codes: _Codes, site: Site) -> Firings:
    check_finite({str(site): int(codes.first_bad)}, batch, tokens)
    if not codes.finite:
        raise InputError(f"codes of activations at {site} are not finite: the dictionary's parameters cannot be used")
    counted = np.asarray(codes.counted)
    if codes.sparse is None or int(codes.most) > codes.sparse.values.shape[1]:
        dense = np.asarray(codes.dense)
        flat = np.flatnonzero(dense > 0)
        places = flat // dense.shape[1]
        return Firings(batch, tokens, counted, places, flat - places * dense.shape[1], dense.reshape(-1)[flat])
    values, indices = (np.asarray(each) for each in codes.sparse)
    places, slot = np.nonzero(values > 0)
    return Firings(batch, tokens, counted, places, indices[places, slot].astype(np.int64), values[places, slot])
