"""Adam on codes: its first step by hand, the solution of FISTA, exact zeros, odd atoms, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax.coding.code_gradient import code_gradient
from sparse_jax.coding.fista import fista
from sparse_jax.errors import InputError
from tests.coding.problems import objective
from tests.coding.pursuits import ROWS, N, problem

search = jax.jit(code_gradient, static_argnames=("iterations", "signed", "learning_rate"))


def test_the_first_step_by_hand():
    """Adam's first step is the rate times the sign of the gradient; the threshold is rate x lambda / |gradient|."""
    W, x = jnp.eye(2), jnp.array([[2.0, -1.0]])
    # g = -2 x + lambda = (-3.5, 2.5): up by 0.1; and down, which is not admissible.
    np.testing.assert_allclose(search(x, W, 0.5, 1, learning_rate=0.1), [[0.1, 0]], rtol=1e-5)
    # g = -2 x = (-4, 2): thresholds 0.1 x 0.5 / 4 and 0.1 x 0.5 / 2.
    np.testing.assert_allclose(search(x, W, 0.5, 1, learning_rate=0.1, signed=True), [[0.0875, -0.075]], rtol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["one", "per row", "per feature"])
def test_nears_the_solution_with_exact_zeros(x64, signed, kind):
    x, W = problem(0, norms=False)
    generator = np.random.default_rng(0)
    penalty = {
        "one": np.array(0.5),
        "per row": generator.uniform(0.3, 1, size=(ROWS, 1)),
        "per feature": generator.uniform(0.3, 1, size=N),
    }[kind]
    exact = jax.jit(fista, static_argnames=("iterations", "signed"))(x, W, jnp.array(penalty), 1000, signed=signed)
    codes = search(x, W, jnp.array(penalty), 1500, signed=signed)
    best = objective(x, W, penalty, exact)
    assert np.all(objective(x, W, penalty, codes) < best * 1.001 + 1e-9)
    assert abs(np.mean(np.asarray(codes) != 0) - np.mean(np.asarray(exact) != 0)) < 0.02
    assert signed == bool(np.any(codes < 0))


def test_a_schedule_and_a_start(x64):
    x, W = problem(1, norms=False)
    constant = search(x, W, 0.5, 4000)
    falling = search(x, W, 0.5, 4000, learning_rate=optax.linear_schedule(0.1, 0, 4000))
    best = np.mean(objective(x, W, 0.5, falling))
    assert best * (1 + 1e-7) < np.mean(objective(x, W, 0.5, constant)) < best * (1 + 1e-4)
    # A start near the solution stays near it.
    again = search(x, W, 0.5, 10, learning_rate=1e-4, start=falling)
    np.testing.assert_allclose(again, falling, atol=1e-3)
    assert np.any(falling)
    # What is not admissible in a start is 0.
    np.testing.assert_array_equal(search(x, W, 0.5, 0, start=-jnp.ones((ROWS, N))), 0)


@pytest.mark.parametrize("signed", [True, False])
def test_odd_atoms_and_rows(x64, signed):
    x, W = (np.array(a) for a in problem(2, n=6))
    W[1], W[3], x[0] = 0, W[2], 0
    codes = search(jnp.array(x), jnp.array(W), 0.2, 300, signed=signed, start=jnp.full((ROWS, 6), 0.1))
    assert np.all(np.isfinite(codes))
    assert not np.any(codes[0])
    assert not np.any(codes[:, 1])


def test_float32_and_compiles_once():
    traced = []

    @jax.jit
    def codes(x, W, penalty):
        traced.append(1)
        return code_gradient(x, W, penalty, 5)

    for seed in range(3):
        x, W = (jnp.array(a, jnp.float32) for a in problem(seed))
        assert codes(x, W, jnp.float32(0.1 * seed)).dtype == jnp.float32
    assert len(traced) == 1


def test_refusals():
    x, W = problem(0)
    with pytest.raises(InputError, match="iterations -1"):
        code_gradient(x, W, 0.1, -1)
    with pytest.raises(InputError, match=r"learning_rate -0\.1"):
        code_gradient(x, W, 0.1, 1, learning_rate=-0.1)
    with pytest.raises(InputError, match="start of shape"):
        code_gradient(x, W, 0.1, 1, start=x)
    with pytest.raises(InputError, match="penalty of shape"):
        code_gradient(x, W, jnp.ones(3), 1)
