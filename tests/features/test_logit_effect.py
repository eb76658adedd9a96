"""Direct logit effects: the model's own unembedding by finite differences, and answers known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser, activations
from sparse_jax.dictionaries import Neurons, Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.logit_effect import (
    direct_logit_effect,
    final_norm,
    logits_of_normed,
    mean_denominator,
    most_raised_and_lowered,
)
from sparse_jax.lm import Site, forward
from sparse_jax.lm.model import unembedded
from tests.features.tiny_models import CONFIGS, LAYERS, VOCAB, WIDTH, coder, text, tiny

FAMILIES = tuple(CONFIGS)
LAST = Site("resid_post", LAYERS - 1)


def sigma(lm, x):
    """The final norm's denominator by its definition, `[...]`."""
    x = np.asarray(x, np.float64)
    if lm.config.model_type != "llama":
        x = x - x.mean(-1, keepdims=True)
    return np.sqrt((x**2).mean(-1) + lm.config.norm_epsilon)


def frozen_logits(lm, x, frozen):
    """Logits of a residual `[1, n, d]` by the model's own unembedding, as if its denominator were `frozen [n]`.

    Without its bias the logits are proportional to 1 / denominator: they are brought from the real one to the other.
    """
    bias = lm.params["head"]["norm"].get("bias", jnp.zeros(WIDTH, x.dtype))
    table = lm.params["head"].get("unembed", lm.params["embed"]["tokens"])
    constant = np.asarray(table, np.float64) @ np.asarray(bias, np.float64)
    logits = np.asarray(unembedded(lm, x), np.float64)
    return (logits - constant) * (sigma(lm, x) / frozen)[..., None] + constant


