"""The matching-pursuit autoencoder: against a plain loop, gradients, and dead features that come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import Batch
from sparse_jax.dictionaries.matching_pursuit import MatchingPursuit
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


def plain_pursuit(x, W, steps):
    codes, left = np.zeros((len(x), len(W))), np.array(x)
    for row in range(len(x)):
        for _ in range(steps):
            products = W @ left[row]
            j = np.argmax(products)
            if products[j] > 0:
                codes[row, j] += products[j]
                left[row] -= products[j] * W[j]
    return codes, left


def test_by_hand():
    params = {"W_dec": jnp.array([[1.0, 0.0], [0.6, 0.8]]), "b_dec": jnp.array([0.0, 1.0])}
    x = jnp.array([[2.0, 2.0], [-1.0, 1.0], [-1.0, 2.0]])
    # (2, 1): 2 against 2.0, a tie, goes to the first; (0, 1) is left: 0.8 of the second, which leaves (-0.48, 0.36).
    # (-1, 0): nothing positive. (-1, 1): 0.2 of the second, which leaves (-1.12, 0.84).
    one, two = (MatchingPursuit(n_features=2, k=k).sized(2) for k in (1, 2))
    np.testing.assert_allclose(encode(one, params, x), [[2, 0], [0, 0], [0, 0.2]], atol=1e-6)
    np.testing.assert_allclose(encode(two, params, x), [[2, 0.8], [0, 0], [0, 0.2]], atol=1e-6)
    losses = loss(two, params, Batch(x, x, jnp.ones(3)), context(two))
    np.testing.assert_allclose(losses.terms["reconstruction"], (0.36 + 1 + 1.96) / 3, rtol=1e-5)
    np.testing.assert_array_equal(losses.fired, [1, 2])
    np.testing.assert_allclose(losses.y_hat, two.decode(params, encode(two, params, x)), atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_equals_a_plain_loop(x64, k):
    dictionary, params, batch = small(MatchingPursuit, k=k)
    codes, left = plain_pursuit(batch.x - params["b_dec"], np.asarray(params["W_dec"]), k)
    np.testing.assert_allclose(encode(dictionary, params, batch.x), codes, atol=1e-12)
    losses = loss(dictionary, params, batch, context(dictionary, dtype=jnp.float64))
    np.testing.assert_allclose(batch.x - losses.y_hat, left, atol=1e-12)
    np.testing.assert_array_equal(losses.fired, np.sum((codes != 0) & (np.asarray(batch.weight) > 0)[:, None], axis=0))


def test_gradients_against_finite_differences(x64):
    dictionary, params, batch = small(MatchingPursuit, k=3)
    here = context(dictionary, dtype=jnp.float64)
    assert_gradients(
        lambda params: {"reconstruction": loss(dictionary, params, batch, here).terms["reconstruction"]}, params, params
    )


def test_the_auxiliary_pursuit_moves_only_dead_features(x64):
    dictionary, params, batch = small(MatchingPursuit, k=2)
    here, dead = context(dictionary, dead=(1, 4, 6), dtype=jnp.float64), np.isin(np.arange(8), (1, 4, 6))
    error = batch.target - loss(dictionary, params, batch, here).y_hat
    grads = jax.grad(lambda params: loss(dictionary, params, batch, here).terms["aux_k"])(params)
    numeric = assert_gradients(
        lambda W: {"aux_k": dictionary.aux_term(W["W_dec"], error, batch, here)}, {"W_dec": params["W_dec"]}, ["W_dec"]
    )["aux_k"]
    np.testing.assert_allclose(grads["W_dec"], numeric["W_dec"], rtol=1e-9, atol=1e-12)
    assert not np.any(grads["b_dec"])
    assert not np.any(grads["W_dec"][~dead])
    assert np.any(grads["W_dec"][dead])
    assert loss(dictionary, params, batch, context(dictionary, dtype=jnp.float64)).terms["aux_k"] == 0


def test_the_k_in_use_compiles_nothing_new():
    dictionary, params, batch = small(MatchingPursuit, np.float32, rows=20, d=8, n=24, k=3, anneal_from=6)
    traced = []

    @jax.jit
    def reconstruction(params, batch, ctx):
        traced.append(1)
        return loss(dictionary, params, batch, ctx).y_hat

    for k in (6, 3, 1, 0):
        _, left = plain_pursuit(batch.x - params["b_dec"], np.asarray(params["W_dec"]), k)
        made = reconstruction(params, batch, context(dictionary, k))
        np.testing.assert_allclose(made, batch.x - left, atol=1e-5)
    assert len(traced) == 1


def test_masked_rows_change_nothing():
    dictionary, params, batch = small(MatchingPursuit, np.float32, k=3)
    here = context(dictionary, dead=(1, 4))
    huge = jnp.where(batch.weight[:, None] > 0, batch.x, 1e15)
    one = value_and_grad(dictionary, params, batch, here)
    other = value_and_grad(dictionary, params, Batch(huge, huge, batch.weight), here)
    for a, b in ((one[0], other[0]), (one[1].terms, other[1].terms), (one[2], other[2])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)
    np.testing.assert_array_equal(one[1].fired, other[1].fired)


def test_training_lowers_the_error():
    _, _, (first, last) = train(MatchingPursuit(n_features=48, k=4).sized(16), 300, 1e-2)
    assert last["fvu"] < 0.5 * first["fvu"]


def test_dead_features_come_back_to_life():
    """The data have no part in the last dimensions, where a fifth of the features point at the start."""
    n, dead, fire = 60, 12, {}
    tilt = np.random.default_rng(3).normal(size=(dead, 16)) * np.where(np.arange(16) < 12, 0.003, 1.0)

    def point_away(params):
        # The others stay out of those dimensions, or what they leave there would be for the dead ones to explain.
        W = params["W_dec"].at[:, 12:].set(0)
        return params | {"W_dec": W.at[:dead].set(jnp.array(tilt, jnp.float32))}

    x = sparse_data(2000, seed=7, used=12)
    for coefficient in (1 / 32, 0.0):
        dictionary = MatchingPursuit(n_features=n, k=3, aux_coefficient=coefficient).sized(16)
        before, after, _ = train(dictionary, 500, 1e-2, point_away, used=12)
        assert not np.any(encode(dictionary, before, x)[:, :dead] > 0.1)
        fire[coefficient] = int(np.sum(np.any(encode(dictionary, after, x)[:, :dead] > 0.1, axis=0)))
    assert fire[1 / 32] >= dead / 2
    assert fire[0.0] < dead / 2
