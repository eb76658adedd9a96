"""The L1 autoencoder: an answer worked by hand, every gradient against finite differences, the unit-norm constraint."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import L1, Batch, Context
from sparse_jax.errors import InputError

VARIANTS = {
    "untied": {},
    "tied": {"tied": True},
    "no decoder bias": {"decoder_bias": False},
    "tied, no decoder bias": {"tied": True, "decoder_bias": False},
    "no centring": {"centring": False},
    "tied, no centring": {"tied": True, "centring": False},
    "norm-weighted": {"norm_weighted": True, "decoder_norm": 0.5},
    "tied, norm-weighted": {"tied": True, "norm_weighted": True},
    "softplus": {"activation": "softplus"},
    "softplus, norm-weighted": {"activation": "softplus", "norm_weighted": True},
}
value_and_grad = jax.jit(L1.value_and_grad, static_argnums=0)
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
CONSTRAINED = {name: options for name, options in VARIANTS.items() if not options.get("norm_weighted")}
constrained_variants = pytest.mark.parametrize("options", CONSTRAINED.values(), ids=CONSTRAINED.keys())


def context(coefficient, dtype=jnp.float32):
    age, key = jnp.zeros(1, jnp.int32), jax.random.key(0)
    return Context({"l1": jnp.array(coefficient, dtype)}, age, key, jnp.int32(0), jnp.int32(1000))


def small(options, dtype=np.float64, rows=9, d=3, n=5, seed=0):
    """A dictionary of this variant with every parameter away from zero, and a batch with masked rows."""
    dictionary = L1(n_features=n, **options).sized(d, compute_dtype=np.dtype(dtype).name)
    generator = np.random.default_rng(seed)
    params = dictionary.init(jax.random.key(seed))
    params = {
        name: jnp.array(np.asarray(value) + 0.3 * generator.normal(size=value.shape), dtype)
        for name, value in params.items()
    }
    x = jnp.array(generator.normal(size=(rows, d)), dtype)
    weight = jnp.array(np.arange(rows) % 3 != 1, dtype)
    return dictionary, dictionary.project(params), Batch(x, x, weight)


# Two rows through three features, by hand. x - b_dec = [[1, 2], [0, 0]].
X = np.array([[2.0, 1.0], [1.0, -1.0]], np.float32)
BY_HAND = {
    "W_dec": np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32),
    "b_enc": np.array([0.0, -1.0, -3.0], np.float32),
    "b_dec": np.array([1.0, -1.0], np.float32),
}
# Twice the first column, minus the second, half the third.
W_ENC = np.array([[2.0, 0.0, 0.3], [0.0, -1.0, 0.4]], np.float32)


@pytest.mark.parametrize(
    ("options", "codes", "x_hat", "reconstruction"),
    [
        # [[1, 2, 2.2], 0] + b_enc; errors (0, -1) and 0
        ({"tied": True}, [[1, 1, 0], [0, 0, 0]], [[2, 0], [1, -1]], 0.5),
        # [[2, -2, 1.1], 0] + b_enc; errors (1, -2) and 0
        ({}, [[2, 0, 0], [0, 0, 0]], [[3, -1], [1, -1]], 2.5),
        # [[2, 1, 2], [1, -1, -0.2]] + b_enc; errors (1, -2) and (1, 0)
        ({"tied": True, "centring": False}, [[2, 0, 0], [1, 0, 0]], [[3, -1], [2, -1]], 3.0),
        # the same codes; errors (0, -1) and (0, 1)
        ({"tied": True, "decoder_bias": False}, [[2, 0, 0], [1, 0, 0]], [[2, 0], [1, 0]], 1.0),
    ],
)
def test_by_hand(options, codes, x_hat, reconstruction):
    dictionary = L1(n_features=3, **options).sized(2)
    names = {"W_dec", "b_enc"} | ({"b_dec"} if dictionary.decoder_bias else set())
    params = {name: BY_HAND[name] for name in names} | ({} if dictionary.tied else {"W_enc": W_ENC})
    np.testing.assert_allclose(dictionary.encode(params, X), codes, atol=1e-6)
    np.testing.assert_allclose(dictionary.decode(params, np.array(codes, np.float32)), x_hat, atol=1e-6)
    losses = dictionary.loss(params, Batch(X, X, np.ones(2, np.float32)), context(0.5))
    np.testing.assert_allclose(losses.terms["reconstruction"], reconstruction, rtol=1e-6)
    np.testing.assert_allclose(losses.terms["l1"], 0.5 * np.sum(codes) / 2, rtol=1e-6)
    np.testing.assert_allclose(losses.y_hat, x_hat, atol=1e-6)
    np.testing.assert_array_equal(losses.fired, np.count_nonzero(codes, axis=0))
    # With only the second row in the mean.
    second = dictionary.loss(params, Batch(X, X, np.array([0, 1], np.float32)), context(0.5))
    np.testing.assert_allclose(second.terms["l1"], 0.5 * np.sum(codes[1]), rtol=1e-6)
    np.testing.assert_array_equal(second.fired, np.sign(codes[1]))


@variants
def test_initial_parameters(options):
    dictionary = L1(n_features=5, **options).sized(3)
    params = dictionary.init(jax.random.key(0))
    names = {"W_dec", "b_enc"} | (set() if dictionary.tied else {"W_enc"})
    assert params.keys() == names | ({"b_dec"} if dictionary.decoder_bias else set())
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), dictionary.decoder_norm, rtol=1e-6)
    if not dictionary.tied:
        # encoder_scale 0 stands for d_in / n_features.
        np.testing.assert_allclose(params["W_enc"], 3 / 5 * params["W_dec"].T / dictionary.decoder_norm, rtol=1e-6)
    assert not any(np.any(params[name]) for name in params if name.startswith("b_"))
    assert np.any(params["W_dec"] != dictionary.init(jax.random.key(1))["W_dec"])


@variants
def test_gradients_of_every_term_against_finite_differences(x64, options):
    dictionary, params, batch = small(options)
    here = context(0.7, jnp.float64)

    @jax.jit
    def terms(params):
        return dictionary.loss(params, batch, here).terms

    grads = jax.jit(jax.jacrev(terms))(params)
    params = jax.tree.map(np.asarray, params)
    assert grads.keys() == {"reconstruction", "l1"}
    for name, value in params.items():
        for index in np.ndindex(*value.shape):
            step = np.zeros_like(value)
            step[index] = 1e-6
            above, below = (terms({**params, name: value + sign * step}) for sign in (1, -1))
            for term, grad in grads.items():
                numeric = (above[term] - below[term]) / 2e-6
                np.testing.assert_allclose(grad[name][index], numeric, atol=1e-7, err_msg=f"{term} {name}{index}")
    value, losses, total = value_and_grad(dictionary, params, batch, here)
    np.testing.assert_allclose(value, losses.terms["reconstruction"] + losses.terms["l1"], rtol=1e-12)
    assert total.keys() == params.keys()
    for name, grad in total.items():
        assert grad.dtype == jnp.float64
        np.testing.assert_allclose(grad, grads["reconstruction"][name] + grads["l1"][name], rtol=1e-9, atol=1e-12)


def test_bfloat16_products_are_close_and_their_gradients_float32():
    exact, params, batch = small({}, np.float32, rows=64, d=16, n=32)
    rounded = L1(n_features=32).sized(16, compute_dtype="bfloat16")
    value, _, grads = value_and_grad(exact, params, batch, context(0.5))
    low_value, low_losses, low_grads = value_and_grad(rounded, params, batch, context(0.5))
    assert 0 < abs(low_value - value) < 0.01 * value
    assert low_losses.y_hat.dtype == jnp.float32
    for name, grad in grads.items():
        assert low_grads[name].dtype == jnp.float32
        error = np.linalg.norm(low_grads[name] - grad) / np.linalg.norm(grad)
        assert error < 0.02, f"{name}: {error}"


@constrained_variants
def test_tangent_removes_exactly_the_parallel_part(x64, options):
    dictionary, params, batch = small(options)
    _, _, grads = value_and_grad(dictionary, params, batch, context(0.7, jnp.float64))
    moved, W = dictionary.tangent(params, grads), params["W_dec"]
    assert moved.keys() == grads.keys()
    for name in moved.keys() - {"W_dec"}:
        np.testing.assert_array_equal(moved[name], grads[name])
    removed = grads["W_dec"] - moved["W_dec"]
    assert np.linalg.norm(removed) > 1e-3
    np.testing.assert_allclose(np.sum(moved["W_dec"] * W, axis=1), 0, atol=1e-14)
    # What was removed is a multiple of the row.
    np.testing.assert_allclose(removed, np.sum(removed * W, axis=1, keepdims=True) * W, atol=1e-14)
    # Row lengths do not change to first order: 1 + O(step^2).
    for step, name in itertools.product((1e-3, 1e-4), ("moved", "all")):
        direction = moved["W_dec"] if name == "moved" else grads["W_dec"]
        change = np.abs(np.linalg.norm(W + step * direction, axis=1) - 1)
        bound = step**2 * np.sum(np.asarray(direction) ** 2, axis=1) + 1e-15
        assert np.all(change <= bound) == (name == "moved")


def test_project_gives_unit_rows_and_leaves_a_zero_row():
    dictionary, params, _ = small({}, np.float32)
    params = {**params, "W_dec": (7 * params["W_dec"]).at[2].set(0)}
    projected = dictionary.project(params)
    np.testing.assert_allclose(np.linalg.norm(projected["W_dec"], axis=1), [1, 1, 0, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(projected["W_dec"] * 7, params["W_dec"], rtol=1e-5)
    for name in params.keys() - {"W_dec"}:
        np.testing.assert_array_equal(projected[name], params[name])


@variants
def test_masked_rows_change_nothing(options):
    dictionary, params, batch = small(options, np.float32)
    keep = np.flatnonzero(batch.weight)
    huge = jnp.where(batch.weight[:, None] > 0, batch.x, 1e15)
    one = value_and_grad(dictionary, params, Batch(huge, huge, batch.weight), context(0.7))
    # As if those rows had never been there.
    x = batch.x[keep]
    other = value_and_grad(dictionary, params, Batch(x, x, jnp.ones(len(keep))), context(0.7))
    for a, b in (
        (one[0], other[0]),
        (one[1].terms, other[1].terms),
        (one[1].fired, other[1].fired),
        (one[2], other[2]),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)
    np.testing.assert_array_equal(one[1].fired, np.count_nonzero(dictionary.encode(params, x), axis=0))


def test_without_the_penalty_only_reconstruction_is_left():
    dictionary, params, batch = small({"l1": 0.0}, np.float32)
    assert dictionary.coefficients == {"l1": 0.0}
    value, losses, grads = value_and_grad(dictionary, params, batch, context(dictionary.coefficients["l1"]))
    assert losses.terms["l1"] == 0
    assert value == losses.terms["reconstruction"]
    alone = jax.grad(lambda params: dictionary.loss(params, batch, context(3.0)).terms["reconstruction"])(params)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, alone[name], rtol=1e-5, atol=1e-6)


def test_the_coefficient_scales_the_penalty_alone():
    dictionary, params, batch = small({}, np.float32)
    one, three = (dictionary.loss(params, batch, context(c)).terms for c in (1.0, 3.0))
    np.testing.assert_allclose(three["l1"], 3 * one["l1"], rtol=1e-6)
    assert three["reconstruction"] == one["reconstruction"]
    assert L1(l1=0.25).coefficients == {"l1": 0.25}


def test_a_negative_coefficient_is_refused():
    with pytest.raises(InputError, match="cannot be negative"):
        L1(l1=-0.1)


def test_the_penalty_weighed_by_norms_cannot_be_evaded_by_long_rows():
    dictionary, params, batch = small({"norm_weighted": True}, np.float32)
    longer = {**params, "W_enc": params["W_enc"] / 5, "b_enc": params["b_enc"] / 5, "W_dec": 5 * params["W_dec"]}
    one, other = (dictionary.loss(p, batch, context(0.7)).terms for p in (params, longer))
    for term in one:
        np.testing.assert_allclose(other[term], one[term], rtol=1e-5)
    by_norms = np.sum(dictionary.encode(params, batch.x) * np.linalg.norm(params["W_dec"], axis=1), axis=1)
    np.testing.assert_allclose(one["l1"], 0.7 * np.average(by_norms, weights=batch.weight), rtol=1e-5)
    # So nothing is done to the rows, and a zero row has a finite gradient.
    assert dictionary.project(longer) is longer
    assert dictionary.tangent(params, params) is params
    silent = {**params, "W_dec": params["W_dec"].at[2].set(0)}
    assert all(np.isfinite(grad).all() for grad in value_and_grad(dictionary, silent, batch, context(0.7))[2].values())


def test_softplus_codes_are_whole_in_training_and_silent_below_a_hundredth():
    dictionary = L1(n_features=3, activation="softplus").sized(2)
    params = {"W_dec": BY_HAND["W_dec"], "W_enc": np.zeros((2, 3), np.float32), "b_dec": np.zeros(2, np.float32)}
    # softplus(0) = log 2, softplus(-6) = 0.0025, softplus(3) = 3.0486
    params["b_enc"] = np.array([0.0, -6.0, 3.0], np.float32)
    full = np.log1p(np.exp([0.0, -6.0, 3.0]))
    np.testing.assert_allclose(dictionary.encode(params, X)[0], full * [1, 0, 1], rtol=1e-6)
    batch = Batch(X, X, np.ones(2, np.float32))
    losses = dictionary.loss(params, batch, context(0.5))
    np.testing.assert_allclose(losses.terms["l1"], 0.5 * full.sum(), rtol=1e-6)
    np.testing.assert_array_equal(losses.fired, [2, 0, 2])
    # A silent feature still learns.
    assert dictionary.value_and_grad(params, batch, context(0.5))[2]["b_enc"][1] != 0


def test_a_scaled_encoder_starts_below_the_variance():
    x = jnp.array(np.random.default_rng(0).normal(size=(512, 32)), jnp.float32)

    def fvu(scale):
        dictionary = L1(expansion=8, encoder_scale=scale).sized(32)
        params = dictionary.init(jax.random.key(0))
        np.testing.assert_allclose(np.linalg.norm(params["W_enc"], axis=0), scale or 1 / 8, rtol=1e-5)
        return float(jnp.sum((dictionary.decode(params, dictionary.encode(params, x)) - x) ** 2) / jnp.sum(x**2))

    assert fvu(1.0) > 5
    assert fvu(0.0) == fvu(1 / 8) < 0.5


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"activation": "tanh"}, "--activation"),
        ({"decoder_norm": 0.0}, "--decoder-norm"),
        ({"decoder_norm": 0.1}, "--norm-weighted"),
        ({"encoder_scale": -1.0}, "--encoder-scale"),
    ],
)
def test_impossible_choices_are_refused(options, flag):
    with pytest.raises(InputError, match=flag):
        L1(**options)
