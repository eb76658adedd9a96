"""The Jacobian pair: its loss by hand, its gradient against autodiff and finite differences, training with the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.connectors.folded_mlp import FoldedMlp
from sparse_jax.connectors.jacobian_sae import jacobian_pair, joint_normaliser, split_params, trained_sides
from sparse_jax.dictionaries import Batch, TopK, load, save
from sparse_jax.errors import InputError
from sparse_jax.training.schedules import Schedule
from sparse_jax.training.state import init_state, settings_for
from sparse_jax.training.step import adam, make_step
from tests.dictionaries.k_sparse import context, loss, value_and_grad

D_X, D_Y, D_MLP, N_X, N_Y, K = 5, 4, 6, 12, 10, 3


def pair(at="reconstruction", every=1, jacobian=0.7, k=K):
    dtype = "float64" if jax.config.jax_enable_x64 else "float32"
    inputs, outputs = (TopK(n_features=n, k=k).sized(d, compute_dtype=dtype) for n, d in ((N_X, D_X), (N_Y, D_Y)))
    return jacobian_pair(inputs, outputs, "gelu", at=at, every=every, jacobian=jacobian)


def mlp(dtype=np.float64, seed=4):
    shapes = ((D_X, 1, D_MLP), (1, D_MLP), (D_MLP, D_Y), (D_Y,))
    generator = np.random.default_rng(seed)
    return FoldedMlp(*(jnp.array(generator.normal(size=shape), dtype) for shape in shapes), "gelu")


def case(dictionary, dtype=np.float64, rows=8, seed=0):
    """Parameters away from zero, and a batch in which some rows do not count."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(dictionary.init, jax.random.key(0))
    params = {name: jnp.array(0.6 * generator.normal(size=s.shape), dtype) for name, s in shapes.items()}
    params = dictionary.with_mlp(params, mlp(dtype))
    x = jnp.array(generator.normal(size=(rows, D_X)), dtype)
    both = jnp.concatenate([x, mlp(dtype)(x) + 0.1], axis=1)
    return params, Batch(both, both, jnp.array(np.arange(rows) % 4 != 1, dtype))


def mean_l1_by_loops(dictionary, params, batch):
    """The penalty over its coefficient, feature by feature: slopes by central differences through the real encoder."""
    own, made = split_params(params), mlp()
    x, y = (np.asarray(part) for part in dictionary.split(batch.x))
    codes = np.asarray(dictionary.inputs.encode(own["in"], jnp.array(x)))
    outputs = np.asarray(dictionary.outputs.encode(own["out"], jnp.array(y)))
    weight, total = np.asarray(batch.weight)[:: dictionary.every], 0.0
    step = 1e-6

    def preactivations(x):
        y = np.asarray(made(jnp.array(x)[None]))[0]
        return (y - own["out"]["b_dec"]) @ own["out"]["W_enc"] + own["out"]["b_enc"]

    for row in range(0, len(x), dictionary.every):
        place = x[row] if dictionary.at == "input" else codes[row] @ own["in"]["W_dec"] + own["in"]["b_dec"]
        for i in np.flatnonzero(codes[row]):
            move = step * np.asarray(own["in"]["W_dec"][i])
            slopes = (preactivations(place + move) - preactivations(place - move)) / (2 * step)
            total += np.asarray(batch.weight)[row] * np.abs(np.asarray(slopes)[outputs[row] > 0]).sum()
    return total / weight.sum() / K**2


@pytest.mark.parametrize(("at", "every"), [("reconstruction", 1), ("input", 2)])
def test_the_penalty_is_the_mean_absolute_slope_between_active_features(x64, at, every):
    dictionary = pair(at, every)
    params, batch = case(dictionary)
    losses = loss(dictionary, params, batch, context(dictionary, dtype=jnp.float64))
    assert set(losses.terms) == {"reconstruction_in", "aux_k_in", "reconstruction_out", "aux_k_out", "jacobian"}
    due = 0.7 * mean_l1_by_loops(dictionary, params, batch)
    assert due > 0.01
    np.testing.assert_allclose(losses.terms["jacobian"], due, rtol=1e-6)


@pytest.mark.parametrize(("at", "every"), [("reconstruction", 2), ("input", 1)])
def test_the_gradient_by_hand_is_autodiffs(x64, at, every):
    dictionary = pair(at, every)
    params, batch = case(dictionary)
    here = context(dictionary, dead=(1, N_X + 2), dtype=jnp.float64)
    value, losses, grads = value_and_grad(dictionary, params, batch, here)
    due_value, due, due_grads = jax.jit(super(type(dictionary), dictionary).value_and_grad)(params, batch, here)
    np.testing.assert_allclose(value, due_value, rtol=1e-12)
    assert set(losses.terms) == set(due.terms)
    for name, term in due.terms.items():
        assert term > 0
        np.testing.assert_allclose(losses.terms[name], term, rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(losses.fired, due.fired)
    np.testing.assert_allclose(losses.y_hat, due.y_hat, atol=1e-12)
    assert set(grads) == set(due_grads) == set(params) - set(dictionary.frozen)
    for name, grad in due_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=1e-12, err_msg=name)


