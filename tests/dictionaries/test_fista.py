"""The dictionary without an encoder: its codes solve the lasso, its gradient is that of the solved objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding import duality_gap, objective
from sparse_jax.dictionaries import Batch, Context, Fista
from sparse_jax.errors import InputError

D, N, ROWS = 8, 24, 30


@pytest.fixture
def given():
    dictionary = Fista(n_features=N, l1=1.5).sized(D)
    params = dictionary.init(jax.random.key(0)) | {"b_dec": 0.1 * jnp.arange(D, dtype=jnp.float32)}
    return dictionary, params, jax.random.normal(jax.random.key(1), (ROWS, D))


def context(l1):
    no = jnp.zeros(N, jnp.int32)
    return Context({"l1": jnp.float32(l1)}, no, jax.random.key(0), jnp.int32(0), jnp.int32(100))


@pytest.mark.parametrize("solver", ["working-sets", "fista"])
@pytest.mark.parametrize("signed", [False, True])
def test_codes_solve_the_lasso(given, solver, signed):
    _, params, x = given
    dictionary = Fista(n_features=N, signed=signed, solver=solver).sized(D)
    codes = dictionary.encode(params | {"penalty": jnp.float32(0.7)}, x)
    gap = duality_gap(x - params["b_dec"], params["W_dec"], 0.7, codes, signed)
    assert np.all(gap <= 1.1e-4)
    assert np.any(codes < 0) == signed
    assert 1 < np.mean(np.sum(codes != 0, axis=1)) < D


def test_the_objective_is_the_lassos(given):
    dictionary, params, x = given
    value, losses, _ = dictionary.value_and_grad(params, Batch(x, x, jnp.ones(ROWS)), context(1.5))
    codes = dictionary.solve(params, x, jnp.float32(1.5), dictionary.training_tolerance)
    np.testing.assert_allclose(value, jnp.mean(objective(x - params["b_dec"], params["W_dec"], 1.5, codes)), rtol=1e-6)
    np.testing.assert_array_equal(losses.fired, np.sum(codes != 0, axis=0))
    assert losses.frozen["penalty"] == np.float32(1.5)


def test_the_gradient_is_that_of_the_solved_objective(given):
    """Danskin: codes that move with the parameters change nothing to first order."""
    _, params, x = given
    dictionary = Fista(n_features=N, training_tolerance=0.0).sized(D)
    batch = Batch(x, x, jnp.ones(ROWS))
    value = jax.jit(lambda params: dictionary.value_and_grad(params, batch, context(1.5))[0])
    _, _, grads = dictionary.value_and_grad(params, batch, context(1.5))
    for name in ("W_dec", "b_dec"):
        direction = jax.random.normal(jax.random.key(5), params[name].shape)
        ends = [value({**params, name: params[name] + sign * 1e-2 * direction}) for sign in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, jnp.sum(grads[name] * direction), rtol=2e-2)


def test_the_penalty_in_use_is_what_inference_takes(given):
    dictionary, params, x = given
    _, losses, _ = dictionary.value_and_grad(params, Batch(x, x, jnp.ones(ROWS)), context(0.4))
    denser = dictionary.encode(params | losses.frozen, x)
    assert np.sum(denser != 0) > np.sum(dictionary.encode(params, x) != 0)


def test_flags_that_cannot_be():
    for flags, words in (
        ({"l1": -1.0}, "--l1 -1.0"),
        ({"tolerance": 1.0}, "--tolerance 1.0"),
        ({"training_tolerance": -0.1}, "--training-tolerance -0.1"),
        ({"solver": "lars"}, "--solver lars"),
    ):
        with pytest.raises(InputError, match=words):
            Fista(**flags)
