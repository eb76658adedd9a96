"""AuxK: worked by hand, whom its gradient reaches, and that dead features come back to life."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries.aux_k import aux_k_loss, residual_loss
from sparse_jax.dictionaries.batch_topk import BatchTopK
from sparse_jax.dictionaries.matryoshka import Matryoshka
from sparse_jax.dictionaries.multi_topk import MultiTopK
from sparse_jax.dictionaries.topk import TopK
from tests.dictionaries.k_sparse import (
    assert_gradients,
    context,
    encode,
    loss,
    small,
    sparse_data,
    train,
    value_and_grad,
)

FAMILY = [TopK, BatchTopK, Matryoshka, MultiTopK]
family = pytest.mark.parametrize("architecture", FAMILY)


def test_by_hand():
    dictionary = TopK(n_features=3, k=1).sized(2)
    W_dec = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    error = jnp.array([[1.0, 2.0], [3.0, 0.0], [50.0, 50.0]])
    weight = jnp.array([1.0, 1.0, 0.0])
    values = jnp.array([[9.0, 2.0, -1.0], [9.0, -1.0, 0.5], [7.0, 7.0, 7.0]])
    # Dead: the last two. Mean error (2, 1), its variance (2 + 2) / 2 = 2; times 1 / 32 and d_out = 2.
    scale = 2 / 2 / 32
    here = context(dictionary, dead=(1, 2))
    # One each: e_hat (0, 2) and (0.3, 0.4); errors (1, 0), (2.7, -0.4).
    one = aux_k_loss(values, error, W_dec, weight, here, 1)
    np.testing.assert_allclose(one, scale * (1 + 7.29 + 0.16) / 2, rtol=1e-6)
    # Both: e_hat (-0.6, 1.2) and (0.3, -0.6); errors (1.6, 0.8), (2.7, 0.6). A negative value counts as it is.
    for k_aux in (2, 3, 10):
        both = aux_k_loss(values, error, W_dec, weight, here, k_aux)
        np.testing.assert_allclose(both, scale * (2.56 + 0.64 + 7.29 + 0.36) / 2, rtol=1e-6)
    # Only one is dead, though a row may have two.
    np.testing.assert_allclose(
        aux_k_loss(values, error, W_dec, weight, context(dictionary, dead=(1,)), 2),
        scale * (1 + 0 + 9 + 1) / 2,
        rtol=1e-6,
    )
    assert aux_k_loss(values, error, W_dec, weight, context(dictionary), 2) == 0


def test_is_finite_and_zero_where_nothing_varies():
    dictionary = TopK(n_features=3, k=1).sized(2)
    here, values, W_dec = context(dictionary, dead=(0, 1)), jnp.ones((4, 3)), jnp.ones((3, 2))

    def of(values, error, weight):
        return aux_k_loss(values, error, W_dec, weight, here, 1)

    for error, weight in ((jnp.zeros((4, 2)), jnp.ones(4)), (jnp.ones((4, 2)), jnp.zeros(4))):
        value, grad = jax.value_and_grad(of)(values, error, weight)
        assert value == 0
        assert not np.any(grad)


def test_the_residual_is_detached():
    dictionary = TopK(n_features=3, k=1).sized(2)
    error = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    grad = jax.grad(lambda error: residual_loss(0.5 * error, error, jnp.ones(2), context(dictionary)))(error)
    # Through e_hat = error / 2 alone: -2 (e - e_hat) / 2 / rows x scale, where the variance is 2 and d_out 2.
    np.testing.assert_allclose(grad, -(error / 2) / 2 / 32, rtol=1e-6)


@family
@pytest.mark.parametrize("aux_k", [1, 2, 4])
def test_reaches_encoder_and_decoder_of_dead_features_and_nothing_else(x64, architecture, aux_k):
    dictionary, params, batch = small(architecture, k=2, aux_k=aux_k)
    dead, alive = [1, 4, 6], [0, 2, 3, 5, 7]
    params = params | {"b_enc": params["b_enc"].at[jnp.array(dead)].add(-9.0)}  # negative on every row
    here = context(dictionary, dead=dead, dtype=jnp.float64)
    trained = {name: value for name, value in params.items() if name not in dictionary.frozen}
    fixed = jax.lax.stop_gradient(batch.target - loss(dictionary, params, batch, here).y_hat)

    def of_loss(trained):
        return {"aux_k": loss(dictionary, params | trained, batch, here).terms["aux_k"]}

    def with_fixed_residual(trained):
        values = dictionary.preactivations(params | trained, batch.x)
        return {"aux_k": dictionary.aux_k_term(params | trained, values, fixed, batch, here)}

    grads = jax.jacrev(of_loss)(trained)["aux_k"]
    numeric = assert_gradients(with_fixed_residual, trained, ("W_enc", "b_enc", "W_dec"))["aux_k"]
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, numeric[name], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grads["b_dec"], 0, atol=1e-14)  # two gradients that cancel
    reached = np.array(grads["b_enc"]) != 0
    assert not reached[alive].any()
    assert reached[dead].all() if aux_k >= 3 else reached[dead].any()
    np.testing.assert_array_equal(np.any(np.asarray(grads["W_enc"]) != 0, axis=0), reached)
    np.testing.assert_array_equal(np.any(np.asarray(grads["W_dec"]) != 0, axis=1), reached)


@family
def test_without_dead_features_nothing_is_added(architecture):
    dictionary, params, batch = small(architecture, np.float32, k=2)
    assert loss(dictionary, params, batch, context(dictionary)).terms["aux_k"] == 0


@family
def test_huge_masked_rows_and_empty_batches_are_harmless(architecture):
    dictionary, params, batch = small(architecture, np.float32, k=2)
    here = context(dictionary, dead=(1, 4, 6))
    huge = jnp.where(batch.weight[:, None] > 0, batch.x, 1e15)
    one = value_and_grad(dictionary, params, batch, here)
    other = value_and_grad(dictionary, params, batch._replace(x=huge, target=huge), here)
    assert one[1].terms["aux_k"] > 0
    for a, b in (
        (one[0], other[0]),
        (one[1].terms, other[1].terms),
        (one[1].frozen, other[1].frozen),
        (one[2], other[2]),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)
    value, losses, grads = value_and_grad(dictionary, params, batch._replace(weight=jnp.zeros(9)), here)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((value, losses.fired, grads)))
    for name in dictionary.frozen:
        assert losses.frozen[name] == params[name]


@family
def test_dead_features_come_back_to_life(architecture):
    """A fifth of the features cannot fire at the start; after 500 steps at least half of those do."""
    n, dead = 60, 12
    fire = {}
    for coefficient in (1 / 32, 0.0):
        dictionary = architecture(n_features=n, k=4, aux_coefficient=coefficient).sized(16)
        before, after, _ = train(
            dictionary, 500, 1e-2, lambda params: params | {"b_enc": params["b_enc"].at[:dead].set(-4.0)}
        )
        x = sparse_data(2000, seed=7)
        assert not np.any(dictionary.preactivations(before, x)[:, :dead] > 0)
        fire[coefficient] = int(np.sum(np.any(encode(dictionary, after, x)[:, :dead] > 0, axis=0)))
    assert fire[1 / 32] >= dead / 2
    assert fire[0.0] == 0
