"""FISTA and ISTA: known answers, the solutions of plain coordinate descent, gradients, rows laid out over devices."""

import itertools
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_jax.coding import fista, fista_until, ista, kkt_violation, objective, spectral_bound
from sparse_jax.errors import InputError
from tests.coding import problems
from tests.coding.test_lasso import penalties

pytestmark = pytest.mark.usefixtures("x64")


def arrays(*values, dtype=jnp.float64):
    return tuple(jnp.array(value, dtype) for value in values)


@pytest.mark.parametrize("n", [15, 40])  # by the Gram matrix, and by two products
@pytest.mark.parametrize(("signed", "shape"), [(False, "scalar"), (True, "row"), (True, "feature"), (False, "both")])
def test_solution(signed, shape, n):
    x, W = problems.coherent(n=n)
    penalty = penalties(shape, len(x), n)
    due = problems.objective(x, W, penalty, problems.by_coordinates(x, W, penalty, signed))
    solution = jax.jit(partial(fista_until, tolerance=1e-10, measure="kkt", signed=signed))(*arrays(x, W, penalty))
    np.testing.assert_allclose(problems.objective(x, W, penalty, solution.codes), due, rtol=1e-9)
    assert np.all(solution.violation <= 1e-10)
    np.testing.assert_allclose(
        solution.violation, kkt_violation(*arrays(x, W, penalty, solution.codes), signed), rtol=1e-3, atol=1e-12
    )
    assert np.any(solution.codes < 0) == signed


def test_float32_reaches_the_conditions():
    x, W = problems.coherent(n=40)
    solution = fista_until(*arrays(x, W, 0.5, dtype=jnp.float32), 1e-4, measure="kkt")
    assert solution.codes.dtype == jnp.float32
    assert np.all(kkt_violation(*arrays(x, W, 0.5, solution.codes)) <= 2e-4)


@pytest.mark.parametrize("signed", [False, True])
def test_orthonormal_atoms_give_soft_thresholding_at_once(signed):
    generator = np.random.default_rng(3)
    W = np.linalg.qr(generator.normal(size=(10, 10)))[0][:6]
    x = generator.normal(size=(5, 10))
    u = x @ W.T
    due = np.sign(u) * np.maximum(np.abs(u) - 0.3, 0) if signed else np.maximum(u - 0.3, 0)
    np.testing.assert_allclose(fista(*arrays(x, W, 0.6), 1, signed=signed, lipschitz=jnp.array(2.0)), due, atol=1e-14)


def test_what_is_degenerate():
    x, W = problems.coherent(rows=6, n=20)
    W[3] = 0
    W[7] = W[8] = W[2]
    x[1] = 0
    solution = fista_until(*arrays(x, W, 0.5), 1e-9, measure="kkt")
    assert np.all(np.isfinite(solution.codes))
    assert np.all(solution.violation <= 1e-9)
    assert np.all(solution.codes[:, 3] == 0)
    assert np.all(solution.codes[1] == 0)
    assert solution.iterations[1] == 0
    distinct = np.delete(W, (3, 7, 8), axis=0)
    due = problems.objective(x, distinct, 0.5, problems.by_coordinates(x, distinct, 0.5, False))
    np.testing.assert_allclose(problems.objective(x, W, 0.5, solution.codes), due, rtol=1e-9)
    # A penalty above every correlation leaves nothing active, none at all solves least squares.
    assert np.all(fista_until(*arrays(x, W, 1e3), 1e-9).codes == 0)
    free = fista_until(*arrays(x, W[:4], 0.0), 1e-9, measure="kkt", signed=True)
    left = np.linalg.lstsq(W[:3].T, x.T, rcond=None)[1]
    np.testing.assert_allclose(problems.objective(x, W[:4], 0.0, free.codes), left, atol=1e-12)
    assert fista(*arrays(x, np.zeros((4, 10)), 0.5), 3).shape == (6, 4)


def test_the_objective_never_rises_where_it_must_not():
    given = arrays(*problems.coherent(rows=30), 0.2)
    lengths = (*range(8), 20, 21, 22, 40, 41)
    for solve in (partial(fista, monotone=True), partial(fista, monotone=True, restart=False), ista):
        path = [objective(*given, solve(*given, i)) for i in lengths]
        for before, after in itertools.pairwise(path):
            assert np.all(after <= before * (1 + 1e-14))
    plain = [objective(*given, fista(*given, i, restart=False)) for i in (20, 21, 22, 40, 41, 60)]
    assert any(np.any(after > before * (1 + 1e-9)) for before, after in itertools.pairwise(plain))


