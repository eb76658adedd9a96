"""L1's gradient written by hand: equal to autodiff's and to finite differences for every combination of options."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import L1, Batch, Context, Dictionary
from sparse_jax.dictionaries import l1 as l1_module
from sparse_jax.dictionaries.lp import Lp
from tests.dictionaries.by_hand import (
    assert_as_close_as_autodiff,
    assert_finite_differences,
    assert_same,
    by_autodiff,
    in_small_blocks,
    normal_batch,
    relative_error,
    shifted,
)

D, N, ROWS = 3, 6, 20
NAMES = ("tied", "norm_weighted", "decoder_bias", "centring")
combinations = pytest.mark.parametrize("on", list(itertools.product((False, True), repeat=4)), ids=str)
activations = pytest.mark.parametrize("activation", ["relu", "softplus"])
by_hand = jax.jit(L1.value_and_grad, static_argnums=0)


def context(dtype=jnp.float64, coefficient=0.7):
    one = jnp.int32(1)
    return Context({"l1": jnp.array(coefficient, dtype)}, jnp.zeros(N, jnp.int32), jax.random.key(0), one, one)


def case(dtype=np.float64, d=D, n=N, **options):
    """(dictionary, parameters away from zero)."""
    dictionary = L1(n_features=n, **options).sized(d, compute_dtype=np.dtype(dtype).name)
    generator = np.random.default_rng(0)
    params = {
        name: jnp.array(np.asarray(value) + 0.3 * generator.normal(size=value.shape), dtype)
        for name, value in dictionary.init(jax.random.key(0)).items()
    }
    if options.get("activation") == "softplus":
        params["b_enc"] -= 4  # some codes below what counts as silent
    return dictionary, params


@activations
@combinations
def test_equal_to_autodiff(x64, monkeypatch, on, activation):
    in_small_blocks(monkeypatch)
    dictionary, params = case(activation=activation, **dict(zip(NAMES, on)))
    batch = normal_batch(ROWS, D)
    made = by_hand(dictionary, params, batch, context())
    assert_same(made, by_autodiff(dictionary, params, batch, context()))
    assert all(np.any(grad) for grad in made[2].values())
    assert 0 < np.sum(made[1].fired) < np.sum(batch.weight > 0) * N


@activations
@pytest.mark.parametrize("on", [(False, False, True, True), (True, True, True, True)], ids=str)
def test_equal_to_finite_differences(x64, on, activation):
    dictionary, params = case(activation=activation, **dict(zip(NAMES, on)))
    batch = normal_batch(ROWS, D)
    _, _, grads = by_hand(dictionary, params, batch, context())
    loss = jax.jit(lambda params: sum(dictionary.loss(params, batch, context()).terms.values()))
    assert_finite_differences(loss, params, grads)


def test_a_target_of_another_width(x64):
    dictionary = L1(n_features=N, centring=False).sized(D, 5, compute_dtype="float64")
    generator = np.random.default_rng(0)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, 5), "b_dec": (5,)}
    params = {name: jnp.array(generator.normal(size=shape)) for name, shape in shapes.items()}
    batch = normal_batch(ROWS, D, 5)
    assert_same(by_hand(dictionary, params, batch, context()), by_autodiff(dictionary, params, batch, context()))


def test_a_zero_row_has_a_finite_gradient(x64):
    dictionary, params = case(norm_weighted=True)
    params["W_dec"] = params["W_dec"].at[2].set(0)
    batch = normal_batch(ROWS, D)
    made = by_hand(dictionary, params, batch, context())
    assert_same(made, by_autodiff(dictionary, params, batch, context()))
    assert all(np.isfinite(grad).all() for grad in made[2].values())


@pytest.mark.parametrize("tied", [False, True])
def test_masked_rows_contribute_nothing(x64, monkeypatch, tied):
    in_small_blocks(monkeypatch)
    dictionary, params = case(tied=tied)
    batch = normal_batch(ROWS, D)
    kept = np.flatnonzero(batch.weight)
    huge = jnp.where(batch.weight[:, None] > 0, batch.x, 1e15)
    value, losses, grads = by_hand(dictionary, params, Batch(huge, huge, batch.weight), context())
    left = Batch(batch.x[kept], batch.x[kept], batch.weight[kept])
    value_left, losses_left, grads_left = by_hand(dictionary, params, left, context())
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)  # noqa: E731
    jax.tree.map(
        same, (value, losses.terms, losses.fired, grads), (value_left, losses_left.terms, losses_left.fired, grads_left)
    )


@activations
@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_close_to_float32(tied, activation):
    options = {"tied": tied, "activation": activation}
    exact, params = case(np.float32, 16, 64, **options)
    rounded = L1(n_features=64, **options).sized(16, compute_dtype="bfloat16")
    batch = normal_batch(256, 16, dtype=np.float32)
    here = context(jnp.float32)
    value, losses, grads = by_hand(exact, params, batch, here)
    low_value, low_losses, low_grads = by_hand(rounded, params, batch, here)
    assert 0 < abs(low_value - value) < 0.01 * value
    assert 0 < relative_error(low_losses.y_hat, losses.y_hat) < 0.02
    for name, grad in grads.items():
        assert low_grads[name].dtype == jnp.float32
        assert relative_error(low_grads[name], grad) < 0.02, name


@activations
@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_with_a_large_mean(tied, activation):
    """x must be centred before it is rounded."""
    dictionary, params = case(np.float32, 16, 64, tied=tied, activation=activation)
    params, batch = shifted(params, normal_batch(256, 16, dtype=np.float32))
    # XLA's CPU backend refuses the compiled autodiff of tied weights in bfloat16: that is taken operation by operation.
    autodiff = Dictionary.value_and_grad if tied else by_autodiff
    assert_as_close_as_autodiff(dictionary, by_hand, params, batch, context(jnp.float32), autodiff)


def test_one_compilation_whatever_the_coefficient():
    dictionary, params = case(np.float32)
    batch, traced = normal_batch(ROWS, D, dtype=np.float32), []

    @jax.jit
    def step(params, batch, ctx):
        traced.append(1)
        return dictionary.value_and_grad(params, batch, ctx)[0]

    assert len({float(step(params, batch, context(jnp.float32, c))) for c in (0.0, 0.5, 2.0)}) == 3
    assert len(traced) == 1


def test_another_loss_keeps_autodiff(monkeypatch):
    """Lp inherits from L1, but not its loss: the gradient by hand would be wrong for it."""

    def refuse(*arguments):
        raise AssertionError("used for another loss")

    monkeypatch.setattr(l1_module.l1_gradient, "value_and_grad", refuse)
    batch = normal_batch(ROWS, D, dtype=np.float32)
    lp = Lp(n_features=N).sized(D)
    here = context(jnp.float32)
    here = here._replace(coefficients=here.coefficients | {"p": jnp.float32(0.5)})
    params = lp.init(jax.random.key(0))
    made, expected = (form(lp, params, batch, here) for form in (Lp.value_and_grad, Dictionary.value_and_grad))
    assert_same(made, expected, 0, 0)
    with pytest.raises(AssertionError, match="another loss"):
        L1(n_features=N).sized(D).value_and_grad(params, batch, here)
