"""Gradients through solved codes, against finite differences of the solver itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding import fista_until
from sparse_jax.coding.implicit import differentiable_lasso, solve_on_support
from tests.coding import problems
from tests.coding.test_fista import arrays
from tests.coding.test_lasso import penalties

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(("signed", "shape"), [(False, "scalar"), (True, "row"), (True, "feature"), (False, "both")])
def test_finite_differences(signed, shape):
    x, W = problems.coherent(rows=4, d=6, n=9)
    penalty = penalties(shape, 4, 9)
    aim = jnp.array(np.random.default_rng(2).normal(size=(4, 9)))

    def solve(x, W, penalty):
        return fista_until(x, W, penalty, 1e-13, measure="kkt", signed=signed).codes

    @jax.jit
    def loss(x, W, penalty):
        return jnp.sum((differentiable_lasso(solve, x, W, penalty) - aim) ** 2)

    given = arrays(x, W, penalty)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)
    generator = np.random.default_rng(4)
    for i, grad in enumerate(grads):
        assert grad.shape == given[i].shape
        for _ in range(3):
            direction = generator.normal(size=grad.shape)
            moved = [[*given[:i], given[i] + sign * 1e-6 * direction, *given[i + 1 :]] for sign in (1, -1)]
            slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
            assert abs(slope) > 1e-3
            np.testing.assert_allclose(jnp.sum(grad * direction), slope, rtol=1e-5)


def test_linear_systems_on_each_rows_own_features():
    _, W = problems.coherent(d=10, n=12)
    generator = np.random.default_rng(0)
    active = generator.random((5, 12)) < 0.5
    active[4] = False
    g = generator.normal(size=(5, 12))
    v = np.asarray(solve_on_support(*arrays(W), jnp.array(active), jnp.array(g)))
    for row in range(4):
        chosen = np.flatnonzero(active[row])
        np.testing.assert_allclose(v[row, chosen], np.linalg.solve(W[chosen] @ W[chosen].T, g[row, chosen]), rtol=1e-6)
    assert np.all(v[~active] == 0)


def test_atoms_that_depend_on_each_other_give_something_finite():
    W = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    v = solve_on_support(W, jnp.ones((1, 3), bool), jnp.array([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(v, [[0.5, 0.5, 0.0]], atol=1e-12)
