"""Virtual weights are the module's derivative where the module is linear: by autodiff, and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors.virtual_weights import attention_weights, likeness, mlp_weights, stream_weights
from sparse_jax.errors import InputError
from sparse_jax.features.causes import Located
from sparse_jax.lm import Edit, forward, put, zero
from sparse_jax.lm.edits import at
from tests.connectors.tiny_pairs import located
from tests.features.tiny_models import WIDTH, tiny

N_IN, N_OUT = 7, 6


def columns_of(place):
    return np.asarray(place.coder.params["W_enc"] / place.coder.normaliser.scale)


def norm_of(lm, x, name):
    """(z, 1 / denominator) of `x [d]`."""
    centred = x - x.mean() if "bias" in lm.params["blocks"][name] else x
    inverse = 1 / np.sqrt(np.mean(centred**2) + lm.config.norm_epsilon)
    return centred * inverse, inverse


def unseen_by_the_norm(z):
    """`[n, d]` directions along which the norm is linear: no change of its mean or its denominator."""
    basis = np.linalg.qr(np.stack([z, np.ones_like(z)]).T)[0]
    moves = np.random.default_rng(5).normal(size=(3, len(z)))
    return moves - moves @ basis @ basis.T


def derivative(lm, site, target, x, move, edits=()):
    """d target / d x along `move`, at one place that stands alone, by autodiff."""
    layer = int(target[-1])

    def run(value):
        given = [Edit(site, put, (value[None, None],)), *edits]
        nothing = jnp.zeros((1, 1, len(x)), x.dtype)
        return forward(lm, nothing, capture=[target], edits=given, start=layer, stop=layer + 1).captured[target][0, 0]

    return np.asarray(jax.jvp(run, (jnp.array(x),), (jnp.array(move),))[1])


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_ov_path_of_a_head(x64, family):
    lm = tiny(family, "float64")
    inputs, target = Located("resid_pre.1", None), located(lm, "attn_out.1", N_OUT, 2, "float64")
    x = np.random.default_rng(1).normal(size=WIDTH)
    z, inverse = norm_of(lm, x, "ln_attn")
    for head in range(2):
        found = np.asarray(attention_weights(lm, inputs, target, head))
        assert found.shape == (WIDTH, N_OUT)
        others = [Edit("attn_z.1", zero, (), at(heads=[1 - head]))]
        for move in unseen_by_the_norm(z):
            # A place that stands alone looks at itself alone.
            expected = derivative(lm, "resid_pre.1", "attn_out.1", x, move, others) @ columns_of(target)
            np.testing.assert_allclose(inverse * move @ found, expected, atol=1e-9)
    with pytest.raises(InputError, match="head"):
        attention_weights(lm, inputs, target, 2)
    with pytest.raises(InputError, match="OV paths"):
        attention_weights(lm, inputs, located(lm, "mlp_out.1", N_OUT, 2), 0)


@pytest.mark.parametrize(
    ("family", "stream"), [("gpt_neox", "resid_pre"), ("gpt2", "resid_mid"), ("llama", "resid_mid")]
)
def test_mlp_at_a_point(x64, family, stream):
    lm = tiny(family, "float64")
    inputs, target = Located("resid_pre.1", None), located(lm, "mlp_out.1", N_OUT, 2, "float64")
    x = np.random.default_rng(1).normal(size=WIDTH)
    z, _ = norm_of(lm, x, "ln_mlp")
    found = np.asarray(mlp_weights(lm, inputs, target, x))
    for move in unseen_by_the_norm(z):
        expected = derivative(lm, f"{stream}.1", "mlp_out.1", x, move) @ columns_of(target)
        np.testing.assert_allclose(move @ found, expected, atol=1e-9)
    # From behind the norm there is no norm; features are directions.
    behind, neurons = located(lm, "mlp_in.1", N_IN, 1, "float64"), Located("mlp_hidden.1", None)
    found = np.asarray(mlp_weights(lm, behind, neurons, x))
    for f, direction in enumerate(np.asarray(behind.coder.directions())):
        np.testing.assert_allclose(found[f], derivative(lm, "mlp_in.1", "mlp_hidden.1", x, direction), atol=1e-9)


def test_mlp_at_zero_by_hand():
    """Without biases the slope of GELU at 0 is a half."""
    lm = tiny("gpt_neox")
    blocks = {**lm.params["blocks"]}
    blocks["ln_mlp"] = {**blocks["ln_mlp"], "bias": jnp.zeros_like(blocks["ln_mlp"]["bias"])}
    blocks["mlp"] = {
        **blocks["mlp"],
        "up": {**blocks["mlp"]["up"], "bias": jnp.zeros_like(blocks["mlp"]["up"]["bias"])},
    }
    lm = dataclasses.replace(lm, params={**lm.params, "blocks": blocks})
    inputs, target = located(lm, "resid_pre.1", N_IN, 1), located(lm, "mlp_out.1", N_OUT, 2)
    directions = np.asarray(inputs.coder.directions())
    directions = (directions - directions.mean(axis=1, keepdims=True)) * np.asarray(blocks["ln_mlp"]["scale"][1])
    up, down = (np.asarray(blocks["mlp"][name]["kernel"][1]) for name in ("up", "down"))
    expected = 0.5 * directions @ up @ down @ columns_of(target)
    np.testing.assert_allclose(mlp_weights(lm, inputs, target), expected, atol=1e-5)
    with pytest.raises(InputError, match="give zero"):
        mlp_weights(lm, inputs, target, "mean")
    with pytest.raises(InputError, match="give zero"):
        mlp_weights(lm, inputs, target, np.zeros(3))
    with pytest.raises(InputError, match="before and behind"):
        mlp_weights(lm, inputs, located(lm, "attn_out.1", N_OUT, 2))


def test_through_the_stream():
    lm = tiny("gpt2")
    inputs, target = located(lm, "attn_out.1", N_IN, 1), located(lm, "resid_post.1", N_OUT, 2)
    expected = np.asarray(inputs.coder.directions()) @ columns_of(target)
    np.testing.assert_allclose(stream_weights(lm, inputs, target), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="has 16 numbers"):
        stream_weights(lm, Located("mlp_hidden.1", None), target)


def test_likeness_by_hand():
    learned = np.array([[1.0, 0.0, -2.0], [0.0, 0.5, 0.0]])
    other = np.array([[3.0, 0.1, -1.0], [0.2, -0.3, 2.0]])
    found = likeness(learned, other)
    w, v = np.array([1, -2, 0.5]), np.array([3, -1, -0.3])
    assert found.connections == 3
    assert found.cosine == pytest.approx(w @ v / np.linalg.norm(w) / np.linalg.norm(v))
    assert found.correlation == pytest.approx(np.corrcoef(w, v)[0, 1])
    assert found.same_sign == pytest.approx(2 / 3)
    pairs = [(a, b) for a in (3, 1, 0.3) for b in (0.1, 0.2, 2)]
    assert found.auc == pytest.approx(np.mean([a > b for a, b in pairs]))
    assert likeness(learned, np.zeros_like(other)).auc == 0.5
    assert np.isnan(likeness(np.ones((2, 2)), np.eye(2)).auc)
    scaled = likeness(learned, 7 * other)
    np.testing.assert_allclose(scaled, found)
    with pytest.raises(InputError, match="one shape"):
        likeness(learned, other.T)
    with pytest.raises(InputError, match="one shape"):
        likeness(0 * learned, other)
