"""The closed form equals autodiff through the model, token by token, in every family."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparse_jax.connectors.between import mlp_stream
from sparse_jax.connectors.mean_jacobian import _sums, mean_jacobians
from sparse_jax.errors import InputError
from sparse_jax.features.causes import Located
from sparse_jax.lm import Edit, Site, forward, put
from tests.connectors.tiny_pairs import located, pair_of, rows_of
from tests.features.tiny_models import tiny

N_IN, N_OUT = 7, 6


@partial(jax.jit, static_argnames=("source", "target", "frozen"))
def jacobian(lm, source, target, x, directions, columns, frozen):
    """`[n_in, n_out]` by autodiff of the whole block at one place, `x [d_model]` what stands there."""
    layer, centres = source.layer, "bias" in lm.params["blocks"]["ln_mlp"]
    norm = lm.params["blocks"]["ln_mlp"]

    def pre(codes):
        value = x + codes @ directions
        if frozen:
            mean = lambda a: jnp.mean(a) if centres else jnp.zeros((), a.dtype)  # noqa: E731
            spread = jnp.sqrt(jnp.mean((value - mean(value)) ** 2) + lm.config.norm_epsilon)
            value = norm["scale"][layer] * (value - mean(value)) / lax.stop_gradient(spread)
            value = value + norm["bias"][layer] if centres else value
        site = Site("mlp_in", layer) if frozen else source
        edit = Edit(site, put, (value[None, None],))
        nothing = jnp.zeros((1, 1, len(x)), x.dtype)
        found = forward(lm, nothing, capture=[target], edits=[edit], start=layer, stop=layer + 1)
        return found.captured[str(target)][0, 0] @ columns

    return jax.jacobian(pre)(jnp.zeros(len(directions), x.dtype)).T


CASES = [
    ("gpt_neox", "resid_pre.1", "mlp_out.1"),
    ("gpt2", "resid_pre.1", "mlp_out.1"),
    ("llama", "resid_mid.1", "mlp_out.1"),
    ("sequential", "resid_post.0", "mlp_hidden.1"),
    ("gpt2", "mlp_in.1", "mlp_out.1"),
]


@pytest.mark.parametrize(("family", "source", "target"), CASES)
def test_equals_autodiff(x64, family, source, target):
    lm, rows = tiny(family, "float64"), rows_of(5)
    inputs, targets = located(lm, source, N_IN, 1, "float64"), located(lm, target, N_OUT, 2, "float64")
    pair = pair_of(lm, [inputs], targets, rows)
    # Few tokens, out of order, and not of all rows: 2 blocks, the last not full.
    pair = pair.at(np.random.default_rng(0).permutation(np.flatnonzero(pair.tokens.row != 1))[:9])
    found = mean_jacobians(lm, rows, inputs, targets, pair.tokens, pair.inputs, block_rows=3)
    stands = Site("mlp_in", 1) if source == "mlp_in.1" else mlp_stream(lm.config, 1)
    x = forward(lm, rows[np.arange(5)].tokens, capture=[stands]).captured[str(stands)]
    x = np.asarray(x)[pair.tokens.row, pair.tokens.position]
    columns = targets.coder.params["W_enc"] / targets.coder.normaliser.scale
    fires = pair.inputs.values > 0
    assert 0 < fires.sum() < fires.size
    means = {}
    for frozen in (False, True) if source != "mlp_in.1" else (False,):
        each = np.stack(
            [
                np.asarray(
                    jacobian(lm, stands, Site.parse(target), jnp.array(a), inputs.coder.directions(), columns, frozen)
                )
                for a in x
            ]
        )
        means[frozen] = each.mean(axis=0), np.einsum("tij,ti->ij", each, fires) / np.maximum(fires.sum(0), 1)[:, None]
    everywhere, firing = means[False]
    np.testing.assert_allclose(found.everywhere, everywhere, atol=1e-9)
    np.testing.assert_allclose(found.firing, firing, atol=1e-9)
    everywhere, firing = means.get(True, means[False])
    np.testing.assert_allclose(found.everywhere_frozen, everywhere, atol=1e-9)
    np.testing.assert_allclose(found.firing_frozen, firing, atol=1e-9)
    np.testing.assert_array_equal(found.firings, fires.sum(axis=0))
    assert found.tokens == 9
    assert np.abs(found.firing).max() > 0.1
    assert np.abs(found.firing - found.everywhere).max() > 0.01
    assert (np.abs(found.firing - found.firing_frozen).max() > 0.01) == (source != "mlp_in.1")


def test_float32_and_raw_sites():
    """In float32 within 1e-5; neurons and coordinates as they are, which fire where they are above 0."""
    rows, found = rows_of(5), {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            lm = tiny("gpt2", dtype)
            inputs, target = Located("resid_mid.1", None), Located("mlp_hidden.1", None)
            pair = pair_of(lm, [inputs], target, rows)
            found[dtype] = mean_jacobians(lm, rows, inputs, target, pair.tokens, pair.inputs, block_rows=4)
    assert found["float32"].firing.shape == (8, 16)
    np.testing.assert_allclose(found["float32"].firing, found["float64"].firing, atol=1e-5)
    np.testing.assert_allclose(found["float32"].everywhere, found["float64"].everywhere, atol=1e-5)
    np.testing.assert_array_equal(found["float32"].firings, (pair.inputs.values > 0).sum(axis=0))


def test_compiled_once():
    lm, rows = tiny("gpt_neox"), rows_of(5)
    inputs, target = located(lm, "resid_pre.1", N_IN, 1), located(lm, "mlp_out.1", N_OUT, 2)
    pair = pair_of(lm, [inputs], target, rows)
    mean_jacobians(lm, rows, inputs, target, pair.tokens, pair.inputs, block_rows=3)
    before = _sums._cache_size()
    few = pair.at(np.arange(7))
    mean_jacobians(lm, rows, inputs, target, few.tokens, few.inputs, block_rows=3)
    assert _sums._cache_size() == before


def test_errors():
    lm, rows = tiny("gpt_neox"), rows_of(5)
    inputs, target = located(lm, "resid_pre.1", N_IN, 1), located(lm, "mlp_out.1", N_OUT, 2)
    pair = pair_of(lm, [inputs], target, rows)
    with pytest.raises(InputError, match="closed form"):
        mean_jacobians(lm, rows, inputs, located(lm, "attn_out.1", N_OUT, 2), pair.tokens, pair.inputs)
    with pytest.raises(InputError, match="closed form"):
        mean_jacobians(lm, rows, located(lm, "mlp_hidden.1", N_IN, 1), target, pair.tokens, pair.inputs)
    with pytest.raises(InputError, match="at least one token"):
        mean_jacobians(lm, rows, inputs, target, pair.tokens, pair.targets)
    nobody = pair.at(np.arange(0))
    with pytest.raises(InputError, match="at least one token"):
        mean_jacobians(lm, rows, inputs, target, nobody.tokens, nobody.inputs)
