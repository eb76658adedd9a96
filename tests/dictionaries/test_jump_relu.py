"""The JumpReLU autoencoder: answers worked by hand, pseudo-gradients in their closed form, thresholds that learn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import Batch, Context
from sparse_jax.dictionaries.jump_relu import JumpReLU, jump_relu, step
from sparse_jax.errors import InputError
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for

PENALTIES = ("step", "tanh", "quadratic")
ROWS, D, N = 60, 3, 5


def context(dictionary, dtype=jnp.float32, **given):
    return Context(
        coefficients={
            name: jnp.array(given.get(name, value), dtype) for name, value in dictionary.coefficients.items()
        },
        age=jnp.zeros(1, jnp.int32),
        key=jax.random.key(0),
        step=jnp.int32(0),
        dead_window=jnp.int32(1000),
    )


def small(penalty, dtype=np.float64, seed=0, **options):
    """A dictionary with a wide kernel, every parameter away from zero, and a batch with masked rows."""
    options = {"threshold": 0.2, "bandwidth": 0.15, "pre_act": 0.3, "target_l0": 2.0} | options
    dictionary = JumpReLU(n_features=N, penalty=penalty, **options).sized(D, compute_dtype=np.dtype(dtype).name)
    generator = np.random.default_rng(seed)
    params = {
        name: jnp.array(np.asarray(value) + 0.3 * generator.normal(size=value.shape), dtype)
        for name, value in dictionary.init(jax.random.key(seed)).items()
    }
    x = jnp.array(generator.normal(size=(ROWS, D)), dtype)
    return dictionary, dictionary.project(params), Batch(x, x, jnp.array(np.arange(ROWS) % 3 != 1, dtype))


def test_thresholds_and_bandwidth_are_in_the_papers_units():
    dictionary = JumpReLU(threshold=0.01, bandwidth=0.03, threshold_rate=4.0).sized(64)
    np.testing.assert_allclose(np.exp(dictionary.init(jax.random.key(0))["log_threshold"]), 0.01 * 8, rtol=1e-6)
    assert dictionary.kernel_width == pytest.approx(0.03 * 8)
    assert dictionary.labels == {"log_threshold": "threshold"}
    assert dictionary.group_factors == {"threshold": 4.0}
    # On activations 8 times smaller the same network with thresholds 8 times lower has codes 8 times smaller.
    x = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    params = dictionary.init(jax.random.key(0))
    in_paper = {**params, "log_threshold": jnp.full(512, math.log(0.01), jnp.float32)}
    np.testing.assert_allclose(8 * dictionary.encode(in_paper, x / 8), dictionary.encode(params, x), rtol=1e-5)


def by_hand(penalty, **options):
    """Codes [[2, 0, 1.5], [0, 0, 0]] from pre-activations [[2, -3, 1.5], [1, 0, 0.5]] and thresholds (1, 1, 1)."""
    x = np.array([[2.0, 3.0], [1.0, 0.0]], np.float32)
    params = {
        "W_enc": np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 1 / 3]], np.float32),
        "b_enc": np.array([0.0, 0.0, 0.5], np.float32),
        "W_dec": np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32),
        "b_dec": np.array([0.0, 1.0], np.float32),
        "log_threshold": np.zeros(3, np.float32),
    }
    dictionary = JumpReLU(n_features=3, penalty=penalty, **options).sized(2)
    return dictionary, params, Batch(x, x, np.ones(2, np.float32))


def test_by_hand():
    dictionary, params, batch = by_hand("step", l0=0.25)
    # A pre-activation equal to its threshold does not pass.
    codes = [[2, 0, 1.5], [0, 0, 0]]
    np.testing.assert_allclose(dictionary.encode(params, batch.x), codes, atol=1e-6)
    losses = dictionary.loss(params, batch, context(dictionary))
    # x_hat: [2.9, 2.2] and [0, 1]; errors (0.9, -0.8) and (-1, 1).
    np.testing.assert_allclose(losses.terms["reconstruction"], (0.81 + 0.64 + 2) / 2, rtol=1e-5)
    np.testing.assert_allclose(losses.terms["l0"], 0.25 * 2 / 2, rtol=1e-6)
    np.testing.assert_array_equal(losses.fired, [1, 0, 1])

    dictionary, params, batch = by_hand("quadratic", l0=3.0, target_l0=4.0)
    losses = dictionary.loss(params, batch, context(dictionary))
    np.testing.assert_allclose(losses.terms["l0"], 3 * (1 / 4 - 1) ** 2, rtol=1e-6)

    dictionary, params, batch = by_hand("tanh", l0=0.5, pre_act=0.1, tanh_scale=2.0)
    params["W_dec"] = params["W_dec"] * np.array([[0.5], [1], [2]], np.float32)  # norms 0.5, 1, 2
    losses = dictionary.loss(params, batch, context(dictionary))
    np.testing.assert_allclose(losses.terms["l0"], 0.5 * (math.tanh(2) + math.tanh(6)) / 2, rtol=1e-6)
    # Below 1 by [0, 4, 0] and [0, 1, 0.5].
    np.testing.assert_allclose(losses.terms["pre_act"], 0.1 * (4 + 1 + 0.5 * 2) / 2, rtol=1e-5)


def test_the_jumps_pseudo_gradients_have_their_closed_form(x64):
    generator = np.random.default_rng(0)
    z = np.maximum(generator.normal(size=(400, 4)), 0)
    theta, g, bandwidth = np.array([0.1, 0.5, 1.0, 2.0]), generator.normal(size=(400, 4)), 0.4
    kernel = (np.abs((z - theta) / bandwidth) < 0.5) & (z > 0)
    assert np.all(kernel.sum(axis=0) > 5)
    value, pull = jax.vjp(lambda z, theta: jump_relu(z, theta, bandwidth), z, theta)
    to_z, to_theta = pull(jnp.array(g))
    np.testing.assert_array_equal(value, z * (z > theta))
    np.testing.assert_array_equal(to_z, g * (z > theta))
    np.testing.assert_allclose(to_theta, np.sum(-theta / bandwidth * kernel * g, axis=0), rtol=1e-12)
    value, pull = jax.vjp(lambda z, theta: step(z, theta, bandwidth), z, theta)
    to_z, to_theta = pull(jnp.array(g))
    np.testing.assert_array_equal(value, z > theta)
    assert not np.any(to_z)
    np.testing.assert_allclose(to_theta, np.sum(-1 / bandwidth * kernel * g, axis=0), rtol=1e-12)


def test_values_below_zero_tell_thresholds_nothing(x64):
    """A threshold under half a bandwidth has 0 within its kernel, where all silent rows lie."""
    z, theta = jnp.zeros((10, 1)), jnp.array([0.01])
    for function in (jump_relu, step):
        assert not np.any(jax.grad(lambda theta: jnp.sum(function(z, theta, 0.4)))(theta))  # noqa: B023


def test_the_pseudo_gradient_is_that_of_the_expected_loss(x64):
    """For z of a smooth density the kernel estimate approaches d/dtheta E[(z H(z - theta) - a)^2 + l H(z - theta)]."""
    z = jnp.linspace(0, 4, 2_000_001)[1:, None]  # uniform on (0, 4]: density 1/4
    theta, a, l = 1.5, 0.7, 0.9

    def objective(theta):
        return jnp.mean((jump_relu(z, theta, 0.02) - a) ** 2 + l * step(z, theta, 0.02))

    estimate = jax.grad(objective)(jnp.array([theta]))
    np.testing.assert_allclose(estimate, -((theta - a) ** 2 - a**2 + l) / 4, rtol=1e-2)


def closed_form(dictionary, params, batch, coefficients):
    """Every term's gradients in NumPy, from the formulas of the module's header."""
    P, x, w = {k: np.asarray(v) for k, v in params.items()}, np.asarray(batch.x), np.asarray(batch.weight)
    w = (w / w.sum())[:, None]
    theta, e = np.exp(P["log_threshold"]), dictionary.bandwidth * np.sqrt(D)
    raw = x @ P["W_enc"] + P["b_enc"]
    z = np.maximum(raw, 0)
    on, kernel = z > theta, (np.abs(z - theta) < e / 2) & (z > 0)
    c, norms = z * on, np.linalg.norm(P["W_dec"], axis=1)
    error = 2 * w * (c @ P["W_dec"] + P["b_dec"] - x)

    def through_codes(g):
        to_raw = g * on
        return {
            "W_enc": x.T @ to_raw,
            "b_enc": to_raw.sum(0),
            "log_threshold": theta * np.sum(-theta / e * kernel * g, axis=0),
        }

    zero = {name: np.zeros_like(value) for name, value in P.items()}
    terms = {
        "reconstruction": zero | through_codes(error @ P["W_dec"].T) | {"W_dec": c.T @ error, "b_dec": error.sum(0)}
    }
    l0 = float(coefficients["l0"])
    if dictionary.penalty == "tanh":
        s = dictionary.tanh_scale
        slope = l0 * w / np.cosh(s * c * norms) ** 2 * s
        terms["l0"] = zero | through_codes(slope * norms)
        terms["l0"]["W_dec"] = np.sum(slope * c, axis=0)[:, None] * P["W_dec"] / norms[:, None]
        below = float(coefficients["pre_act"]) * w * (theta > raw)
        terms["pre_act"] = zero | {
            "W_enc": x.T @ -(below * norms),
            "b_enc": -np.sum(below * norms, axis=0),
            "log_threshold": theta * np.sum(below * norms, axis=0),
            "W_dec": np.sum(below * (theta - raw), axis=0)[:, None] * P["W_dec"] / norms[:, None],
        }
        return terms
    count = np.sum(w * on)
    outer = {"step": l0, "quadratic": 2 * l0 * (count / dictionary.target_l0 - 1) / dictionary.target_l0}
    slope = outer[dictionary.penalty]
    terms["l0"] = zero | {"log_threshold": theta * np.sum(-1 / e * kernel * w, axis=0) * slope}
    return terms


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradients_of_every_term_have_their_closed_form(x64, penalty):
    dictionary, params, batch = small(penalty)
    here = context(dictionary, jnp.float64, l0=0.7)
    grads = jax.jit(jax.jacrev(lambda params: dictionary.loss(params, batch, here).terms))(params)
    expected = closed_form(dictionary, params, batch, here.coefficients)
    assert grads.keys() == expected.keys()
    assert np.all(expected["l0"]["log_threshold"] != 0)
    for term, of in expected.items():
        for name, value in of.items():
            np.testing.assert_allclose(grads[term][name], value, rtol=1e-9, atol=1e-12, err_msg=f"{term} {name}")


@pytest.mark.parametrize("penalty", PENALTIES)
def test_true_gradients_against_finite_differences(x64, penalty):
    """Of everything but the thresholds, away from the jumps."""
    dictionary, params, batch = small(penalty)
    here = context(dictionary, jnp.float64, l0=0.7)
    terms = jax.jit(lambda params: dictionary.loss(params, batch, here).terms)
    grads = jax.jit(jax.jacrev(terms))(params)
    params = jax.tree.map(np.asarray, params)
    for name in params.keys() - {"log_threshold"}:
        for index in np.ndindex(*params[name].shape):
            shift = np.zeros_like(params[name])
            shift[index] = 1e-6
            above, below = (terms({**params, name: params[name] + sign * shift}) for sign in (1, -1))
            for term in grads:
                numeric = (above[term] - below[term]) / 2e-6
                np.testing.assert_allclose(
                    grads[term][name][index], numeric, atol=1e-7, err_msg=f"{term} {name}{index}"
                )


def test_the_quadratic_penalty_pulls_from_both_sides():
    for target, sign in ((0.5, -1), (4.9, 1)):
        dictionary, params, batch = small("quadratic", np.float32, target_l0=target)
        grads = jax.grad(lambda params: dictionary.loss(params, batch, context(dictionary)).terms["l0"])(params)  # noqa: B023
        # Too many: a step against the gradient raises thresholds.
        assert np.all(sign * grads["log_threshold"] >= 0)
        assert np.any(grads["log_threshold"] != 0)


def test_rows_are_free_only_where_the_penalty_weighs_them():
    for penalty in PENALTIES:
        dictionary, params, _ = small(penalty, np.float32)
        longer = {**params, "W_dec": 3 * params["W_dec"]}
        norms = np.linalg.norm(dictionary.project(longer)["W_dec"], axis=1)
        assert np.allclose(norms, 1) == (penalty != "tanh")


@pytest.mark.parametrize(
    ("penalty", "compute_dtype"), [*((penalty, "float32") for penalty in PENALTIES), ("step", "bfloat16")]
)
def test_training_lowers_the_error_moves_thresholds_and_compiles_once(penalty, compute_dtype):
    d = 16
    choices = {"step": {"l0": 0.3}, "tanh": {"l0": 0.6}, "quadratic": {"target_l0": 3.0}}[penalty]
    start = {"threshold": 0.1, "bandwidth": 0.1, "threshold_rate": 3.0, "encoder_scale": 1.0}
    dictionary = JumpReLU(expansion=2, penalty=penalty, **start, **choices)
    dictionary = dictionary.sized(d, compute_dtype=compute_dtype)
    optimisation = adam(3e-3)
    settings = settings_for(dictionary, optimisation)
    state = init_state(dictionary, optimisation.transform, Normaliser(jnp.zeros(d), jnp.ones(())), 0, settings)
    step = make_step(dictionary, optimisation, Schedule(coefficient_warmup=0.05), 250, dead_window=10_000)
    before = np.array(state.params["log_threshold"])
    generator = np.random.default_rng(0)
    directions, first = generator.normal(size=(24, d)), None
    for _ in range(250):
        codes = generator.random((256, 24)) * (generator.random((256, 24)) < 0.1)
        state, metrics = step(state, jnp.array(codes @ directions, jnp.float32), jnp.ones(256))
        first = first or {name: float(value) for name, value in metrics.items()}
    assert float(metrics["fvu"]) < min(0.3, 0.5 * first["fvu"])
    assert float(metrics["l0"]) < 0.75 * first["l0"]
    assert step._cache_size() == 1
    after = state.params["log_threshold"]
    assert after.dtype == jnp.float32
    assert np.mean(np.abs(after - before) > 0.05) > 0.8


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"penalty": "l1"}, "--penalty"),
        ({"l0": -1.0}, "--l0"),
        ({"pre_act": -1.0}, "--pre-act"),
        ({"threshold": 0.0}, "--threshold"),
        ({"bandwidth": 0.0}, "--bandwidth"),
        ({"target_l0": 0.0}, "--target-l0"),
        ({"threshold_rate": 0.0}, "--threshold-rate"),
        ({"tanh_scale": -1.0}, "--tanh-scale"),
    ],
)
def test_impossible_choices_are_refused(options, flag):
    with pytest.raises(InputError, match=flag):
        JumpReLU(**options)
