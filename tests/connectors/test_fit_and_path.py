"""The stochastic trainer against the exact path, on planted connections: the same problem, two ways of solving it."""

import numpy as np
import pytest

from sparse_jax.connectors.fit import FitOptions, Member, fit
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.linear_path import linear_path
from sparse_jax.connectors.moments import moments
from sparse_jax.connectors.scaling import Scales
from sparse_jax.connectors.standardised import standardised
from sparse_jax.connectors.synthetic import planted_connections

ALPHAS = (0.3, 0.1, 0.03)
# A hundred passes: what is compared is where both end, not how fast.
OPTIONS = FitOptions(tokens=1_000_000, batch=500, learning_rate=0.01)


@pytest.fixture(scope="module")
def both():
    pair = planted_connections(tokens=10_000, seed=3).pair
    problem = standardised(moments(pair, blocks=1, dtype=np.float64))
    assert problem.scales.min() > 0
    assert problem.norms.min() > 0
    scales = Scales(
        problem.norms.astype(np.float32), problem.scales.astype(np.float32), problem.target_mean.astype(np.float32)
    )
    fitted = fit(Linear(), pair, OPTIONS, [Member({"alpha": alpha}) for alpha in ALPHAS], scales=scales)
    return problem, linear_path(problem, ALPHAS, tolerance=1e-6, float64=True), fitted


def in_problem_units(problem, trained):
    """`[n2, n1]` v of a trained connector."""
    return (np.asarray(trained.weights(), np.float64) * problem.norms[:, None] / problem.scales).T


def objective(problem, v, alpha):
    """`[n2]` what is minimised, float64."""
    error = problem.square + np.einsum("ji,ji->j", v, v @ problem.A - 2 * problem.B)
    return error + alpha * np.abs(v).sum(axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("point", range(len(ALPHAS)))
def test_they_agree(both, point):
    problem, path, fitted = both
    alpha = ALPHAS[point]
    assert path.alphas[point] == alpha
    exact = (path.weights[point].toarray().astype(np.float64) * problem.norms[:, None] / problem.scales).T
    found = in_problem_units(problem, fitted.trained[point])
    best, reached = objective(problem, exact, alpha), objective(problem, found, alpha)
    np.testing.assert_allclose(best, path.objective[point], rtol=1e-5)
    # No target is solved better than exactly, and none worse than by a two thousandth.
    assert np.all(reached > best - 1e-6)
    assert np.all(reached < best * (1 + 5e-4))
    # One unit is a weight that explains its whole target.
    np.testing.assert_allclose(found, exact, atol=0.02)
    # True zeros in both: a weight that one has and the other has not is a small one.
    only_one = (found != 0) != (exact != 0)
    assert np.abs(found - exact)[only_one].max(initial=0) < 0.01
    np.testing.assert_allclose(np.asarray(fitted.trained[point].bias()), path.bias[point], atol=0.01)