@pytest.mark.parametrize("n", [15, 40, 100])
def test_restart_needs_no_more_iterations(n):
    x, W = problems.coherent(rows=20, n=n)
    plain, restarted = (fista_until(*arrays(x, W, 0.1), 1e-8, restart=restart).iterations for restart in (False, True))
    assert np.all(restarted <= plain)
    assert np.sum(restarted) < np.sum(plain)


def test_starting_at_the_solution_costs_nothing():
    x, W = problems.coherent()
    there = fista_until(*arrays(x, W, 0.5), 1e-9)
    again = fista_until(*arrays(x, W, 0.5), 1e-8, start=there.codes)
    assert np.all(again.iterations == 0)
    np.testing.assert_array_equal(again.codes, there.codes)
    np.testing.assert_array_equal(fista(*arrays(x, W, 0.5), 0, start=there.codes), there.codes)


def test_rows_that_are_done_are_left_alone(monkeypatch):
    """In groups of 4, rows stop when they are done, and what they get does not depend on the others."""
    monkeypatch.setattr(sys.modules["sparse_jax.coding.fista"], "ROWS_TOGETHER", 4)
    x, W = problems.coherent(rows=18)
    x[:9] *= 1e-2  # solved at once: below the penalty
    together = fista_until(*arrays(x, W, 0.3), 1e-8, max_iterations=5000)
    assert np.all(together.gap <= 1e-8)
    assert np.all(together.iterations[:9] == 0)
    assert np.all(together.iterations[9:] > 0)
    assert len(set(np.asarray(together.iterations[9:]).tolist())) > 3
    alone = fista_until(*arrays(x[14:15], W, 0.3), 1e-8, max_iterations=5000)
    np.testing.assert_allclose(alone.codes[0], together.codes[14], atol=1e-5)


def test_a_limit_on_iterations():
    x, W = problems.coherent()
    stopped = fista_until(*arrays(x, W, 0.1), 1e-12, max_iterations=20)
    assert np.max(stopped.iterations) == 20
    assert np.max(stopped.gap) > 1e-12


@pytest.mark.parametrize("n", [8, 14])
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_through_iterations(n, signed):
    x, W = problems.coherent(rows=3, d=5, n=n)
    aim = np.random.default_rng(2).normal(size=(3, n))

    def loss(x, W, penalty):
        codes = fista(x, W, penalty, 15, signed=signed, lipschitz=jnp.array(60.0))
        return jnp.sum((codes - aim) ** 2)

    given = arrays(x, W, 0.3 * np.ones(n))
    grads = jax.grad(loss, argnums=(0, 1, 2))(*given)
    generator = np.random.default_rng(4)
    for i, grad in enumerate(grads):
        for _ in range(4):
            direction = generator.normal(size=grad.shape)
            moved = [[*given[:i], given[i] + sign * 1e-6 * direction, *given[i + 1 :]] for sign in (1, -1)]
            slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
            np.testing.assert_allclose(jnp.sum(grad * direction), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("over", ["rows", "atoms"])
def test_laid_out_over_devices(over):
    x, W = arrays(*problems.coherent(rows=8, n=40))
    mesh = jax.make_mesh((4,), ("all",), axis_types=(AxisType.Auto,))
    rows, atoms = (PartitionSpec("all"), PartitionSpec()) if over == "rows" else (PartitionSpec(), PartitionSpec("all"))
    x_there, W_there = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, rows), (W, atoms)))
    codes = jax.jit(partial(fista, iterations=50))(x_there, W_there, jnp.array(0.5))
    np.testing.assert_allclose(codes, fista(x, W, 0.5, 50), atol=1e-12)
    spread = codes.sharding.spec
    assert spread == (PartitionSpec("all") if over == "rows" else PartitionSpec(None, "all"))


def test_rounded_products_come_near():
    x, W = problems.coherent()
    exact = fista(*arrays(x, W, 0.5, dtype=jnp.float32), 100)
    rounded = fista(*arrays(x, W, 0.5, dtype=jnp.float32), 100, compute_dtype="bfloat16")
    value, near = (problems.objective(x, W, 0.5, codes) for codes in (exact, rounded))
    assert np.all(near < 1.01 * value)
    assert np.any(near > value)


def test_a_step_from_a_bound_that_is_known():
    x, W = arrays(*problems.coherent())
    known = fista(x, W, 0.5, 20, lipschitz=2 * spectral_bound(W))
    np.testing.assert_array_equal(known, fista(x, W, 0.5, 20))
    with pytest.raises(InputError, match="iterations -1"):
        fista(x, W, 0.5, -1)
