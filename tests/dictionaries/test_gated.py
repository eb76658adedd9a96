"""The Gated autoencoder: an answer worked by hand, every gradient against finite differences, what is held constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import Batch, Context
from sparse_jax.dictionaries.gated import Gated
from sparse_jax.errors import InputError
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for

TERMS = {"reconstruction", "l1", "auxiliary"}


def context(coefficient, dtype=jnp.float32):
    return Context(
        coefficients={"l1": jnp.array(coefficient, dtype)},
        age=jnp.zeros(1, jnp.int32),
        key=jax.random.key(0),
        step=jnp.int32(0),
        dead_window=jnp.int32(1000),
    )


def small(options=None, dtype=np.float64, rows=9, d=3, n=5, seed=0):
    """A dictionary with every parameter away from zero, and a batch with masked rows."""
    dictionary = Gated(n_features=n, **(options or {})).sized(d, compute_dtype=np.dtype(dtype).name)
    generator = np.random.default_rng(seed)
    params = {
        name: jnp.array(np.asarray(value) + 0.3 * generator.normal(size=value.shape), dtype)
        for name, value in dictionary.init(jax.random.key(seed)).items()
    }
    x = jnp.array(generator.normal(size=(rows, d)), dtype)
    return dictionary, dictionary.project(params), Batch(x, x, jnp.array(np.arange(rows) % 3 != 1, dtype))


def test_by_hand():
    # x - b_dec = [[1, 2], [0, 0]]; times W_enc: [[2, -2, 1], [0, 0, 0]].
    x = np.array([[2.0, 1.0], [1.0, -1.0]], np.float32)
    params = {
        "W_enc": np.array([[2.0, 0.0, 1.0], [0.0, -1.0, 0.0]], np.float32),
        "W_dec": np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32),
        "b_dec": np.array([1.0, -1.0], np.float32),
        "b_gate": np.array([-1.0, 1.0, -1.0], np.float32),
        "b_mag": np.array([0.5, 3.0, 1.0], np.float32),
        "r_mag": np.log(np.array([2.0, 1.0, 0.5], np.float32)),
    }
    # Gates [[1, -1, 0], [-1, 1, -1]], magnitudes ReLU([[4.5, 1, 1.5], [0.5, 3, 1]]): a gate at 0 is shut.
    codes = [[4.5, 0, 0], [0, 3, 0]]
    dictionary = Gated(n_features=3).sized(2)
    np.testing.assert_allclose(dictionary.encode(params, x), codes, rtol=1e-6)
    losses = dictionary.loss(params, Batch(x, x, np.ones(2, np.float32)), context(0.5))
    # x_hat - b_dec: [4.5, 0] and [0, 3]; errors (3.5, -2) and (0, 3).
    np.testing.assert_allclose(losses.terms["reconstruction"], (3.5**2 + 4 + 9) / 2, rtol=1e-6)
    np.testing.assert_allclose(losses.terms["l1"], 0.5 * (1 + 1) / 2, rtol=1e-6)
    # From the open gates alone: [1, 0] and [0, 1]; errors (0, -2) and (0, 1).
    np.testing.assert_allclose(losses.terms["auxiliary"], (4 + 1) / 2, rtol=1e-6)
    np.testing.assert_array_equal(losses.fired, [1, 1, 0])
    assert losses.terms.keys() == TERMS


def test_a_shut_gate_hides_any_magnitude_and_an_open_one_does_not_scale_it():
    dictionary, params, batch = small(dtype=np.float32)
    shut = dictionary.encode({**params, "b_gate": jnp.full(5, -100.0)}, batch.x)
    assert not np.any(shut)
    one, other = (dictionary.encode({**params, "b_gate": jnp.full(5, bias)}, batch.x) for bias in (50.0, 500.0))
    np.testing.assert_array_equal(one, other)
    assert np.any(one)


def test_at_the_start_it_is_an_l1_autoencoder():
    dictionary = Gated(n_features=6, encoder_scale=0.25).sized(3)
    params = dictionary.init(jax.random.key(0))
    assert params.keys() == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    np.testing.assert_allclose(params["W_enc"], 0.25 * params["W_dec"].T, rtol=1e-6)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(dictionary.encode(params, x), np.maximum(x @ params["W_enc"], 0), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"decoder_bias": False}, {"centring": False}])
def test_gradients_of_every_term_against_finite_differences(x64, options):
    dictionary, params, batch = small(options)
    here = context(0.7, jnp.float64)
    held = {name: params[name] for name in ("W_dec", "b_dec") if name in params}

    @jax.jit
    def terms(params):
        return dictionary.loss(params, batch, here).terms

    @jax.jit
    def auxiliary(params):
        # With the decoder a constant, written out once more.
        gate, _ = dictionary.gates_and_codes(params, batch.x)
        error = jax.nn.relu(gate) @ held["W_dec"] + held.get("b_dec", 0.0) - batch.x
        return jnp.sum(jnp.sum(error**2, axis=1) * batch.weight) / jnp.sum(batch.weight)

    grads = jax.jit(jax.jacrev(terms))(params)
    assert grads.keys() == TERMS
    params = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(auxiliary(params), terms(params)["auxiliary"], rtol=1e-12)
    for name, value in params.items():
        for index in np.ndindex(*value.shape):
            shift = np.zeros_like(value)
            shift[index] = 1e-6
            near = [{**params, name: value + sign * shift} for sign in (1, -1)]
            above, below = ({**terms(moved), "auxiliary": auxiliary(moved)} for moved in near)
            for term in TERMS:
                numeric = (above[term] - below[term]) / 2e-6
                np.testing.assert_allclose(
                    grads[term][name][index], numeric, atol=1e-7, err_msg=f"{term} {name}{index}"
                )


def test_each_term_trains_what_it_should():
    dictionary, params, batch = small(dtype=np.float32, rows=40)
    grads = jax.jacrev(lambda params: dictionary.loss(params, batch, context(0.7)).terms)(params)
    trained = {term: {name for name, grad in of.items() if np.any(grad != 0)} for term, of in grads.items()}
    # The gate's step passes nothing on; the auxiliary decoder is constant; b_dec still centres.
    assert trained == {
        "reconstruction": {"W_enc", "W_dec", "b_dec", "b_mag", "r_mag"},
        "l1": {"W_enc", "b_gate", "b_dec"},
        "auxiliary": {"W_enc", "b_gate", "b_dec"},
    }
    uncentred = Gated(n_features=5, centring=False).sized(3)
    grads = jax.grad(lambda params: uncentred.loss(params, batch, context(0.7)).terms["auxiliary"])(params)
    assert not np.any(grads["b_dec"])


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_training_lowers_the_error_and_compiles_once(compute_dtype):
    d = 16
    dictionary = Gated(expansion=2, l1=0.3).sized(d, compute_dtype=compute_dtype)
    optimisation = adam(3e-3)
    settings = settings_for(dictionary, optimisation)
    state = init_state(dictionary, optimisation.transform, Normaliser(jnp.zeros(d), jnp.ones(())), 0, settings)
    step = make_step(dictionary, optimisation, Schedule(), 250, dead_window=10_000)
    generator = np.random.default_rng(0)
    directions, first = generator.normal(size=(24, d)), None
    for _ in range(250):
        codes = generator.random((256, 24)) * (generator.random((256, 24)) < 0.1)
        state, metrics = step(state, jnp.array(codes @ directions, jnp.float32), jnp.ones(256))
        first = first or float(metrics["fvu"])
    assert float(metrics["fvu"]) < min(0.25, 0.25 * first)
    assert step._cache_size() == 1
    assert all(np.any(state.params[name] != 0) for name in ("b_gate", "b_mag", "r_mag"))
    np.testing.assert_allclose(np.linalg.norm(state.params["W_dec"], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("options", "flag"), [({"l1": -1.0}, "--l1"), ({"encoder_scale": -1.0}, "--encoder-scale")])
def test_impossible_choices_are_refused(options, flag):
    with pytest.raises(InputError, match=flag):
        Gated(**options)
