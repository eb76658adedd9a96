"""The BatchTopK autoencoder: selection over the batch, the threshold for inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import Batch
from sparse_jax.dictionaries.batch_topk import NOT_KNOWN, BatchTopK
from sparse_jax.dictionaries.topk import TopK
from sparse_jax.errors import InputError
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

IDENTITY = {
    "W_enc": jnp.eye(3),
    "b_enc": jnp.zeros(3),
    "W_dec": jnp.eye(3),
    "b_dec": jnp.zeros(3),
    "threshold": jnp.float32(NOT_KNOWN),
}
X = jnp.array([[5.0, 4.0, 3.0], [2.0, -7.0, 1.0], [9.0, 9.0, 9.0], [0.5, 2.5, -1.0]])
WEIGHT = jnp.array([1.0, 1.0, 0.0, 1.0])


def test_by_hand():
    dictionary = BatchTopK(n_features=3, k=1).sized(3)
    losses = loss(dictionary, IDENTITY, Batch(X, X, WEIGHT), context(dictionary))
    # Three rows count: the three largest of theirs are all in the first.
    np.testing.assert_array_equal(losses.y_hat, [[5, 4, 3], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(losses.fired, [1, 1, 1])
    assert losses.frozen["threshold"] == 3
    np.testing.assert_allclose(losses.terms["reconstruction"], (0 + 54 + 7.5) / 3, rtol=1e-6)
    # k may be a fraction on the way down: 5 of 3 rows.
    wider = BatchTopK(n_features=3, k=2).sized(3)
    losses = loss(wider, IDENTITY, Batch(X, X, WEIGHT), context(wider, 5.1 / 3))
    np.testing.assert_array_equal(losses.fired, [2, 2, 1])
    assert losses.frozen["threshold"] == 2


def test_negatives_are_never_kept():
    dictionary = BatchTopK(n_features=3, k=3).sized(3)
    losses = loss(dictionary, IDENTITY, Batch(X, X, WEIGHT), context(dictionary))
    np.testing.assert_array_equal(losses.fired, [3, 2, 2])
    assert losses.frozen["threshold"] == 0.5


def test_the_threshold_is_an_average_over_late_batches():
    dictionary = BatchTopK(n_features=3, k=1, threshold_share=0.5).sized(3)
    threshold, expected = jnp.float32(NOT_KNOWN), None
    for step, scale in enumerate((1.0, 2.0, 0.5, 1.0)):
        batch = Batch(scale * X, scale * X, WEIGHT)
        threshold = loss(dictionary, IDENTITY | {"threshold": threshold}, batch, context(dictionary, step=step)).frozen[
            "threshold"
        ]
        smallest = 3 * scale
        expected = smallest if expected is None else expected + (smallest - expected) / (1 + 0.5 * step)
        np.testing.assert_allclose(threshold, expected, rtol=1e-6)
    assert threshold.dtype == jnp.float32
    # A batch in which nothing counts or nothing is positive leaves it.
    for x, weight in ((X, jnp.zeros(4)), (-jnp.abs(X), WEIGHT)):
        after = loss(dictionary, IDENTITY | {"threshold": threshold}, Batch(x, x, weight), context(dictionary, step=9))
        assert after.frozen["threshold"] == threshold
    # A run that begins with such a batch takes the first real one whole.
    first = loss(dictionary, IDENTITY, Batch(X, X, WEIGHT), context(dictionary, step=7))
    assert first.frozen["threshold"] == 3


def test_inference_looks_at_each_row_alone():
    dictionary = BatchTopK(n_features=3, k=1).sized(3)
    params = IDENTITY | {"threshold": jnp.float32(2.5)}
    np.testing.assert_array_equal(encode(dictionary, params, X), [[5, 4, 3], [0, 0, 0], [9, 9, 9], [0, 0, 0]])
    np.testing.assert_array_equal(encode(dictionary, params, X[:1]), [[5, 4, 3]])


def test_before_the_threshold_is_known_encoding_is_topk():
    dictionary, params, batch = small(BatchTopK, np.float32, k=3)
    codes = encode(dictionary, dictionary.init(jax.random.key(3)) | params, batch.x)
    np.testing.assert_array_equal(codes, encode(TopK(n_features=8, k=3).sized(4), params, batch.x))


def test_gradients_against_finite_differences(x64):
    dictionary, params, batch = small(BatchTopK, k=2)
    trained = {name: value for name, value in params.items() if name != "threshold"}
    here = context(dictionary, dtype=jnp.float64)

    def terms(trained):
        made = loss(dictionary, params | trained, batch, here).terms
        return {"reconstruction": made["reconstruction"]}

    assert_gradients(terms, trained, trained)
    _, losses, grads = value_and_grad(dictionary, params, batch, here)
    assert "threshold" not in grads
    assert losses.frozen["threshold"] > 0


def test_masked_rows_neither_compete_nor_count():
    dictionary, params, batch = small(BatchTopK, np.float32, rows=12, k=2)
    keep = np.flatnonzero(batch.weight)
    huge = jnp.where(batch.weight[:, None] > 0, batch.x, 1e15)
    one = loss(dictionary, params, Batch(huge, huge, batch.weight), context(dictionary))
    x = batch.x[keep]
    other = loss(dictionary, params, Batch(x, x, jnp.ones(len(keep))), context(dictionary))
    np.testing.assert_array_equal(one.fired, other.fired)
    # Products of other numbers of rows may differ in the last digit.
    np.testing.assert_allclose(one.frozen["threshold"], other.frozen["threshold"], rtol=1e-6)
    np.testing.assert_allclose(one.terms["reconstruction"], other.terms["reconstruction"], rtol=1e-5)
    assert np.sum(one.fired) == 2 * len(keep)


@pytest.mark.parametrize("k", [2, 5])
def test_after_training_the_threshold_keeps_about_k_on_new_data(k):
    dictionary = BatchTopK(n_features=48, k=k).sized(16)
    _, params, (first, last) = train(dictionary, 400, 5e-3)
    assert last["fvu"] < 0.5 * first["fvu"]
    codes = encode(dictionary, params, sparse_data(4000, seed=5))
    np.testing.assert_allclose(np.mean(np.count_nonzero(codes, axis=1)), k, rtol=0.1)


def test_the_k_in_use_compiles_nothing_new():
    dictionary, params, batch = small(BatchTopK, np.float32, rows=30, d=8, n=24, k=4, anneal_from=12)
    params, traced = params | {"b_enc": params["b_enc"] + 9}, []

    @jax.jit
    def fired(params, batch, ctx):
        traced.append(1)
        return loss(dictionary, params, batch, ctx).fired

    for k in (12, 7, 4, 1, 0, 2.5):
        assert np.sum(fired(params, batch, context(dictionary, k))) == int(k * int(np.sum(batch.weight)))
    assert len(traced) == 1


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_bad_share_is_refused(share):
    with pytest.raises(InputError, match="--threshold-share"):
        BatchTopK(threshold_share=share)
