"""TopK's and BatchTopK's gradients written by hand: equal to autodiff's, dense and sparse, with and without AuxK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import Batch, Dictionary
from sparse_jax.dictionaries import batch_topk as batch_topk_module
from sparse_jax.dictionaries import topk as topk_module
from sparse_jax.dictionaries.batch_topk import BatchTopK
from sparse_jax.dictionaries.matryoshka import Matryoshka
from sparse_jax.dictionaries.multi_topk import MultiTopK
from sparse_jax.dictionaries.topk import TopK, current_k
from sparse_jax.dictionaries.topk_gradient import batch_top_k_value_and_grad, top_k_value_and_grad
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
from tests.dictionaries.k_sparse import context, small

ROWS, D, N, K = 20, 4, 10, 3
DEAD = {"none dead": (), "some dead": (1, 4), "more dead than AuxK takes": (0, 1, 4, 6, 7, 9)}
FORMS = {
    "dense": lambda d, *rest: top_k_value_and_grad(d, *rest, current_k(rest[-1]), sparse=False),
    "sparse": lambda d, *rest: top_k_value_and_grad(d, *rest, current_k(rest[-1]), sparse=True),
    "batch": batch_top_k_value_and_grad,
}
forms = pytest.mark.parametrize("form", FORMS)
dead_features = pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)


def case(form, dtype=np.float64, d=D, n=N, rows=ROWS, k=K, **options):
    """(dictionary, its value_and_grad in this form, parameters, a batch)."""
    architecture = BatchTopK if form == "batch" else TopK
    dictionary, params, _ = small(architecture, dtype, d=d, n=n, k=k, **options)
    return dictionary, jax.jit(FORMS[form], static_argnums=0), params, normal_batch(rows, d, dtype=dtype)


@dead_features
@pytest.mark.parametrize("k_now", [0, 1, K, 5])
@forms
def test_equal_to_autodiff(x64, monkeypatch, form, k_now, dead):
    in_small_blocks(monkeypatch)
    dictionary, by_hand, params, batch = case(form, anneal_from=5, aux_k=2)
    here = context(dictionary, k_now, dead, step=3, dtype=jnp.float64)
    made = by_hand(dictionary, params, batch, here)
    assert_same(made, by_autodiff(dictionary, params, batch, here))
    assert (made[1].terms["aux_k"] > 0) == bool(dead)
    assert np.any(made[2]["W_enc"]) == bool(k_now or dead)


@dead_features
@forms
def test_equal_to_finite_differences(x64, form, dead):
    """AuxK detaches the error, which differences do not: they are taken of its own objective with the error held."""
    dictionary, by_hand, params, batch = case(form, aux_k=2)
    here = context(dictionary, K, dead, dtype=jnp.float64)
    _, losses, grads = by_hand(dictionary, params, batch, here)
    error, held = batch.target - losses.y_hat, params["b_dec"]

    @jax.jit
    def objective(params):
        values = dictionary.preactivations(params | {"b_dec": held}, batch.x)  # b_dec belongs to the living
        aux = dictionary.aux_k_term(params | {"b_dec": held}, values, error, batch, here)
        return dictionary.loss(params, batch, here).terms["reconstruction"] + aux

    assert_finite_differences(objective, params, grads, atol=2e-7)


@forms
def test_ties_go_to_the_lower_index(x64, form):
    dictionary, by_hand, params, batch = case(form)
    params = params | {name: jnp.broadcast_to(params[name][..., :1], params[name].shape) for name in ("W_enc", "b_enc")}
    here = context(dictionary, dtype=jnp.float64)
    made = by_hand(dictionary, params, batch, here)
    assert_same(made, by_autodiff(dictionary, params, batch, here))
    if form != "batch":
        assert np.all(made[1].fired[:K] > 0)
        assert not np.any(made[1].fired[K:])


@dead_features
@forms
def test_masked_rows_contribute_nothing(x64, monkeypatch, form, dead):
    in_small_blocks(monkeypatch)
    dictionary, by_hand, params, batch = case(form)
    here = context(dictionary, dead=dead, dtype=jnp.float64)
    kept = np.flatnonzero(batch.weight)
    huge = jnp.where(batch.weight[:, None] > 0, batch.x, 1e12)
    value, losses, grads = by_hand(dictionary, params, Batch(huge, huge, batch.weight), here)
    left = Batch(batch.x[kept], batch.x[kept], batch.weight[kept])
    value_left, losses_left, grads_left = by_hand(dictionary, params, left, here)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12),
        (value, losses.terms, losses.fired, losses.frozen, grads),
        (value_left, losses_left.terms, losses_left.fired, losses_left.frozen, grads_left),
    )


@dead_features
@forms
def test_bfloat16_is_close_to_float32(form, dead):
    exact, by_hand, params, batch = case(form, np.float32, 16, 64, 256, 8)
    rounded = type(exact)(n_features=64, k=8).sized(16, compute_dtype="bfloat16")
    here = context(exact, dead=dead)
    value, losses, grads = by_hand(exact, params, batch, here)
    low_value, low_losses, low_grads = by_hand(rounded, params, batch, here)
    assert 0 < abs(low_value - value) < 0.02 * value
    assert 0 < relative_error(low_losses.y_hat, losses.y_hat) < 0.05
    for name, grad in grads.items():
        assert low_grads[name].dtype == jnp.float32
        # Nearly tied features change places under rounding, and with them a row's whole contribution.
        assert relative_error(low_grads[name], grad) < 0.03, name


@dead_features
@forms
def test_bfloat16_with_a_large_mean(form, dead):
    """x must be centred before it is rounded."""
    # AuxK weighs enough for its part of the gradient to be seen.
    dictionary, by_hand, params, batch = case(form, np.float32, 16, 64, 256, 8, aux_coefficient=10.0)
    params, batch = shifted(params, batch)
    assert_as_close_as_autodiff(dictionary, by_hand, params, batch, context(dictionary, dead=dead))


@forms
def test_one_compilation_whatever_the_k(form):
    dictionary, _, params, batch = case(form, np.float32)
    traced = []

    @jax.jit
    def step(params, batch, ctx):
        traced.append(1)
        return FORMS[form](dictionary, params, batch, ctx)[0]

    dead = (1, 4)
    values = {float(step(params, batch, context(dictionary, k, silent))) for k in (1, 2, 3) for silent in ((), dead)}
    assert len(values) == 6
    assert len(traced) == 1


@pytest.mark.parametrize("architecture", [MultiTopK, Matryoshka])
def test_another_loss_keeps_autodiff(monkeypatch, architecture):
    def refuse(*arguments):
        raise AssertionError("used for another loss")

    monkeypatch.setattr(topk_module, "top_k_value_and_grad", refuse)
    monkeypatch.setattr(batch_topk_module, "batch_top_k_value_and_grad", refuse)
    dictionary, params, batch = small(architecture, np.float32, k=2)
    made = dictionary.value_and_grad(params, batch, context(dictionary))
    assert_same(made, Dictionary.value_and_grad(dictionary, params, batch, context(dictionary)), 0, 0)
    for own in (TopK, BatchTopK):
        dictionary, params, batch = small(own, np.float32, k=2)
        with pytest.raises(AssertionError, match="another loss"):
            dictionary.value_and_grad(params, batch, context(dictionary))
