"""The Lp penalty: answers worked by hand, gradients against finite differences, finite at zero, and p-annealing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Batch, Context
from sparse_jax.dictionaries.lp import EPSILON, Lp, lp_sparsity
from sparse_jax.errors import InputError
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for


def context(l1, p, dtype=jnp.float32):
    return Context(
        coefficients={"l1": jnp.array(l1, dtype), "p": jnp.array(p, dtype)},
        age=jnp.zeros(1, jnp.int32),
        key=jax.random.key(0),
        step=jnp.int32(0),
        dead_window=jnp.int32(1000),
    )


def small(dtype=np.float32, rows=9, d=3, n=5, **options):
    """A dictionary with every trained parameter away from zero, and a batch with masked rows."""
    dictionary = Lp(n_features=n, **options).sized(d, compute_dtype=np.dtype(dtype).name)
    generator = np.random.default_rng(0)
    params = {
        name: jnp.array(
            np.asarray(value) + (name not in dictionary.frozen) * 0.3 * generator.normal(size=value.shape), dtype
        )
        for name, value in dictionary.init(jax.random.key(0)).items()
    }
    x = jnp.array(generator.normal(size=(rows, d)), dtype)
    return dictionary, dictionary.project(params), Batch(x, x, jnp.array(np.arange(rows) % 3 != 1, dtype))


def test_sparsity_by_hand():
    codes = jnp.array([[4.0, 0.0, 1.0], [0.25, 9.0, 0.0]])
    np.testing.assert_allclose(lp_sparsity(codes, jnp.float32(0.5)), [2 + 1, 0.5 + 3], rtol=2e-3)
    np.testing.assert_array_equal(lp_sparsity(codes, jnp.float32(1.0)), [5, 9.25])


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_slope_is_finite_at_zero_and_right_above(x64, p):
    slope = jax.vmap(jax.grad(lambda c: lp_sparsity(c[None], jnp.float64(p))))
    np.testing.assert_allclose(slope(jnp.zeros(1)), EPSILON ** (p - 1), rtol=1e-9)
    large = jnp.array([1.0, 3.0, 10.0])
    np.testing.assert_allclose(slope(large), p * large ** (p - 1), rtol=1e-2)
    grid = jnp.linspace(0, 2, 2001)
    assert np.all(slope(grid) > 0)
    above, below = (lp_sparsity(grid[1:, None] + step, jnp.float64(p)) for step in (1e-7, -1e-7))
    np.testing.assert_allclose(slope(grid[1:]), (above - below) / 2e-7, rtol=1e-5)


def test_with_p_1_it_is_l1():
    dictionary, params, batch = small(p=1.0)
    assert dictionary.frozen == ()
    value, losses, grads = dictionary.value_and_grad(params, batch, context(0.7, 1.0))
    other = L1(n_features=5).sized(3)
    value_l1, _, grads_l1 = other.value_and_grad(params, batch, context(0.7, 1.0))
    assert losses.terms.keys() == {"reconstruction", "lp"}
    np.testing.assert_allclose(value, value_l1, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, grads_l1)


@pytest.mark.parametrize("options", [{}, {"norm_weighted": True}, {"activation": "softplus"}, {"tied": True}])
def test_gradients_of_every_term_against_finite_differences(x64, options):
    dictionary, params, batch = small(np.float64, p=0.5, p_start=0.5, **options)
    here = context(0.7, 0.5, jnp.float64)
    terms = jax.jit(lambda params: dictionary.loss(params, batch, here).terms)
    grads = jax.jit(jax.jacrev(terms))(params)
    params = jax.tree.map(np.asarray, params)
    for name, value in params.items():
        for index in np.ndindex(*value.shape):
            shift = np.zeros_like(value)
            shift[index] = 1e-6
            above, below = (terms({**params, name: value + sign * shift}) for sign in (1, -1))
            for term, grad in grads.items():
                numeric = (above[term] - below[term]) / 2e-6
                np.testing.assert_allclose(grad[name][index], numeric, atol=1e-6, err_msg=f"{term} {name}{index}")


def test_the_strength_is_held_as_p_falls():
    dictionary, params, batch = small()
    assert (float(params["p_before"]), float(params["strength"])) == (1.0, 1.0)
    codes = np.asarray(dictionary.encode(params, batch.x))[np.asarray(batch.weight) > 0]
    start = dictionary.loss(params, batch, context(0.7, 1.0))
    np.testing.assert_allclose(start.terms["lp"], 0.7 * codes.sum(1).mean(), rtol=1e-5)
    for p in (0.9, 0.6, 0.2):
        losses = dictionary.loss(params, batch, context(0.7, p))
        # The same codes under a smaller p: the penalty keeps its value, its shape changes.
        np.testing.assert_allclose(losses.terms["lp"], start.terms["lp"], rtol=1e-5)
        np.testing.assert_allclose(losses.frozen["p_before"], p, rtol=1e-6)
        params = {**params, **losses.frozen}
    by_hand = codes.sum() / np.sum(codes * (codes + EPSILON) ** (0.2 - 1))
    np.testing.assert_allclose(params["strength"], by_hand, rtol=1e-4)
    # Other codes are penalised by the strength they find: it follows p alone.
    half = {**params, "W_enc": params["W_enc"] / 2, "b_enc": params["b_enc"] / 2}
    losses = dictionary.loss(half, batch, context(0.7, 0.2))
    np.testing.assert_allclose(losses.frozen["strength"], params["strength"], rtol=1e-6)


def test_the_strength_has_no_gradient_and_survives_an_empty_batch():
    dictionary, params, batch = small()
    held = float(dictionary.loss(params, batch, context(0.7, 0.5)).frozen["strength"])
    grads = jax.grad(lambda params: dictionary.loss(params, batch, context(0.7, 0.5)).terms["lp"])(params)
    plain, _, _ = small(hold_strength=False)
    alone = jax.grad(lambda params: plain.loss(params, batch, context(0.7, 0.5)).terms["lp"])(params)
    for name in params.keys() - set(dictionary.frozen):
        np.testing.assert_allclose(grads[name], held * alone[name], rtol=1e-4, atol=1e-6)
    empty = dictionary.loss(params, batch._replace(weight=jnp.zeros(9)), context(0.7, 0.5))
    assert float(empty.frozen["strength"]) == 1.0


def test_p_is_on_a_ramp_of_its_own():
    falling = Lp(p=0.3, anneal_begin=0.2, anneal_end=0.8)
    assert falling.coefficients == {"l1": falling.l1, "p": 0.3}
    assert tuple(falling.ramps["p"]) == (1.0, 0.2, 0.8)
    assert falling.frozen == ("p_before", "strength")
    assert Lp(p=0.5, p_start=0.5).ramps["p"].start is None
    assert Lp(hold_strength=False).frozen == ()


def test_annealed_training_lowers_the_error_and_compiles_once():
    d, total = 16, 250
    dictionary = Lp(expansion=2, l1=0.4, p=0.3).sized(d)
    optimisation = adam(3e-3)
    settings = settings_for(dictionary, optimisation)
    state = init_state(dictionary, optimisation.transform, Normaliser(jnp.zeros(d), jnp.ones(())), 0, settings)
    step = make_step(dictionary, optimisation, Schedule(), total, dead_window=10_000)
    generator = np.random.default_rng(0)
    directions, first = generator.normal(size=(24, d)), None
    for _ in range(total):
        codes = generator.random((256, 24)) * (generator.random((256, 24)) < 0.1)
        state, metrics = step(state, jnp.array(codes @ directions, jnp.float32), jnp.ones(256))
        first = first or {name: float(value) for name, value in metrics.items()}
    assert float(metrics["fvu"]) < min(0.25, 0.25 * first["fvu"])
    assert float(metrics["l0"]) < 0.8 * first["l0"]
    assert step._cache_size() == 1
    assert float(state.params["p_before"]) == pytest.approx(0.3)
    assert 0.1 < float(state.params["strength"]) < 1


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"p": 0.0}, "--p"),
        ({"p": 1.5}, "--p"),
        ({"p_start": 0.0}, "--p-start"),
        ({"anneal_begin": 0.5, "anneal_end": 0.5}, "--anneal-begin"),
        ({"anneal_end": 1.5}, "--anneal-end"),
        ({"l1": -1.0}, "--l1"),
    ],
)
def test_impossible_choices_are_refused(options, flag):
    with pytest.raises(InputError, match=flag):
        Lp(**options)
