"""Activations around places: what a page shades, for every feature at once.

A feature's places lie in rows that are far apart, and rows are shared by many features' places. So each row that is
needed goes through the model and the encoder once, whatever is asked of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from sparse_jax.activations.blocks import activations
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site


@partial(jax.jit, static_argnames=("site", "length"))
def _windows(lm, coder, site, tokens, length, features, starts):
    """`[rows, places, length]`: for each place of a row, the codes of its feature from its start on, at least 0."""
    x = activations(lm, tokens, site)

    def of_row(inputs):  # one row at a time: the codes of all would not fit
        x, features, starts = inputs
        codes = jnp.maximum(coder.encode(x), 0)
        positions = jnp.clip(starts[:, None] + jnp.arange(length, dtype=jnp.int32), 0, len(x) - 1)
        return codes[positions, features[:, None]]

    return jax.lax.map(of_row, (x, features, starts))


def window_activations(
    lm: LanguageModel,
    site: Site,
    text: Rows,
    coder: Normalised,
    features: Int[np.ndarray, " places"],
    rows: Int[np.ndarray, " places"],
    positions: Int[np.ndarray, " places"],
    *,
    before: int = 14,
    after: int = 6,
    batch_rows: int = 8,
) -> Float32[np.ndarray, "places window"]:
    """Activations of features (codes, 0 where they are below) around places, `before` + 1 + `after` of each.

    Column `before` is the place itself; what lies outside the row is NaN. One row's dense codes, and `batch_rows` rows'
    windows, are in memory at a time; places in a row are filled up to a power of two, one compiled program for each.

    Args:
        lm, site: where activations come from.
        text: the rows that places count.
        coder: the dictionary.
        features, rows, positions: of each place, in any order.
        before, after: tokens on either side.
        batch_rows: rows at once, a multiple of 8 (or fewer than that).

    Raises:
        InputError: lengths that differ, numbers that are none of the features, rows or positions.
    """
    features, rows, positions = (np.asarray(each, np.int64) for each in (features, rows, positions))
    _check(features, rows, positions, coder.dictionary.n_features, len(text), text.context)
    length = before + 1 + after
    made = np.empty((len(rows), length), np.float32)
    order = np.argsort(rows, kind="stable")
    numbers, first, counts = np.unique(rows[order], return_index=True, return_counts=True)
    for start in range(0, len(numbers), batch_rows):
        part = slice(start, start + batch_rows)
        places = [order[i : i + n] for i, n in zip(first[part], counts[part])]
        slots = 1 << int(max(map(len, places)) - 1).bit_length()
        batch = np.full(batch_rows, -1, np.int64)
        batch[: len(places)] = numbers[part]
        asked = np.zeros((2, batch_rows, slots), np.int32)
        for row, some in enumerate(places):
            asked[:, row, : len(some)] = features[some], positions[some] - before
        tokens = jnp.array(text[batch][0])
        found = np.asarray(_windows(lm, coder, site, tokens, length, jnp.array(asked[0]), jnp.array(asked[1])))
        for row, some in enumerate(places):
            made[some] = found[row, : len(some)]
    reach = positions[:, None] + np.arange(-before, after + 1)
    return np.where((reach >= 0) & (reach < text.context), made, np.float32("nan"))


def _check(features, rows, positions, n_features: int, n_rows: int, context: int) -> None:
    if not features.shape == rows.shape == positions.shape or features.ndim != 1:
        raise InputError(
            f"features {features.shape}, rows {rows.shape}, positions {positions.shape}: give one of each for a place"
        )
    for name, given, limit in (
        ("features", features, n_features),
        ("rows", rows, n_rows),
        ("positions", positions, context),
    ):
        if len(given) and not 0 <= given.min() <= given.max() < limit:
            raise InputError(f"{name} {given.min()} to {given.max()}: there are 0 to {limit - 1}")
