"""The order of the rows: a seeded permutation for each epoch, and the rows at any place of all epochs in turn.

Of a text that is read as it goes, windows of rows follow each other in the text's order, each permuted by itself.
"""

import functools

import numpy as np
from jaxtyping import Int64

from sparse_jax.errors import InputError


def row_order(n_rows: int, seed: int, epoch: int) -> Int64[np.ndarray, " n_rows"]:
    """The order of the rows in one epoch: a permutation of 0 .. n_rows - 1 fixed by the three numbers.

    The same on every machine and with every NumPy: only the raw output of the generator is used, which NumPy promises
    to keep, not its shuffling, which it does not.

    Raises InputError for n_rows below 1 or a negative seed or epoch.
    """
    _check_order(n_rows, seed, epoch)
    return _order(int(n_rows), int(seed), int(epoch)).copy()


def _check_order(n_rows: int, seed: int, epoch: int) -> None:
    if n_rows < 1 or seed < 0 or epoch < 0:
        raise InputError(
            f"n_rows {n_rows}, seed {seed}, epoch {epoch}: n_rows must be at least 1, seed and epoch at least 0"
        )


# Consecutive batches ask for the same epoch.
@functools.lru_cache(maxsize=2)
def _order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch, n_rows])).random_raw(n_rows)
    return np.argsort(raw, kind="stable").astype(np.int64)


def row_indices(n_rows: int, seed: int, start: int, count: int) -> Int64[np.ndarray, " count"]:
    """The rows at places start .. start + count - 1 of all epochs' orders one after another, without end.

    So the data are a function of a place: a run that resumes at `start` sees what it would have seen.

    Raises InputError as `row_order`, and for a negative start or count.
    """
    if start < 0 or count < 0:
        raise InputError(f"start {start}, count {count}: both must be at least 0")
    _check_order(n_rows, seed, 0)
    first, last = start // n_rows, (start + count - 1) // n_rows
    orders = [_order(int(n_rows), int(seed), epoch) for epoch in range(first, last + 1)]
    skip = start - first * n_rows
    return np.concatenate([np.zeros(0, np.int64), *orders])[skip : skip + count]


def windowed_row_indices(
    n_rows: int, window_rows: int, seed: int, start: int, count: int
) -> Int64[np.ndarray, " count"]:
    """`row_indices` of a text that is permuted within windows of `window_rows` rows only; the last may be shorter.

    The places before the end of a window depend on nothing behind it: of a text whose end is not known yet, give any
    `n_rows` that is not smaller than the windows that `start` and `count` reach.

    Raises InputError as `row_indices`, and for window_rows below 1.
    """
    if start < 0 or count < 0 or window_rows < 1:
        raise InputError(f"start {start}, count {count}, window_rows {window_rows}: give at least 0, 0 and 1")
    _check_order(n_rows, seed, 0)
    found, place, end = [np.zeros(0, np.int64)], start, start + count
    while place < end:
        epoch, inside = divmod(place, n_rows)
        window, offset = divmod(inside, window_rows)
        size = min(window_rows, n_rows - window * window_rows)
        # One number for the window and the epoch: no two windows of a run are permuted alike.
        order = _order(int(size), int(seed), (epoch << 32) + window)
        taken = order[offset : offset + end - place]
        found.append(window * window_rows + taken)
        place += len(taken)
    return np.concatenate(found)
