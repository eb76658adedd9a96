"""The fast solver against plain coordinate descent and FISTA: small and growing sets, what fits none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding import duality_gap, fista_until, kkt_violation, lasso
from sparse_jax.coding import working_set as module
from tests.coding import problems
from tests.coding.test_fista import arrays
from tests.coding.test_lasso import penalties

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    """Groups of 4 rows, so that a few rows make several."""
    monkeypatch.setattr(module, "ROWS_TOGETHER", 4)
    monkeypatch.setattr(module, "FEWEST_TOGETHER", 2)


@pytest.mark.parametrize(
    ("signed", "shape", "by_gram"),
    [(False, "scalar", True), (True, "row", False), (True, "feature", True), (False, "both", False)],
)
def test_solution(signed, shape, by_gram, monkeypatch):
    monkeypatch.setattr(module, "_GRAM_SHARE", 1e9 if by_gram else 0)
    x, W = problems.coherent()
    penalty = penalties(shape, len(x), len(W))
    due = problems.objective(x, W, penalty, problems.by_coordinates(x, W, penalty, signed))
    solve = jax.jit(partial(lasso, tolerance=1e-10, measure="kkt", signed=signed, slots=(4, 16)))
    solution = solve(*arrays(x, W, penalty))
    np.testing.assert_allclose(problems.objective(x, W, penalty, solution.codes), due, rtol=1e-9)
    assert np.all(kkt_violation(*arrays(x, W, penalty, solution.codes), signed) <= 1.001e-10)
    np.testing.assert_allclose(
        solution.violation, kkt_violation(*arrays(x, W, penalty, solution.codes), signed), atol=1e-12
    )
    np.testing.assert_allclose(solution.gap, duality_gap(*arrays(x, W, penalty, solution.codes), signed), atol=1e-12)
    assert np.any(solution.codes < 0) == signed


@pytest.mark.parametrize("slots", [(2,), (2, 3), (40,), (64, 128)])
def test_rows_that_fit_no_set_are_solved_too(slots):
    x, W = problems.coherent()
    solution = lasso(*arrays(x, W, 0.2), 1e-9, slots=slots)
    assert np.max(np.sum(np.asarray(solution.codes) > 0, axis=1)) > 3
    assert np.all(duality_gap(*arrays(x, W, 0.2, solution.codes)) <= 1.01e-9)


def test_float32_reaches_the_conditions():
    x, W = problems.coherent(rows=30, d=20, n=100)
    solution = lasso(*arrays(x, W, 0.3, dtype=jnp.float32), 1e-4, measure="kkt", slots=(8, 16))
    assert solution.codes.dtype == jnp.float32
    assert np.all(kkt_violation(*arrays(x, W, 0.3, solution.codes)) <= 2e-4)


def test_the_loosest_tolerance_is_kept_too():
    """Not more than what was asked for is done: rounds end as soon as the gap is small enough."""
    x, W = problems.coherent(rows=30, d=20, n=100)
    loose, tight = (lasso(*arrays(x, W, 0.2), tolerance, slots=(8, 16, 32)) for tolerance in (0.3, 1e-9))
    gaps = duality_gap(*arrays(x, W, 0.2, loose.codes))
    assert np.all(gaps <= 0.3)
    assert np.any(gaps > 1e-9)
    assert np.mean(loose.iterations) < np.mean(tight.iterations)


def test_what_is_degenerate():
    x, W = problems.coherent(rows=6, n=20)
    W[3] = 0
    W[7] = W[8] = W[2]
    x[1] = 0
    given = arrays(x, W, 0.5)
    solution = lasso(*given, 1e-9, measure="kkt", slots=(4, 8))
    assert np.all(np.isfinite(solution.codes))
    assert np.all(kkt_violation(*given, solution.codes) <= 1.01e-9)
    assert np.all(solution.codes[:, 3] == 0)
    assert np.all(solution.codes[1] == 0)
    due = fista_until(*given, 1e-9, measure="kkt")
    np.testing.assert_allclose(
        problems.objective(x, W, 0.5, solution.codes), problems.objective(x, W, 0.5, due.codes), rtol=1e-9
    )
    assert np.all(lasso(*arrays(x, W, 1e3), 1e-9, slots=(4, 8)).codes == 0)
    free = lasso(*arrays(x, W[:4], 0.0), 1e-9, measure="kkt", signed=True)
    left = np.linalg.lstsq(W[:3].T, x.T, rcond=None)[1]
    np.testing.assert_allclose(problems.objective(x, W[:4], 0.0, free.codes), left, atol=1e-12)
    assert np.all(lasso(*arrays(x, np.zeros((4, 10)), 0.5), 1e-9).codes == 0)


def test_starting_at_the_solution_takes_one_round():
    x, W = problems.coherent()
    there = lasso(*arrays(x, W, 0.5), 1e-10, slots=(16,))
    again = lasso(*arrays(x, W, 0.5), 1e-8, start=there.codes, slots=(16,))
    assert np.all(again.iterations <= 1)
    assert np.mean(there.iterations) > 1.5
    np.testing.assert_allclose(again.codes, there.codes, atol=1e-6)


def test_a_gram_matrix_that_is_known():
    x, W = arrays(*problems.coherent())
    np.testing.assert_array_equal(lasso(x, W, 0.5, gram=W @ W.T).codes, lasso(x, W, 0.5).codes)


def test_one_compilation_for_all_penalties():
    x, W = arrays(*problems.coherent())
    traced = []

    @jax.jit
    def solve(x, W, penalty):
        traced.append(1)
        return lasso(x, W, penalty, slots=(8, 16)).codes

    assert len({float(solve(x, W, jnp.array(penalty)).sum()) for penalty in (0.1, 0.3, 1.0)}) == 3
    assert len(traced) == 1
