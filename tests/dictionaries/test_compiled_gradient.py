"""Gradients written by hand, compiled, in bfloat16: the numbers a caller reads are those of the operations one by one.

XLA's CPU backend has handed out the transpose of a product in an order that the caller read wrongly, where all rows
were one block; other sizes were right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Batch, BatchTopK, Context, TopK
from sparse_jax.training import adam, init_state, make_step, settings_for
from sparse_jax.training.schedules import Schedule

KINDS = {
    "l1": L1(n_features=256),
    "tied l1": L1(n_features=256, tied=True),
    "norm-weighted l1": L1(n_features=256, norm_weighted=True),
    "topk": TopK(n_features=256, k=4),
    "sparse topk": TopK(n_features=1024, k=2),
    "batch-topk": BatchTopK(n_features=256, k=4),
}


def given(kind, rows, compute_dtype="bfloat16"):
    dictionary = KINDS[kind].sized(32, compute_dtype=compute_dtype)
    x = jnp.array(np.random.default_rng(0).normal(size=(rows, 32)), jnp.float32)
    params = dictionary.init(jax.random.key(0))
    coefficients = {name: jnp.float32(value) for name, value in dictionary.coefficients.items()}
    context = Context(
        coefficients, jnp.zeros(dictionary.n_features, jnp.int32), jax.random.key(0), jnp.int32(0), jnp.int32(5)
    )
    return dictionary, params, Batch(x, x, jnp.ones(rows)), context


@pytest.mark.parametrize("rows", [64, 256, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gradients_are_those_of_single_operations(kind, rows):
    dictionary, params, batch, context = given(kind, rows)
    grads = jax.jit(dictionary.value_and_grad)(params, batch, context)[2]
    with jax.disable_jit(rows <= 256):
        one_by_one = dictionary.value_and_grad(params, batch, context)[2]
    for name, grad in one_by_one.items():
        # Subtracted on the device: it is a later operation that read the wrong order, a copy to the host did not.
        apart = np.linalg.norm(grads[name] - grad) / np.linalg.norm(grad)
        assert apart < 0.02, (name, apart)


@pytest.mark.parametrize("rows", [64, 256, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bfloat16_is_near_that_in_float32(kind, rows):
    moved = []
    for compute_dtype in ("float32", "bfloat16"):
        dictionary, _, batch, _ = given(kind, rows, compute_dtype)
        # A step of the plain gradient: Adam would hide its size.
        optimisation = adam(1e-2)._replace(transform=_sgd())
        normaliser = Normaliser(jnp.zeros(32), jnp.ones(()))
        settings = settings_for(dictionary, optimisation)
        state = init_state(dictionary, optimisation.transform, normaliser, 0, settings)
        before = {name: np.array(value) for name, value in state.params.items()}
        step = make_step(dictionary, optimisation, Schedule(0.0, 0.0, 0.0), 10, 1000)
        state, _ = step(state, batch.x, batch.weight)
        moved.append({name: np.asarray(value) - before[name] for name, value in state.params.items()})
    exact, rounded = moved
    for name in ("W_dec", *(["W_enc"] if "W_enc" in exact else [])):
        apart = np.linalg.norm(rounded[name] - exact[name]) / np.linalg.norm(exact[name])
        # Rounding changes which of two near values is among the k largest; numbers in a wrong order are 1.4 apart.
        assert apart < 0.4, (name, apart)


def _sgd():
    import optax

    return optax.identity()