@pytest.mark.parametrize("family", FAMILIES)
def test_finite_differences_of_the_models_own_unembedding(family, x64):
    lm, trained = tiny(family, "float64"), coder(WIDTH, 20, 0, "float64")
    tokens, _, mask = text(4)
    residual = forward(lm, tokens).residual
    denominator = mean_denominator(lm, residual, mask)
    frozen = sigma(lm, residual)
    assert denominator == pytest.approx(1 / np.mean(1 / frozen[mask]), rel=1e-12)
    features, step = [3, 0, 11], 1e-3
    effects = np.asarray(direct_logit_effect(lm, trained, features, LAST, denominator))
    assert effects.shape == (3, VOCAB)
    before = frozen_logits(lm, residual, frozen)
    for effect, feature in zip(effects, features):
        after = frozen_logits(lm, residual + step * trained.directions()[feature], frozen)
        # The mean over the tokens that count: the denominator is the one that makes it so.
        slope = ((after - before) / step)[mask].mean(axis=0)
        np.testing.assert_allclose(effect, slope, atol=1e-9)
        assert np.abs(effect).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_and_product_are_the_unembedding(family):
    lm = tiny(family)
    x = jax.random.normal(jax.random.key(0), (2, 5, WIDTH))
    np.testing.assert_allclose(logits_of_normed(lm, final_norm(lm, x)), unembedded(lm, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["mlp_hidden", "attn_z"])
def test_sites_behind_an_output_projection(family, name, x64):
    """What a unit at the site adds to the stream is what the layer's own projection makes of it."""
    lm = tiny(family, "float64")
    site, tokens = Site(name, LAYERS - 1), text(1)[0]
    width = np.asarray(activations(lm, jnp.array(tokens), site)).shape[-1]
    trained = coder(width, 6, 1, "float64")
    effects = direct_logit_effect(lm, trained, [2, 4], site)
    from sparse_jax.lm import Edit, put

    captured = forward(lm, tokens, capture=[site])
    value = captured.captured[str(site)]
    for effect, feature in zip(np.asarray(effects), (2, 4)):
        moved = value + trained.directions()[feature].reshape(value.shape[2:])
        out = ("mlp_out" if name == "mlp_hidden" else "attn_out") + f".{LAYERS - 1}"
        added = [
            forward(lm, tokens, capture=[out], edits=edits).captured[out][0, 5]
            for edits in ((), [Edit(site, put, (moved,))])
        ]
        alone = coder(WIDTH, 6, 1, "float64")
        params = alone.params | {"W_dec": jnp.tile(added[1] - added[0], (6, 1)) / alone.normaliser.scale}
        same = direct_logit_effect(lm, dataclasses.replace(alone, params=params), [0], LAST)
        np.testing.assert_allclose(effect, same[0], atol=1e-9)


def test_known_by_hand():
    """Without a scale of its own the norm passes a centred direction on: the token whose row it is gains most."""
    lm = tiny("gpt_neox")
    table = lm.params["head"]["unembed"]
    table = table - table.mean(axis=1, keepdims=True)
    table = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    norm = {"scale": jnp.ones(WIDTH), "bias": jnp.full(WIDTH, 7.0)}
    lm = dataclasses.replace(lm, params=lm.params | {"head": {"norm": norm, "unembed": table}})
    trained = coder(WIDTH, VOCAB, 0)
    # A constant along all coordinates is centred away.
    trained = dataclasses.replace(trained, params=trained.params | {"W_dec": 2 * table + 5})
    effects = direct_logit_effect(lm, trained, np.arange(VOCAB), LAST, 4.0)
    # scale of the normaliser 1.5, 2 times a unit row, denominator 4
    np.testing.assert_allclose(np.diag(effects), 1.5 * 2 / 4, rtol=1e-4)
    found = most_raised_and_lowered(effects, 1)
    np.testing.assert_array_equal(found.raised[:, 0], np.arange(VOCAB))
    np.testing.assert_allclose(found.raised_by[:, 0], 0.75, rtol=1e-4)
    # Without a denominator: up to a factor.
    np.testing.assert_allclose(direct_logit_effect(lm, trained, [1], LAST), 4 * effects[1:2], rtol=1e-5)


def test_neurons_of_a_llama_are_rows_of_its_scaled_unembedding():
    lm = tiny("llama")
    dictionary = Neurons(n_features=WIDTH, d_in=WIDTH, d_out=WIDTH, k=4)
    params = dictionary.fit(jnp.zeros(WIDTH))
    trained = Normalised(dictionary, params, Normaliser(jnp.zeros(WIDTH), jnp.ones(())))
    effects = direct_logit_effect(lm, trained, range(WIDTH), "resid_mid.0")
    expected = (lm.params["embed"]["tokens"] * lm.params["head"]["norm"]["scale"]).T
    np.testing.assert_allclose(effects, expected, rtol=1e-5, atol=1e-6)


def test_extremes_by_hand():
    effects = np.array([[0.0, 3.0, -2.0, 3.0, 1.0], [5.0, -1.0, -1.0, 0.0, 2.0]], np.float32)
    found = most_raised_and_lowered(effects, 2)
    np.testing.assert_array_equal(found.raised, [[1, 3], [0, 4]])
    np.testing.assert_array_equal(found.raised_by, [[3, 3], [5, 2]])
    np.testing.assert_array_equal(found.lowered, [[2, 0], [1, 2]])
    np.testing.assert_array_equal(found.lowered_by, [[-2, 0], [-1, -1]])


def test_errors():
    lm, trained = tiny("gpt2"), coder(WIDTH, 5, 0)
    for site in ("attn_q.0", "mlp_in.1"):
        with pytest.raises(InputError, match="not added to the residual stream"):
            direct_logit_effect(lm, trained, [0], site)
    with pytest.raises(InputError, match="have 8 numbers"):
        direct_logit_effect(lm, trained, [0], "mlp_hidden.0")
    for features in ([5], [-1], []):
        with pytest.raises(InputError, match="features"):
            direct_logit_effect(lm, trained, features, LAST)
    with pytest.raises(InputError, match="denominator"):
        direct_logit_effect(lm, trained, [0], LAST, 0.0)
    with pytest.raises(InputError, match="no token counts"):
        mean_denominator(lm, jnp.ones((1, 2, WIDTH)), np.zeros((1, 2), bool))
    for k in (0, VOCAB + 1):
        with pytest.raises(InputError, match="vocabulary"):
            most_raised_and_lowered(np.zeros((1, VOCAB)), k)
