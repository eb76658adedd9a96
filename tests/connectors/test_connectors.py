"""One test of everything that every registered connector promises."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_jax.connectors.autoencoder
import sparse_jax.connectors.deep_mlp
import sparse_jax.connectors.mlp
import sparse_jax.connectors.relu_linear  # noqa: F401
from sparse_jax.connectors.connector import CONNECTORS, Trained, connector_from_json, register_connector
from sparse_jax.connectors.connector_files import load_connector, read_connector_card, save_connector
from sparse_jax.connectors.linear import Linear
from sparse_jax.dictionaries import DICTIONARIES
from sparse_jax.dictionaries.protocol import Batch, Context, to_json
from sparse_jax.errors import InputError
from tests.connectors.small_pairs import forms, random_codes

ROWS, D_IN, D_OUT, WIDTH = 30, 40, 24, 7


# Every kind, and one of each shape without biases.
CASES = [(kind, True) for kind in sorted(CONNECTORS)] + [("linear", False), ("deep-mlp", False)]


@pytest.fixture(params=CASES, ids=lambda case: case[0] + ("" if case[1] else ", no bias"))
def connector(request):
    kind, with_bias = request.param
    return CONNECTORS[kind](n_features=WIDTH, with_bias=with_bias).sized(D_IN, D_OUT)


@pytest.fixture
def params(connector):
    return moved(connector)


def moved(connector):
    """Parameters away from where training starts, some weights 0: the penalty's gradient is 0 there by convention."""
    rng = np.random.default_rng(0)
    params = {
        name: value + jnp.array((0.1 + 0.4 * (name in connector.frozen)) * rng.random(value.shape), jnp.float32)
        for name, value in connector.init(jax.random.key(0)).items()
    }
    return {name: value.at[0].set(0) if name.startswith("W_") else value for name, value in params.items()}


def batch_of(x_form, y_form):
    """One and the same batch, with inputs and targets in a form."""
    rng = np.random.default_rng(1)
    x, y = random_codes(rng, ROWS, D_IN, 4), random_codes(rng, ROWS, D_OUT, 3)
    weight = (rng.random(ROWS) < 0.7).astype(np.float32)
    batch = Batch(forms(x, D_IN)[x_form], forms(y, D_OUT)[y_form], weight)
    return jax.tree.map(jnp.array, batch)


def both(form):
    return batch_of(form, form)


value_and_grad = jax.jit(lambda connector, *given: connector.value_and_grad(*given), static_argnums=0)


def context(alpha=0.1, hidden_l1=0.2):
    zero, values = jnp.zeros((), jnp.int32), {"alpha": jnp.float32(alpha), "hidden_l1": jnp.float32(hidden_l1)}
    return Context(values, zero, jax.random.key(0), zero, zero)


def assert_close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance}), one, other)


def test_parameters_and_shapes(connector, params):
    first = connector.init(jax.random.key(0))
    assert {value.dtype for value in first.values()} == {jnp.dtype(jnp.float32)}
    assert_close(first, connector.init(jax.random.key(0)), rtol=0, atol=0)
    assert set(connector.frozen) < first.keys()
    assert set(connector.reads_writes) == {name for name in first if name.startswith("W_")}
    assert ("b_dec" in first) == connector.with_bias
    for batch in (both("dense"), both("sparse")):
        y_hat, hidden = connector.predict(params, batch.x), connector.hidden(params, batch.x)
        assert (y_hat.shape, y_hat.dtype) == ((ROWS, D_OUT), jnp.float32)
        assert (hidden.shape, hidden.dtype) == ((ROWS, connector.n_features), jnp.float32)
    assert connector.bias(params).shape == (D_OUT,)
    if isinstance(connector, Linear):
        assert connector.weights(params).shape == (D_IN, D_OUT)
    else:
        with pytest.raises(InputError, match="no single matrix"):
            connector.weights(params)


def test_all_forms_of_codes_give_the_same(connector, params):
    """Values and gradients by hand (moments, gathers) are those of autodiff on dense codes."""
    value, losses, grads = dense = value_and_grad(connector, params, both("dense"), context())
    for pair in (("two-way", "two-way"), ("sparse", "sparse"), ("dense", "two-way")):
        other = value_and_grad(connector, params, batch_of(*pair), context())
        assert_close(other, dense, rtol=1e-4, atol=1e-5, err_msg=str(pair))
    np.testing.assert_allclose(value, sum(losses.terms.values()), rtol=1e-6)
    assert grads.keys() == params.keys() - set(connector.frozen)
    assert all(np.any(np.asarray(grad) != 0) for grad in grads.values())