def test_the_penaltys_gradient_is_that_of_finite_differences(x64):
    """In every parameter, the active sets being the same on both sides of a difference."""
    dictionary = pair()
    params, batch = case(dictionary)
    here = context(dictionary, dtype=jnp.float64)
    term = jax.jit(lambda params: dictionary.penalty(params, batch, here))
    grads = jax.jit(jax.grad(term))(params)
    moving = {name: np.any(grad != 0) for name, grad in grads.items()}
    assert all(moving[name] for name in ("in_W_enc", "in_W_dec", "in_b_dec", "out_W_enc"))
    assert not any(moving[name] for name in ("out_W_dec", "out_b_enc", "out_b_dec"))
    params = jax.tree.map(np.asarray, params)
    for name in split_names(dictionary):
        for index in list(np.ndindex(*params[name].shape))[::5]:
            step = np.zeros_like(params[name])
            step[index] = 1e-6
            above, below = (float(term({**params, name: params[name] + sign * step})) for sign in (1, -1))
            np.testing.assert_allclose(grads[name][index], (above - below) / 2e-6, atol=1e-7, err_msg=f"{name}{index}")


def split_names(dictionary):
    return [name for name in jax.eval_shape(dictionary.init, jax.random.key(0)) if name not in dictionary.frozen]


def state_of(dictionary, coefficient, rate=3e-3):
    optimisation = adam(rate)
    normaliser = joint_normaliser(*(Normaliser(jnp.zeros(d), jnp.ones(())) for d in (D_X, D_Y)))
    settings = settings_for(dictionary, optimisation)
    settings = settings._replace(coefficients={**settings.coefficients, "jacobian": coefficient})
    state = init_state(dictionary, optimisation.transform, normaliser, 0, settings)
    return dataclasses.replace(state, params=dictionary.with_mlp(state.params, mlp(np.float32)))


def test_training_with_the_penalty_makes_the_jacobian_smaller_with_one_compiled_step(monkeypatch):
    dictionary = pair(jacobian=0.0)
    traced = []
    original = type(dictionary).value_and_grad
    monkeypatch.setattr(type(dictionary), "value_and_grad", lambda *given: (traced.append(1), original(*given))[1])
    step = make_step(dictionary, adam(3e-3), Schedule(), 150, 10_000)
    ended = {}
    for coefficient in (0.0, 5.0):
        state = state_of(dictionary, coefficient)
        generator = np.random.default_rng(1)
        for _ in range(150):
            x = jnp.array(generator.normal(size=(32, D_X)), jnp.float32)
            both = jnp.concatenate([x, mlp(np.float32)(x)], axis=1)
            state, metrics = step(state, both, jnp.ones(32))
        ended[coefficient] = dictionary, state, both, metrics
        np.testing.assert_array_equal(state.params["mlp_W_in"], mlp(np.float32).W_in)
        np.testing.assert_allclose(np.linalg.norm(state.params["in_W_dec"], axis=1), 1, rtol=1e-5)
    assert len(traced) == 1
    l1 = {}
    for coefficient, (dictionary, state, both, metrics) in ended.items():
        batch = Batch(both, both, jnp.ones(32))
        here = context(dataclasses.replace(dictionary, jacobian=1.0))
        l1[coefficient] = float(dictionary.penalty(state.params, batch, here))
        assert float(metrics["fvu"]) < 0.7
    assert ended[0.0][3]["jacobian"] == 0 < ended[5.0][3]["jacobian"]
    assert l1[5.0] < 0.6 * l1[0.0]


def test_the_sides_are_ordinary_dictionaries_that_can_be_saved(tmp_path):
    dictionary = pair()
    params, batch = case(dictionary, np.float32)
    into, out = Normaliser(jnp.ones(D_X), jnp.array(2.0)), Normaliser(-jnp.ones(D_Y), jnp.array(3.0))
    both = joint_normaliser(into, out)
    sides = trained_sides(dictionary, params, both)
    codes = dictionary.split_features(dictionary.encode(params, both.apply(batch.x)))
    y_hat = dictionary.split(both.undo(dictionary.decode(params, jnp.concatenate(codes, 1))))
    for name, side, x, own, due in zip(("in", "out"), sides, dictionary.split(batch.x), codes, y_hat):
        save(tmp_path / name, side, {"site": f"mlp_{name}.0"})
        again = load(tmp_path / name)
        assert again.dictionary == side.dictionary
        np.testing.assert_allclose(again.encode(x), own, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(again.reconstruct(x), due, rtol=1e-5, atol=1e-5)
    directions = dictionary.directions(params)
    assert directions.shape == (N_X + N_Y, D_X + D_Y)
    np.testing.assert_array_equal(directions[N_X:, D_X:], params["out_W_dec"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 20}, "--k 20: the inputs have 12 features"),
        ({"jacobian": -1.0}, "give a coefficient of at least 0"),
        ({"every": 0}, "every 1st row or fewer"),
        ({"at": "output"}, "reconstruction or input"),
    ],
)
def test_what_cannot_be_a_pair_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        pair(**change)


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="another k or AuxK"):
        jacobian_pair(TopK(n_features=8, k=2).sized(4), TopK(n_features=8, k=3).sized(4), "gelu")
    with pytest.raises(InputError, match="the outputs of a Jacobian pair"):
        jacobian_pair(TopK(n_features=8, k=2).sized(4), TopK(n_features=8, k=2), "gelu")
