"""The TopK autoencoder: an answer worked by hand, gradients against finite differences, the k in use, training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import Batch, from_json, to_json
from sparse_jax.dictionaries.topk import TopK
from sparse_jax.errors import InputError
from sparse_jax.training.schedules import Schedule, coefficients
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

# x - b_dec = [[1, 2], [0, 0]]; pre-activations [[2, 1, 2.2], [0, -1, -1]]: ties and negatives in the second row.
X = np.array([[2.0, 1.0], [1.0, -1.0]], np.float32)
BY_HAND = {
    "W_enc": np.array([[2.0, 0.0, 0.4], [0.0, 1.0, 1.4]], np.float32),
    "b_enc": np.array([0.0, -1.0, -1.0], np.float32),
    "W_dec": np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32),
    "b_dec": np.array([1.0, -1.0], np.float32),
}


@pytest.mark.parametrize(
    ("k", "codes", "reconstruction"),
    [
        # errors of the first row: (1, 2) - (1.32, 1.76) = (-0.32, 0.24)
        (1, [[0, 0, 2.2], [0, 0, 0]], 0.08),
        # (1, 2) - (3.32, 1.76) = (-2.32, 0.24)
        (2, [[2, 0, 2.2], [0, 0, 0]], 2.72),
        # (1, 2) - (3.32, 2.76) = (-2.32, -0.76)
        (3, [[2, 1, 2.2], [0, 0, 0]], 2.98),
        (7, [[2, 1, 2.2], [0, 0, 0]], 2.98),
    ],
)
def test_by_hand(k, codes, reconstruction):
    dictionary = TopK(n_features=3, k=k).sized(2)
    np.testing.assert_allclose(encode(dictionary, BY_HAND, X), codes, atol=1e-6)
    expected = np.array(codes) @ BY_HAND["W_dec"] + BY_HAND["b_dec"]
    np.testing.assert_allclose(dictionary.decode(BY_HAND, np.array(codes, np.float32)), expected, atol=1e-6)
    losses = loss(dictionary, BY_HAND, Batch(X, X, np.ones(2, np.float32)), context(dictionary))
    np.testing.assert_allclose(losses.terms["reconstruction"], reconstruction, rtol=1e-5)
    assert losses.terms["aux_k"] == 0
    np.testing.assert_array_equal(losses.fired, np.count_nonzero(codes, axis=0))
    np.testing.assert_allclose(losses.y_hat, expected, atol=1e-6)


def test_at_the_start_reconstructions_are_as_long_as_inputs():
    dictionary = TopK(n_features=256, k=8).sized(32)
    params = dictionary.init(jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 1, rtol=1e-6)
    ratio = params["W_enc"] / params["W_dec"].T
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    x = 3.0 * jax.random.normal(jax.random.key(9), (500, 32))
    lengths = np.linalg.norm(dictionary.decode(params, encode(dictionary, params, x)), axis=1)
    np.testing.assert_allclose(np.mean(lengths / np.linalg.norm(x, axis=1)), 1, rtol=0.03)


def test_gradients_of_the_reconstruction_against_finite_differences(x64):
    dictionary, params, batch = small(TopK, k=3)
    here = context(dictionary, dtype=jnp.float64)
    assert_gradients(
        lambda params: {"reconstruction": loss(dictionary, params, batch, here).terms["reconstruction"]}, params, params
    )


def test_gradients_reach_only_the_selected():
    dictionary, params, batch = small(TopK, np.float32, k=2)
    params = params | {"b_enc": params["b_enc"].at[0].set(-100)}  # never among the largest
    here = context(dictionary)
    _, losses, grads = value_and_grad(dictionary, params, batch, here)
    idle = np.asarray(losses.fired) == 0
    assert idle[0]
    assert not idle.all()
    assert not np.any(grads["b_enc"][idle])
    assert not np.any(grads["W_dec"][idle])


def test_the_k_in_use_is_the_number_of_active_features_and_compiles_nothing_new():
    dictionary, params, batch = small(TopK, np.float32, rows=30, d=8, n=24, k=4, anneal_from=12)
    params = params | {"b_enc": params["b_enc"] + 9}  # all pre-activations are positive
    traced = []

    @jax.jit
    def fired(params, batch, ctx):
        traced.append(1)
        return loss(dictionary, params, batch, ctx).fired

    for k in (12, 7, 4, 1, 0):
        assert np.sum(fired(params, batch, context(dictionary, k))) == k * int(np.sum(batch.weight))
    assert len(traced) == 1
    assert np.all(np.count_nonzero(encode(dictionary, params, batch.x), axis=1) == 4)


def test_k_comes_down_over_the_first_share_of_the_run():
    dictionary = TopK(k=4, anneal_from=24, anneal=0.5)
    at, peaks = coefficients(dictionary, Schedule(), 100), dictionary.coefficients
    np.testing.assert_allclose([at(step, peaks)["k_now"] for step in (24, 49, 99)], [14, 4, 4], atol=1e-4)
    np.testing.assert_allclose(at(0, peaks)["aux_k"], 1 / 32)
    assert coefficients(TopK(k=4), Schedule(), 100)(0, TopK(k=4).coefficients)["k_now"] == 4


def test_bfloat16_products_select_nearly_the_same():
    exact, params, batch = small(TopK, np.float32, rows=64, d=16, n=32, k=4)
    rounded = TopK(n_features=32, k=4).sized(16, compute_dtype="bfloat16")
    value, _, _ = value_and_grad(exact, params, batch, context(exact))
    low, losses, grads = value_and_grad(rounded, params, batch, context(rounded))
    assert 0 < abs(low - value) < 0.03 * value
    assert {grad.dtype for grad in grads.values()} == {losses.y_hat.dtype} == {jnp.dtype(jnp.float32)}


def test_training_lowers_the_error():
    _, params, (first, last) = train(TopK(n_features=48, k=4).sized(16), 300, 1e-2)
    assert last["fvu"] < 0.3 * first["fvu"]
    dictionary, x = TopK(n_features=48, k=4).sized(16), sparse_data(1000, seed=5)
    error = np.sum((dictionary.decode(params, encode(dictionary, params, x)) - x) ** 2)
    assert error / np.sum((x - np.mean(x, axis=0)) ** 2) < 0.3


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"k": 0}, "--k 0"),
        ({"k": 5, "anneal_from": 4}, "--anneal-from 4"),
        ({"anneal": 0.0}, "--anneal 0"),
        ({"aux_coefficient": -1.0}, "--aux-coefficient"),
        ({"aux_k": -1}, "--aux-k"),
    ],
)
def test_bad_values_are_refused(options, flag):
    with pytest.raises(InputError, match=flag):
        TopK(**options)


def test_survives_json():
    dictionary = TopK(k=5, anneal_from=9).sized(8)
    assert from_json(json.loads(json.dumps(to_json(dictionary)))) == dictionary
