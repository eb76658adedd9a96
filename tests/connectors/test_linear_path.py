"""The lasso path: its conditions from the tokens themselves, solutions known by hand, true zeros."""

import numpy as np
import pytest

from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.linear_path import default_alphas, linear_path
from sparse_jax.connectors.moments import moments
from sparse_jax.connectors.paired_codes import Pair, SiteCodes
from sparse_jax.connectors.standardised import standardised
from sparse_jax.errors import InputError
from tests.connectors.random_pairs import dense_sides, linear_pair, random_pair, tokens_of

ALPHAS = (0.5, 0.1, 0.02)


def exact_moments(pair):
    return moments(pair, blocks=4, dtype=np.float64, method="sparse")


def of_tokens(pair, W, b, alpha, with_bias=True):
    """(objective, largest violation over alpha) of each target, from residuals on all tokens."""
    x, y = dense_sides(pair)
    scale, norm = y.std(axis=0), np.sqrt((x**2).mean(axis=0))
    live = norm > 0
    residual = (y - x @ W - b) / scale
    v = W * norm[:, None] / scale
    value = (residual**2).mean(axis=0) + alpha * np.abs(v).sum(axis=0)
    slope = 2 * (x[:, live] / norm[live]).T @ residual / len(x)
    v = v[live]
    broken = np.where(v != 0, np.abs(slope - alpha * np.sign(v)), np.maximum(np.abs(slope) - alpha, 0)).max(axis=0)
    if with_bias:  # the bias has no penalty
        broken = np.maximum(broken, np.abs(2 * residual.mean(axis=0)))
    return value, broken / alpha


@pytest.mark.parametrize("with_bias", [True, False])
def test_conditions_hold_on_the_tokens(with_bias):
    pair, _ = linear_pair(noise=1.0)
    path = linear_path(exact_moments(pair), ALPHAS, with_bias=with_bias, tolerance=1e-9, float64=True)
    for point, alpha in enumerate(ALPHAS):
        W, b = path.weights[point].toarray().astype(np.float64), path.bias[point]
        assert np.any(b != 0) == with_bias
        value, broken = of_tokens(pair, W, b, alpha, with_bias)
        np.testing.assert_allclose(path.objective[point], value, rtol=1e-6)
        assert np.all(broken < 2e-5), "weights are kept in float32"
    assert np.all(path.violation <= 1.1e-9)
    assert np.all(path.nonzeros[0] < 19)
    assert np.all(np.diff(path.nonzeros.sum(axis=1)) > 0)


def test_float32_and_small_sets():
    pair, _ = linear_pair(noise=1.0)
    exact = linear_path(exact_moments(pair), ALPHAS, tolerance=1e-9, float64=True)
    # Sets of 4 slots are too small for the weakest penalty: those targets go to FISTA.
    for slots in ((32,), (2, 4)):
        path = linear_path(moments(pair), ALPHAS, tolerance=1e-3, slots=slots)
        assert np.all(path.violation < 3e-3)
        np.testing.assert_allclose(path.objective, exact.objective, rtol=2e-5)
        assert all(W.dtype == np.float32 for W in path.weights)


def test_one_input_by_hand():
    generator = np.random.default_rng(0)
    x, tokens = generator.exponential(size=400), 400
    y = 3 + 2 * x + generator.normal(size=400)
    zeros = np.zeros((400, 1), np.int32)
    sides = (SiteCodes(name, 1, values[:, None].astype(np.float32), zeros) for name, values in (("a", x), ("b", y)))
    pair = Pair(*sides, tokens_of(generator, tokens, 5))
    x, y = (side[:, 0] for side in dense_sides(pair))
    path = linear_path(exact_moments(pair), [0.3], tolerance=1e-9, float64=True)
    norm, scale = np.sqrt((x**2).mean()), y.std()
    covariance = np.cov(x, y, ddof=0)[0, 1] / (norm * scale)
    v = (covariance - 0.15) / (x.var() / norm**2)  # the minimum of x.var v^2 - 2 covariance v + 0.3 v
    assert covariance > 0.15
    np.testing.assert_allclose(path.weights[0].toarray()[0, 0], v * scale / norm, rtol=1e-6)
    np.testing.assert_allclose(path.l1[0, 0], v, rtol=1e-6)
    np.testing.assert_allclose(path.bias[0, 0], y.mean() - v * scale / norm * x.mean(), rtol=1e-6)


