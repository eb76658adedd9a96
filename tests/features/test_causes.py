"""Causes of a feature: each earlier feature ablated by a whole pass of the model, and a wire known by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import Fista, Neurons, Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.causes import (
    Located,
    _dropped,
    causes,
    contexts_of,
    decoder_encoder_cosine,
    encoder_columns,
)
from sparse_jax.lm import Edit, Site, forward, put, site_width
from tests.features.tiny_models import WIDTH, coder, text, tiny

N = 9
ROWS = 5
POSITIONS = np.array([9, 4, 11, 0, 7])


def codes_at(trained, value, rows_shape):
    x = value.reshape(*rows_shape, -1)
    return x, np.asarray(trained.encode(x.reshape(-1, x.shape[-1]))).reshape(*rows_shape, -1)


def brute_force(lm, earlier, later, feature, tokens, mask, positions, pre=False):
    """`[contexts, n]` drops by one whole pass of the model for each earlier feature, and where they are active."""
    (site, first), (later_site, second) = earlier, later
    clean = forward(lm, tokens, capture=[site, later_site]).captured
    x, codes = codes_at(first, clean[site], tokens.shape)
    counts = mask & (np.arange(tokens.shape[1]) <= positions[:, None])

    def activation(value):
        at_place = value.reshape(*tokens.shape, -1)[np.arange(len(tokens)), positions]
        if pre:
            params = second.params
            W = params["W_enc"] if "W_enc" in params else params["W_dec"].T
            return np.asarray(((at_place - second.normaliser.centre) / second.normaliser.scale) @ W[:, feature])
        return np.maximum(np.asarray(second.encode(at_place))[:, feature], 0)

    drops, active = [], []
    for f in range(codes.shape[-1]):
        removed = np.where(counts & (codes[..., f] > 0), codes[..., f], 0)
        value = (x - removed[..., None] * first.directions()[f]).reshape(clean[site].shape)
        ablated = forward(lm, tokens, capture=[later_site], edits=[Edit(site, put, (value,))]).captured[later_site]
        drops.append(activation(clean[later_site]) - activation(ablated))
        active.append((removed > 0).any(axis=1))
    return np.stack(drops, 1), np.stack(active, 1), activation(clean[later_site])


def check(family, site, later_site, *, pre=False, **options):
    lm = tiny(family, "float64")
    earlier = Located(site, coder(site_width(lm.config, site), N, 1, "float64", 0.6))
    later = Located(later_site, coder(site_width(lm.config, later_site), 6, 2, "float64", 0.1))
    tokens, _, mask = text(ROWS)
    drops, active, activations = brute_force(lm, earlier, later, 3, tokens, mask, POSITIONS, pre)
    kind = "pre" if pre else "post"
    found = causes(lm, earlier, later, 3, tokens, mask, POSITIONS, activation=kind, block_rows=2, **options)
    present = active.any(axis=0)
    assert set(found.features) == set(np.flatnonzero(present))
    assert not present[N - 1]
    np.testing.assert_allclose(found.drops, drops[:, found.features], atol=1e-6)  # kept in float32
    np.testing.assert_allclose(found.drop, drops[:, found.features].mean(0), atol=1e-6)
    assert np.all(np.diff(found.drop) <= 0)
    np.testing.assert_array_equal(found.active, active.sum(0)[found.features])
    # What is not active is exactly without effect.
    assert not found.drops[~active[:, found.features]].any()
    if not pre:
        np.testing.assert_allclose(found.activations, activations, atol=1e-6)
    assert np.abs(drops).max() > 1e-2
    return found


@pytest.mark.parametrize("family", ["sequential", "gpt_neox"])
def test_brute_force_in_every_family(family, x64):
    check(family, "resid_post.0", "resid_post.1")


@pytest.mark.parametrize(
    ("site", "later_site"),
    [
        ("attn_z.0", "mlp_hidden.1"),
        ("resid_mid.1", "mlp_out.1"),
        ("mlp_hidden.0", "attn_v.2"),
    ],
)
def test_brute_force_at_other_sites(site, later_site, x64):
    found = check("llama", site, later_site)
    assert found.drops.any()


@pytest.mark.parametrize("batch_tokens", [30])
def test_batches_change_nothing(batch_tokens, x64):
    check("gpt2", "resid_pre.0", "resid_post.2", batch_tokens=batch_tokens)


def test_pre_activations(x64):
    check("gpt2", "resid_post.0", "resid_post.1", pre=True)


def test_a_wire_by_hand():
    """The residual stream passes earlier features on. Blocks that add nothing: what is removed is what is missed."""
    lm = tiny("gpt2")
    blocks = {**lm.params["blocks"]}
    for part, name in (("attn", "out"), ("mlp", "down")):
        silent = {key: jnp.zeros_like(value) for key, value in blocks[part][name].items()}
        blocks[part] = {**blocks[part], name: silent}
    lm = dataclasses.replace(lm, params={**lm.params, "blocks": blocks})
    identity = Normaliser(jnp.zeros(WIDTH), jnp.ones(()))
    dictionary = Neurons(n_features=WIDTH, d_in=WIDTH, d_out=WIDTH, k=WIDTH)
    neurons = Normalised(dictionary, dictionary.fit(jnp.zeros(WIDTH)), identity)
    later = coder(WIDTH, 6, 2, sparse=0.0)
    tokens, _, mask = text(ROWS)
    mask[:] = True
    feature = 1
    found = causes(
        lm, Located("resid_post.0", neurons), Located("resid_post.1", later), feature, tokens, mask, POSITIONS,
        activation="pre",
    )  # fmt: skip
    x = np.asarray(forward(lm, tokens, capture=["resid_post.0"]).captured["resid_post.0"])
    at_place = x[np.arange(ROWS), POSITIONS]
    column = np.asarray(later.params["W_enc"])[:, feature] / 1.5
    expected = (np.maximum(at_place, 0) * column)[:, found.features]
    np.testing.assert_allclose(found.drops, expected, atol=1e-5)
    cosine = column[found.features] / np.linalg.norm(column)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-5)


def test_encoder_columns():
    untied, tied = coder(WIDTH, 6, 0), coder(WIDTH, 6, 0, tied=True)
    np.testing.assert_allclose(encoder_columns(untied), untied.params["W_enc"] / 1.5, rtol=1e-6)
    np.testing.assert_allclose(encoder_columns(tied), untied.params["W_dec"].T / 1.5, rtol=1e-6)
    # The slope of a code in the raw activation is the column.
    x = jnp.array(np.random.default_rng(0).normal(size=(1, WIDTH)), jnp.float32)
    loud = dataclasses.replace(untied, params=untied.params | {"b_enc": jnp.full(6, 50.0)})
    slope = np.asarray(loud.encode(x + jnp.eye(WIDTH)) - loud.encode(x))
    np.testing.assert_allclose(slope, encoder_columns(loud), atol=1e-4)
    # Cosines see neither norms nor scales.
    louder = dataclasses.replace(tied, params=tied.params | {"W_dec": 3 * tied.params["W_dec"]})
    np.testing.assert_allclose(
        decoder_encoder_cosine(louder, tied, 2), decoder_encoder_cosine(tied, louder, 2), rtol=1e-5
    )
    np.testing.assert_allclose(decoder_encoder_cosine(tied, tied, 2)[2], 1, rtol=1e-5)
    assert decoder_encoder_cosine(coder(16, 6, 0), tied, 2) is None


def test_contexts_in_the_upper_half():
    values = np.array([0.0, 1.0, 4.9, 5.0, 10.0, 7.0, -20.0, 5.1], np.float32)
    np.testing.assert_array_equal(contexts_of(values), [3, 4, 5, 7])
    np.testing.assert_array_equal(contexts_of(values, maximum=14.0), [4, 5])
    drawn = [tuple(contexts_of(values, 2, seed)) for seed in range(40)]
    assert len(set(drawn)) == 6
    assert {place for pair in drawn for place in pair} == {3, 4, 5, 7}
    assert drawn[3] == tuple(contexts_of(values, 2, 3))
    for silent in (np.zeros(3), np.zeros(0)):
        with pytest.raises(InputError, match="no place"):
            contexts_of(silent)


def test_compiled_once_for_all_features():
    lm = tiny("gpt2")
    earlier, later = Located("resid_post.0", coder(WIDTH, N, 1)), Located("resid_post.2", coder(WIDTH, 6, 2, sparse=0))
    tokens, _, mask = text(ROWS)
    causes(lm, earlier, later, 3, tokens, mask, POSITIONS)
    before = _dropped._cache_size()
    causes(lm, earlier, later, 1, tokens[::-1], mask[::-1], POSITIONS[::-1])
    assert _dropped._cache_size() == before


def test_errors():
    lm = tiny("gpt2")
    tokens, _, mask = text(ROWS)
    first, second = Located("resid_post.0", coder(WIDTH, N, 1)), Located(Site("resid_post", 1), coder(WIDTH, 6, 2))

    def run(earlier=first, later=second, feature=3, positions=POSITIONS, **options):
        return causes(lm, earlier, later, feature, tokens, mask, positions, **options)

    for earlier, later in ((second, first), (first, first)):
        with pytest.raises(InputError, match="does not come before"):
            run(earlier, later)
    with pytest.raises(InputError, match="features"):
        run(feature=6)
    with pytest.raises(InputError, match="rows have 0 to 11"):
        run(positions=POSITIONS + 1)
    with pytest.raises(InputError, match="give \\[contexts, position\\]"):
        run(positions=POSITIONS[:2])
    with pytest.raises(InputError, match="takes 8 numbers"):
        run(Located("mlp_hidden.0", first.coder))
    with pytest.raises(InputError, match="choose post or pre"):
        run(activation="both")
    iterative = Fista(n_features=6).sized(WIDTH)
    with pytest.raises(InputError, match="no pre-activations"):
        run(later=Located(second.site, dataclasses.replace(second.coder, dictionary=iterative)), activation="pre")
