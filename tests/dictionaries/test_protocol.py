"""One test of everything that every registered architecture promises."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import (
    DICTIONARIES,
    Batch,
    Context,
    Dictionary,
    Normalised,
    from_json,
    load,
    register,
    save,
    to_json,
)
from sparse_jax.errors import InputError

ROWS, D, N = 40, 8, 24


@pytest.fixture(params=sorted(DICTIONARIES))
def dictionary(request) -> Dictionary:
    """A small one of each kind, with a k, where it has one, that leaves some features out."""
    architecture = DICTIONARIES[request.param]
    has_k = "k" in {field.name for field in dataclasses.fields(architecture)}
    return architecture(n_features=N, **({"k": 4} if has_k else {})).sized(D)


@pytest.fixture
def params(dictionary):
    """Parameters a little away from where training starts, where biases are zero and gradients may vanish."""
    params = dictionary.init(jax.random.key(0))
    generator = np.random.default_rng(0)
    moved = {
        name: value + jnp.array(0.1 * generator.normal(size=value.shape), jnp.float32)
        for name, value in params.items()
        if name not in dictionary.frozen
    }
    return dictionary.project({**params, **moved})


@pytest.fixture
def batch():
    generator = np.random.default_rng(1)
    x = jnp.array(generator.normal(size=(ROWS, D)), jnp.float32)
    return Batch(x, x, jnp.array(generator.random(ROWS) < 0.7, jnp.float32))


def context(dictionary, scale=1.0, step=3):
    return Context(
        coefficients={name: jnp.float32(scale * value) for name, value in dictionary.coefficients.items()},
        age=jnp.zeros(N, jnp.int32),
        key=jax.random.key(2),
        step=jnp.int32(step),
        dead_window=jnp.int32(1000),
    )


def assert_same(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 0, "atol": 0, **tolerance}), one, other)


def test_parameters(dictionary):
    params = dictionary.init(jax.random.key(0))
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.float32)}
    assert set(dictionary.frozen) <= params.keys()
    assert dictionary.labels.keys() <= params.keys() - set(dictionary.frozen)
    assert_same(params, dictionary.init(jax.random.key(0)))
    assert_same(params, dictionary.project(params), atol=1e-6)


def test_shapes_and_dtypes(dictionary, params, batch):
    codes = dictionary.encode(params, batch.x)
    y_hat = dictionary.decode(params, codes, batch.x)
    assert (codes.shape, y_hat.shape) == ((ROWS, N), (ROWS, D))
    assert codes.dtype == y_hat.dtype == jnp.float32
    losses = dictionary.loss(params, batch, context(dictionary))
    assert (losses.y_hat.shape, losses.y_hat.dtype) == ((ROWS, D), jnp.float32)
    assert (losses.fired.shape, losses.fired.dtype) == ((N,), jnp.int32)
    assert losses.frozen.keys() == set(dictionary.frozen)
    for name, value in losses.frozen.items():
        assert (value.shape, value.dtype) == (params[name].shape, jnp.float32)


def test_pure(dictionary, params, batch):
    params, batch = jax.tree.map(np.array, (params, batch))
    before = jax.tree.map(np.copy, (params, batch))

    def everything():
        codes = dictionary.encode(params, batch.x)
        value, losses, grads = dictionary.value_and_grad(params, batch, context(dictionary))
        return (
            codes,
            dictionary.decode(params, codes, batch.x),
            dictionary.loss(params, batch, context(dictionary)),
            (value, losses, grads),
            dictionary.tangent(params, grads),
            dictionary.project(params),
        )

    assert_same(everything(), everything())
    assert_same((params, batch), before)


def test_static_and_json(dictionary):
    again = from_json(json.loads(json.dumps(to_json(dictionary))))
    assert again == dictionary
    assert type(again) is type(dictionary)
    assert hash(again) == hash(dictionary)
    assert dataclasses.replace(dictionary, n_features=N + 1) != dictionary


def test_saved_and_loaded(dictionary, params, batch, tmp_path):
    normaliser = Normaliser(jnp.arange(D, dtype=jnp.float32), jnp.float32(1.7))
    trained = Normalised(dictionary, params, normaliser)
    save(tmp_path / "one", trained, {"seed": 3})
    again = load(tmp_path / "one")
    assert again.dictionary == dictionary
    assert again.params.keys() == params.keys()
    assert_same(again, trained)
    assert {value.dtype for value in jax.tree.leaves(again)} == {jnp.dtype(jnp.float32)}
    assert_same(again.encode(batch.x), trained.encode(batch.x))


def test_directions_are_what_decoding_adds(dictionary, params, batch):
    directions = dictionary.directions(params)
    assert directions.shape == (N, D)
    codes = dictionary.encode(params, batch.x)
    nothing = dictionary.decode(params, jnp.zeros_like(codes), batch.x)
    np.testing.assert_allclose(dictionary.decode(params, codes, batch.x) - nothing, codes @ directions, atol=1e-5)


def test_the_objective_is_the_sum_of_finite_terms(dictionary, params, batch):
    value, losses, grads = dictionary.value_and_grad(params, batch, context(dictionary))
    assert all(np.isfinite(term) and term.shape == () for term in losses.terms.values())
    np.testing.assert_allclose(value, sum(losses.terms.values()), rtol=1e-6)
    assert grads.keys() == params.keys() - set(dictionary.frozen)
    for name, grad in grads.items():
        assert (grad.shape, grad.dtype) == (params[name].shape, jnp.float32)
        assert np.isfinite(grad).all()
        assert np.any(grad != 0), f"{name} is never trained"
    tangent = dictionary.tangent(params, grads) if grads else grads
    assert tangent.keys() == grads.keys()


def test_gradients_are_those_of_autodiff(dictionary, params, batch):
    """Holds for every architecture whose `value_and_grad` is its own."""
    made = dictionary.value_and_grad(params, batch, context(dictionary))
    assert_same(made, Dictionary.value_and_grad(dictionary, params, batch, context(dictionary)), rtol=1e-4, atol=1e-5)


def test_masked_rows_change_nothing(dictionary, params, batch):
    masked = (batch.weight == 0)[:, None]
    huge = jnp.where(masked, 1e15, batch.x)
    value, losses, grads = dictionary.value_and_grad(params, batch, context(dictionary))
    value_huge, losses_huge, grads_huge = dictionary.value_and_grad(
        params, Batch(huge, huge, batch.weight), context(dictionary)
    )
    assert_same(
        (value_huge, losses_huge.terms, losses_huge.fired, losses_huge.frozen, grads_huge),
        (value, losses.terms, losses.fired, losses.frozen, grads),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_batch_with_nothing_in_it_is_harmless(dictionary, params, batch):
    value, losses, grads = dictionary.value_and_grad(
        params, batch._replace(weight=jnp.zeros(ROWS)), context(dictionary)
    )
    assert_same((value, losses.fired, grads), jax.tree.map(jnp.zeros_like, (value, losses.fired, grads)))


def test_projection_is_idempotent(dictionary, params):
    once = dictionary.project(jax.tree.map(lambda value: 3 * value, params))
    assert once.keys() == params.keys()
    assert_same(dictionary.project(once), once, rtol=1e-6)


def test_other_coefficients_compile_nothing_new(dictionary, params, batch):
    traced = []

    @jax.jit
    def step(params, batch, context):
        traced.append(1)
        value, losses, grads = dictionary.value_and_grad(params, batch, context)
        return value, losses, dictionary.tangent(params, grads) if grads else grads

    values = [step(params, batch, context(dictionary, scale, i))[0] for i, scale in enumerate((1.0, 0.0, 0.5))]
    assert len(traced) == 1
    if dictionary.coefficients:
        assert len({float(value) for value in values}) == 3


@pytest.mark.parametrize("kind", sorted(DICTIONARIES))
def test_sizes_come_from_the_site(kind):
    architecture = DICTIONARIES[kind]
    assert architecture(expansion=3).sized(D).n_features == 3 * D
    assert (architecture(n_features=5).sized(D, 7).d_in, architecture(n_features=5).sized(D, 7).d_out) == (D, 7)
    assert architecture(n_features=5).sized(D).d_out == D
    with pytest.raises(InputError, match="positive"):
        architecture(expansion=0).sized(D)


def test_what_a_file_may_not_say():
    with pytest.raises(InputError, match="kind 'gone' is not known"):
        from_json({"kind": "gone"})
    with pytest.raises(InputError, match="do not fit"):
        from_json({"kind": "l1", "colour": 3})


def test_a_kind_is_registered_once():
    with pytest.raises(ValueError, match="two dictionaries"):
        register("l1")(DICTIONARIES["pca"])
    assert DICTIONARIES["pca"].kind == "pca"