@pytest.mark.parametrize("kind", ["relu-linear", "deep-mlp", "autoencoder"])
def test_gradients_by_finite_differences(kind, x64):
    """Those by hand: of gathers in `relu_linear`, of moments in the others."""
    connector = CONNECTORS[kind](n_features=WIDTH).sized(D_IN, D_OUT)
    params = moved(connector)
    params = {name: jnp.array(np.asarray(value), jnp.float64) for name, value in params.items()}
    batch = both("two-way")
    as64 = lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a  # noqa: E731
    batch, ctx = jax.tree.map(as64, batch), context()
    ctx = ctx._replace(coefficients=jax.tree.map(as64, ctx.coefficients))
    loss = jax.jit(lambda params: sum(connector.loss(params, batch, ctx).terms.values()))
    _, _, grads = value_and_grad(connector, params, batch, ctx)
    rng = np.random.default_rng(2)
    for name, grad in grads.items():
        moves = rng.normal(size=grad.shape) * (np.asarray(params[name]) != 0)
        up, down = (loss({**params, name: params[name] + sign * 1e-6 * moves}) for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2e-6, np.sum(np.asarray(grad) * moves), rtol=1e-5, atol=1e-7)


def test_the_smooth_part_lacks_only_the_weights_penalty(connector, params):
    batch = both("two-way")
    terms, fired, grads = jax.jit(connector.smooth_value_and_grad)(params, batch, context())
    _, losses, whole = value_and_grad(connector, params, batch, context(alpha=0.0))
    assert_close((terms, fired, grads), ({n: losses.terms[n] for n in terms}, losses.fired, whole))
    assert losses.terms.keys() - terms.keys() == {"weight_l1"}


def test_scaled_units_give_the_same_loss(connector, params):
    """x / input_norm and y / target_scale with weights in those units: the same terms, and back to the same weights."""
    batch = both("dense")
    scaled = connector.in_scaled_units(params)
    in_units = batch._replace(x=batch.x / params["input_norm"], target=batch.target / params["target_scale"])
    assert_close(connector.loss(scaled, in_units, context()).terms, connector.loss(params, batch, context()).terms)
    y_hat = connector.predict(scaled, in_units.x) * params["target_scale"]
    assert_close(y_hat, connector.predict(params, batch.x), rtol=1e-4, atol=1e-5)
    assert_close(connector.in_own_units(scaled, params["input_norm"], params["target_scale"]), params)


def test_pure_and_masked(connector, params):
    batch = both("dense")
    before = jax.tree.map(np.copy, (params, batch))
    value = value_and_grad(connector, params, batch, context())
    assert_close(value_and_grad(connector, params, batch, context()), value, rtol=0, atol=0)
    assert_close((params, batch), before, rtol=0, atol=0)
    huge = jnp.where((batch.weight == 0)[:, None], 1e6, batch.x)
    other = value_and_grad(connector, params, batch._replace(x=huge), context())
    assert_close((other[0], other[1].fired, other[2]), (value[0], value[1].fired, value[2]))


def test_a_new_coefficient_compiles_nothing(connector, params):
    traced = []

    @jax.jit
    def step(params, batch, ctx):
        traced.append(1)
        return connector.value_and_grad(params, batch, ctx)[0]

    values = {float(step(params, both("two-way"), context(alpha))) for alpha in (0.0, 0.1, 0.3)}
    assert len(values) == 3
    assert len(traced) == 1


def test_json_and_files(connector, params, tmp_path):
    again = connector_from_json(json.loads(json.dumps(to_json(connector))))
    assert (again, type(again), hash(again)) == (connector, type(connector), hash(connector))
    trained = Trained(connector, params)
    save_connector(tmp_path / "one", trained, {"seed": 3})
    loaded = load_connector(tmp_path / "one")
    assert loaded.connector == connector
    assert_close(loaded.params, params, rtol=0, atol=0)
    assert read_connector_card(tmp_path / "one")["provenance"] == {"seed": 3}
    x = both("sparse").x
    assert_close(jax.jit(Trained.predict)(loaded, x), trained.predict(x))


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match="kind 'gone' is not known"):
        connector_from_json({"kind": "gone"})
    with pytest.raises(InputError, match="do not fit"):
        connector_from_json({"kind": "linear", "colour": 3})
    with pytest.raises(InputError, match="holds no connector"):
        load_connector(tmp_path)
    with pytest.raises(InputError, match="cannot be negative"):
        Linear(alpha=-1.0)
    with pytest.raises(ValueError, match="two connectors"):
        register_connector("linear")(CONNECTORS["mlp"])
    linear = Linear().sized(3, 2)
    save_connector(tmp_path, Trained(linear, linear.init(jax.random.key(0))), {})
    card = tmp_path / "connector.json"
    card.write_text(card.read_text().replace('"d_out": 2', '"d_out": 5'))
    with pytest.raises(InputError, match="does not fit"):
        load_connector(tmp_path)


def test_connectors_are_no_dictionaries():
    """They are not among the subcommands of `train_sae`."""
    assert not CONNECTORS.keys() & DICTIONARIES.keys() - {"linear"}
    assert not any(issubclass(cls, tuple(CONNECTORS.values())) for cls in DICTIONARIES.values())
    assert all(dataclasses.is_dataclass(cls) for cls in CONNECTORS.values())
