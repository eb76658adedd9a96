"""Fronts and elbows: examples worked by hand, intervals by drawing tokens anew."""

import numpy as np
import pytest

from sparse_jax.connectors.block_errors import BlockErrors, block_errors
from sparse_jax.connectors.document_blocks import bootstrap_weights, document_blocks
from sparse_jax.connectors.fronts import chord_elbow, front, median_nonzeros, nonzeros_at_share
from sparse_jax.connectors.linear_path import linear_path
from sparse_jax.connectors.linear_refit import dense_linear, refit_linear
from sparse_jax.connectors.moments import moments
from sparse_jax.errors import InputError
from tests.connectors.random_pairs import linear_pair
from tests.connectors.test_block_errors import r2_by_numpy


def errors_of(r2, blocks=2):
    """Errors with this R^2 `[points, n2]`: targets that are 1 and -1 by turns, 10 of each in a block."""
    r2 = np.asarray(r2, np.float64)
    n2 = r2.shape[1]
    error = np.repeat((1 - r2)[:, None] * 20, blocks, axis=1)
    ones = np.ones((blocks, n2))
    return BlockErrors(error, 0 * ones, 20 * ones, (20 * ones).astype(np.int64), np.full(blocks, 20))


def test_nonzeros_at_share_by_hand():
    r2 = np.array([[0.50, 0.2, -1.0, 0.1], [0.72, 0.3, -1.0, 0.1], [0.79, 0.3, 0.0, 0.1]])
    nonzeros = np.array([[1, 2, 0, 5], [4, 9, 1, 6], [30, 40, 2, 7]])
    dense = np.array([0.8, 0.4, -0.5, 0.0])
    # 0.72 is 0.9 x 0.8; 0.36 is not reached; nothing explains the last two.
    found = nonzeros_at_share(r2, nonzeros, dense, 0.9 - 1e-12)
    np.testing.assert_array_equal(found, [4, np.inf, np.nan, np.nan])
    np.testing.assert_array_equal(nonzeros_at_share(r2, nonzeros, dense, 0.5), [1, 2, np.nan, np.nan])


def test_median_by_hand():
    path = errors_of([[0.5, 0.2, 0.7], [0.8, 0.2, 0.8]])
    nonzeros = np.array([[1, 3, 5], [8, 9, 12]])
    made = median_nonzeros(path, nonzeros, errors_of([[0.85, 0.3, 0.75]]), replicates=20)
    # 8, never, 5
    assert made.median == (8.0, 8.0, 8.0)
    assert (made.alive, made.explained, made.reached) == (3, 3, 2)
    assert made.dense_r2 == pytest.approx((0.85 + 0.3 + 0.75) / 3)
    never = median_nonzeros(path, nonzeros, errors_of([[0.99, 0.99, 0.99]]), replicates=5)
    assert never.median.value == np.inf
    nothing = median_nonzeros(path, nonzeros, errors_of([[-0.1, -0.1, 0]]), replicates=5)
    assert np.isnan(nothing.median.value)
    assert nothing.explained == 0


def test_front_by_hand():
    made = front(errors_of([[0.8, 0.6], [0.2, 0.4]]), np.array([[10, 20], [1, 3]]), np.array([[5.0, 7], [1, 2]]))
    assert made.order.tolist() == [1, 0], "the sparsest first"
    np.testing.assert_allclose(made.nonzeros, [2, 15])
    np.testing.assert_allclose(made.r2, [0.3, 0.7])
    np.testing.assert_allclose(made.l1, [1.5, 6])
    np.testing.assert_allclose(made.r2_low, made.r2)
    assert made.targets == 2
    one_block = front(errors_of([[0.5]], blocks=1), np.array([[1]]))
    assert np.isnan(one_block.r2_low).all()
    assert np.isnan(one_block.l1).all()


def test_intervals_are_those_of_documents_drawn_anew():
    pair, _ = linear_pair(noise=1.5, tokens=400, documents=12)
    train, held_out = pair.split(0.5)
    given = moments(train)
    path = linear_path(given, [0.4, 0.1, 0.02])
    maps, dense = refit_linear(path, given), dense_linear(given)
    errors, of_dense = block_errors(held_out, maps), block_errors(held_out, dense)
    blocks = len(errors.count)
    assert blocks == len(np.unique(held_out.tokens.document))
    block = document_blocks(held_out.tokens.document, 64)
    means, medians = [], []
    for weights in bootstrap_weights(blocks, 40, seed=5):
        rows = np.concatenate([np.flatnonzero(block == b) for b in range(blocks) for _ in range(int(weights[b]))])
        r2 = np.stack([r2_by_numpy(held_out, maps, point, rows) for point in range(3)])
        means.append(r2.mean(axis=1))
        best = r2_by_numpy(held_out, dense, 0, rows)
        medians.append(np.median(np.where(r2 >= 0.9 * best, maps.nonzeros, np.inf).min(axis=0)))
    made = front(errors, maps.nonzeros, path.l1, replicates=40, seed=5)
    for bound, share in ((made.r2_low, 0.025), (made.r2_high, 0.975)):
        due = np.quantile(np.stack(means), share, axis=0, method="nearest")
        np.testing.assert_allclose(bound, due[made.order], rtol=1e-4)
    assert np.all(made.r2_low < made.r2)
    assert np.all(made.r2 < made.r2_high)
    figure = median_nonzeros(errors, maps.nonzeros, of_dense, replicates=40, seed=5)
    assert figure.median.low == np.quantile(medians, 0.025, method="nearest")
    assert figure.median.high == np.quantile(medians, 0.975, method="nearest")
    assert 3 <= figure.median.value <= 6, "each target is made of three inputs"


def test_chord_elbow():
    # Above the chord from (log 1, 0) to (log 1000, 1): at 10 by 0.8 - 1/3, at 100 by 0.95 - 2/3.
    assert chord_elbow(np.array([1000, 10, 100, 1]), np.array([1, 0.8, 0.95, 0])) == 1
    assert chord_elbow(np.array([0, 1, 10, 100]), np.array([-5, 0.1, 0.2, 1])) == 1, "no point lies above the chord"
    with pytest.raises(InputError, match="three that differ"):
        chord_elbow(np.array([0, 1, 10]), np.array([0, 1, 2]))


def test_what_cannot_be():
    errors, nonzeros = errors_of([[0.5, 0.5]]), np.ones((1, 2), int)
    with pytest.raises(InputError, match="give one for each"):
        front(errors, np.ones((2, 2)))
    with pytest.raises(InputError, match="give one for each"):
        front(errors, nonzeros, np.ones((1, 3)))
    with pytest.raises(InputError, match="more tokens"):
        front(errors, nonzeros, min_firings=1000)
    with pytest.raises(InputError, match="share"):
        median_nonzeros(errors, nonzeros, errors, share=0)
    with pytest.raises(InputError, match="dense connectors"):
        median_nonzeros(errors, nonzeros, errors_of([[1, 1], [1, 1]]))
