"""The order of the rows, against known answers and properties."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.lm.order import row_indices, row_order


def test_row_order_by_known_answers():
    # Fixed for ever, on every machine.
    assert row_order(8, seed=0, epoch=0).tolist() == [1, 7, 0, 4, 3, 6, 5, 2]
    assert row_order(8, seed=0, epoch=1).tolist() == [0, 5, 6, 1, 2, 3, 4, 7]
    assert row_order(8, seed=3, epoch=0).tolist() == [1, 2, 5, 4, 7, 3, 6, 0]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 5))
def test_each_epoch_is_a_permutation(n_rows, seed, epoch):
    order = row_order(n_rows, seed, epoch)
    assert sorted(order.tolist()) == list(range(n_rows))
    assert np.array_equal(order, row_order(n_rows, seed, epoch))
    assert order.dtype == np.int64


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(1, 20), st.integers(0, 3), st.integers(0, 70), st.integers(0, 70))
def test_rows_at_a_place_do_not_depend_on_where_reading_began(n_rows, seed, start, count):
    epochs = np.concatenate([row_order(n_rows, seed, epoch) for epoch in range(141 // n_rows + 1)])
    found = row_indices(n_rows, seed, start, count)
    assert np.array_equal(found, epochs[start : start + count])
    assert found.dtype == np.int64


def test_orders_differ_and_cannot_be_spoilt():
    assert not np.array_equal(row_order(100, 0, 0), row_order(100, 0, 1))
    assert not np.array_equal(row_order(100, 0, 0), row_order(100, 1, 0))
    before = row_order(100, 0, 0).copy()
    row_order(100, 0, 0)[:] = 0
    row_indices(100, 0, 0, 50)[:] = 0
    assert np.array_equal(row_order(100, 0, 0), before)
    assert np.array_equal(row_indices(100, 0, 0, 100), before)


def test_bad_places_are_refused():
    for numbers in ((0, 0, 0), (5, -1, 0), (5, 0, -1)):
        with pytest.raises(InputError):
            row_order(*numbers)
    for numbers in ((0, 0, 0, 1), (5, -1, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)):
        with pytest.raises(InputError):
            row_indices(*numbers)
