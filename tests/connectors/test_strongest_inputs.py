"""Supports by other weights: by hand, ties, refits that recover what is planted."""

import numpy as np
import pytest

from sparse_jax.connectors.linear_refit import refit_linear
from sparse_jax.connectors.moments import moments
from sparse_jax.connectors.strongest_inputs import strongest_inputs
from sparse_jax.errors import InputError
from tests.connectors.small_pairs import pair_of, sparse_inputs


def test_by_hand():
    W = np.array([[1.0, -3.0], [-2.0, 0.0], [4.0, 3.0], [0.0, 1.0]])
    norms = np.array([4.0, 1.0, 0.5, 1.0])  # parts: 4 12, 2 0, 2 1.5, 0 1
    maps = strongest_inputs(W, norms, np.array([[0, 1], [2, 2], [4, 4]]))
    np.testing.assert_array_equal(maps.weights[0].toarray(), [[0, -3], [0, 0], [0, 0], [0, 0]])
    # Inputs 1 and 2 have the same part in target 0: the first is taken.
    np.testing.assert_array_equal(maps.weights[1].toarray(), [[1, -3], [-2, 0], [0, 3], [0, 0]])
    np.testing.assert_array_equal(maps.weights[2].toarray(), W)
    np.testing.assert_array_equal(maps.nonzeros, [[0, 1], [2, 2], [3, 3]])


def test_least_squares_on_the_support_finds_planted_weights():
    rng = np.random.default_rng(0)
    x = sparse_inputs(rng, 4000, 12)
    W = np.where(rng.random((12, 6)) < 0.3, rng.normal(size=(12, 6)), 0)
    given = moments(pair_of(x, x @ W + 1), blocks=1, dtype=np.float64)
    # Signs and sizes of the choosing weights do not matter, only which are the largest.
    chosen = strongest_inputs(-0.1 * W, np.sqrt(np.mean(np.square(x), axis=0)), np.count_nonzero(W, axis=0)[None])
    np.testing.assert_allclose(refit_linear(chosen, given).weights[0].toarray(), W, atol=1e-4)


@pytest.mark.parametrize(("norms", "counts"), [(3, (1, 2)), (4, (1, 3)), (4, (2,))])
def test_shapes_that_do_not_fit(norms, counts):
    with pytest.raises(InputError, match="give \\[inputs, targets\\]"):
        strongest_inputs(np.ones((4, 2)), np.ones(norms), np.ones(counts, int))
