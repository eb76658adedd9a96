"""The problem itself: objective, duality gap, conditions, and the bound on eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding import duality_gap, kkt_violation, objective, spectral_bound
from sparse_jax.coding.lasso import check_problem, reachable
from sparse_jax.errors import InputError
from tests.coding import problems

pytestmark = pytest.mark.usefixtures("x64")


def test_by_hand():
    """Atoms (1, 0) and (0, 2), lambda 2: the first code of (3, 1) is 3 - 1, the second (2 - 1) / 4."""
    x, W = jnp.array([[3.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    solution, zero = jnp.array([[2.0, 0.25]]), jnp.zeros((1, 2))
    np.testing.assert_allclose(objective(x, W, 2.0, solution), 1 + 0.25 + 2 * 2.25)
    np.testing.assert_allclose(duality_gap(x, W, 2.0, solution), 0, atol=1e-15)
    np.testing.assert_allclose(kkt_violation(x, W, 2.0, solution), 0, atol=1e-15)
    # At 0 the worst condition is 2 * 3 <= 2, broken by 4; theta = x / 3 is the best multiple that is admissible.
    np.testing.assert_allclose(kkt_violation(x, W, 2.0, zero), 4 / 2)
    np.testing.assert_allclose(duality_gap(x, W, 2.0, zero), (10 - (2 * 10 / 3 - 10 / 9)) / 10)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", ["scalar", "row", "feature", "both"])
def test_gap_bounds_the_error_and_both_vanish_at_the_solution(signed, shape):
    x, W = problems.coherent()
    penalty = penalties(shape, len(x), len(W))
    solution = problems.by_coordinates(x, W, penalty, signed)
    least = problems.objective(x, W, penalty, solution)
    assert np.all(duality_gap(*map(jnp.array, (x, W, penalty, solution)), signed) < 1e-9)
    assert np.all(kkt_violation(*map(jnp.array, (x, W, penalty, solution)), signed) < 1e-9)
    generator = np.random.default_rng(1)
    for size in (1e-3, 0.1, 1.0):
        codes = solution + size * np.abs(generator.normal(size=solution.shape))
        value = problems.objective(x, W, penalty, codes)
        np.testing.assert_allclose(objective(*map(jnp.array, (x, W, penalty, codes))), value)
        gap = np.asarray(duality_gap(*map(jnp.array, (x, W, penalty, codes)), signed))
        assert np.all(gap >= (value - least) / value)
        assert np.all(gap <= 1)
        assert np.all(kkt_violation(*map(jnp.array, (x, W, penalty, codes)), signed) > 1e-4 * size)


def penalties(shape, rows, n):
    generator = np.random.default_rng(7)
    sizes = {"scalar": (), "row": (rows, 1), "feature": (n,), "both": (rows, n)}
    return generator.uniform(0.3, 1.5, size=sizes[shape])


def test_rows_of_zeros_and_no_penalty():
    _, W = problems.coherent()
    zero, none = jnp.zeros((2, W.shape[1])), jnp.zeros((2, len(W)))
    np.testing.assert_array_equal(duality_gap(zero, jnp.array(W), 1.0, none), 0)
    np.testing.assert_array_equal(kkt_violation(zero, jnp.array(W), 0.0, none), 0)
    # Without a penalty: least squares; what is left is orthogonal to the atoms where it is solved.
    x, W = jnp.array([[3.0, 1.0]]), jnp.array([[2.0, 0.0]])
    np.testing.assert_allclose(kkt_violation(x, W, 0.0, jnp.array([[1.5]])), 0, atol=1e-15)
    np.testing.assert_allclose(kkt_violation(x, W, 0.0, jnp.array([[0.0]])), 1)


@pytest.mark.parametrize(("n", "d"), [(40, 10), (10, 40), (1, 3), (300, 200)])
def test_spectral_bound(n, d):
    generator = np.random.default_rng(n)
    for W in (generator.normal(size=(n, d)), generator.normal(size=(n, d)) + 2, 1e4 * np.ones((n, d))):
        exact = np.linalg.norm(W, 2) ** 2
        for dtype, margin in ((jnp.float64, 1e-12), (jnp.float32, 1e-4)):
            bound = float(spectral_bound(jnp.array(W, dtype)))
            assert exact * (1 - 1e-6) <= bound <= exact * (min(n, d) ** (1 / 256) + margin)
    assert np.isfinite(spectral_bound(jnp.zeros((n, d))))


def test_what_does_not_fit():
    x, W = jnp.zeros((3, 4)), jnp.zeros((5, 4))
    with pytest.raises(InputError, match=r"x of shape \(3, 4\) and W of shape \(4, 5\)"):
        check_problem(x, W.T, 1.0)
    for shape in ((3,), (3, 4), (5, 1), (1, 3, 5)):
        with pytest.raises(InputError, match="penalty of shape"):
            check_problem(x, W, jnp.ones(shape))
    for shape in ((), (1,), (5,), (3, 1), (1, 5), (3, 5)):
        assert check_problem(x, W, jnp.ones(shape)).shape == shape
    with pytest.raises(InputError, match="measure 'error': give one of gap, kkt"):
        reachable(1e-4, jnp.float32, "error")


def test_no_tolerance_below_rounding():
    assert reachable(1e-4, jnp.float32, "gap") == np.float32(1e-4)
    assert reachable(0.0, jnp.float32, "gap") == 8 * np.finfo(np.float32).eps
    assert reachable(0.0, jnp.float64, "kkt") == 128 * np.finfo(np.float64).eps
    assert jax.dtypes.result_type(reachable(0.0, jnp.float64, "kkt")) == jnp.float64
