"""The path against scikit-learn's Lasso on the tokens, with the conversion that linear_path.py states."""

import numpy as np
import pytest

from sparse_jax.connectors.linear_path import linear_path
from sparse_jax.connectors.moments import moments
from tests.connectors.random_pairs import dense_sides, linear_pair

pytestmark = pytest.mark.torch  # with the other peers


@pytest.mark.parametrize("with_bias", [True, False])
def test_same_weights(with_bias):
    linear_model = pytest.importorskip("sklearn.linear_model")
    pair, _ = linear_pair()
    x, y = dense_sides(pair)
    norm, scale = np.sqrt((x**2).mean(axis=0)), y.std(axis=0)
    norm[norm == 0] = 1
    given = moments(pair, dtype=np.float64, method="sparse")
    path = linear_path(given, [0.2, 0.02], tolerance=1e-9, float64=True, with_bias=with_bias)
    for point, alpha in enumerate((0.2, 0.02)):
        model = linear_model.Lasso(alpha / 2, fit_intercept=with_bias, tol=1e-12, max_iter=100_000)
        due = np.stack([model.fit(x / norm, column).coef_ for column in (y / scale).T], axis=1) / norm[:, None] * scale
        ours = path.weights[point].toarray()
        np.testing.assert_allclose(ours, due, rtol=1e-4, atol=1e-5)
        assert np.array_equal(ours != 0, due != 0)