def test_the_support_is_found():
    pair, weights = linear_pair(noise=0.05, tokens=2000)
    path = linear_path(moments(pair), [0.05])
    assert np.array_equal(path.weights[0].toarray() != 0, weights != 0)
    assert path.weights[0].nnz == np.count_nonzero(weights), "zeros are true and are not stored"


def test_default_alphas_begin_where_weights_do():
    problem = standardised(exact_moments(linear_pair()[0]))
    alphas = default_alphas(problem, points=5, smallest=0.01)
    largest = 2 * np.abs(problem.B).max()
    np.testing.assert_allclose(alphas, largest * 0.01 ** (np.arange(1, 6) / 5))
    path = linear_path(problem, [1.0001 * largest, 0.98 * largest], float64=True)
    assert path.alphas.tolist() == [1.0001 * largest, 0.98 * largest]
    assert path.nonzeros[0].sum() == 0
    assert 1 <= path.nonzeros[1].sum() <= 3


def test_silent_codes_get_no_weights():
    pair = random_pair()  # the last input and the last target never fire
    path = linear_path(moments(pair), [1e-3])
    W = path.weights[0].toarray()
    assert not W[-1].any()
    assert not W[:, -1].any()
    assert path.bias[0, -1] == 0
    assert np.isfinite(path.objective).all()
    assert np.isfinite(path.violation).all()


def test_given_scales_and_norms():
    pair, _ = linear_pair()
    given, n = exact_moments(pair), pair.targets.n_features
    usual = linear_path(given, [0.1], float64=True, tolerance=1e-9)
    # Targets in units ten times as large, with a penalty ten times as large: the objective over 100.
    scales, norms = 10 * usual.problem.scales, usual.problem.norms
    other = linear_path(given, [0.01], scales=scales, norms=norms, float64=True, tolerance=1e-9)
    np.testing.assert_allclose(other.weights[0].toarray(), usual.weights[0].toarray(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(other.objective * 100, usual.objective, rtol=1e-8)
    none = linear_path(given, [0.01], scales=np.zeros(n))
    assert none.weights[0].nnz == 0


def test_as_a_connector():
    pair, _ = linear_pair()
    path = linear_path(moments(pair), [0.05])
    trained = path.trained(0, path.problem)
    assert isinstance(trained, Trained)
    x, _ = dense_sides(pair)
    due = x @ path.weights[0].toarray() + path.bias[0]
    np.testing.assert_allclose(trained.predict(pair.inputs.at(slice(0, 50))), due[:50], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(trained.weights(), path.weights[0].toarray())
    np.testing.assert_allclose(trained.bias(), path.bias[0], rtol=1e-6)
    np.testing.assert_allclose(trained.params["target_scale"], path.problem.scales, rtol=1e-6)


def test_what_cannot_be():
    given = moments(linear_pair()[0])
    for alphas in ([], [0.1, 0], [np.nan], [[0.1]]):
        with pytest.raises(InputError, match="above 0"):
            linear_path(given, alphas)
    with pytest.raises(InputError, match="scales of targets"):
        linear_path(given, [0.1], scales=np.ones(3))
    with pytest.raises(InputError, match="norms of inputs"):
        linear_path(given, [0.1], norms=-np.ones(20))
    with pytest.raises(InputError, match="share between"):
        default_alphas(standardised(given), smallest=2)
    with pytest.raises(InputError, match="no tokens"):
        linear_path(given.total(np.zeros(given.blocks)), [0.1])
