"""Where an edit holds, and the usual interventions, by hand and in a model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.lm import (
    Edit,
    Where,
    add,
    at,
    fill,
    forward,
    put,
    reconstruct,
    reconstruct_with_error,
    remove_direction,
    resample,
    scale,
    scale_features,
    set_features,
    zero,
)
from sparse_jax.lm.model import _forward_static

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
MASK = np.arange(14).reshape(2, 7) % 3 == 0


def chosen(where: Where, site: str, shape: tuple[int, ...], positions=None) -> np.ndarray:
    """Which entries of a value of this shape an edit there would change."""
    length = shape[2 if site == "attn_pattern" else 1]
    positions = jnp.arange(length) if positions is None else jnp.array(positions)
    return np.asarray(where.choose(site, jnp.ones(shape), jnp.zeros(shape), positions)).astype(bool)


# Where


def test_positions_heads_and_masks_of_vectors_and_heads():
    d = (2, 7, 5)
    np.testing.assert_array_equal(chosen(at(), "resid_pre", d), np.ones(d, bool))
    expected = np.zeros(d, bool)
    expected[:, [1, 4]] = True
    np.testing.assert_array_equal(chosen(at(positions=[4, 1]), "resid_pre", d), expected)
    np.testing.assert_array_equal(chosen(at(mask=MASK), "mlp_out", d), np.broadcast_to(MASK[..., None], d))
    np.testing.assert_array_equal(chosen(at(mask=MASK[0]), "mlp_out", d), np.broadcast_to(MASK[:1, :, None], d))
    heads = (2, 7, 3, 5)
    expected = np.zeros(heads, bool)
    expected[:, :, 2] = True
    np.testing.assert_array_equal(chosen(at(heads=[2]), "attn_z", heads), expected)
    expected = np.zeros(heads, bool)
    expected[:, [0, 6], 1:] = True
    np.testing.assert_array_equal(chosen(at(positions=[0, 6], heads=[1, 2]), "attn_k", heads), expected)
    np.testing.assert_array_equal(
        chosen(at(mask=MASK, heads=[0]), "attn_q", heads),
        MASK[:, :, None, None] & (np.arange(3) == 0)[:, None] & np.ones(heads, bool),
    )


def test_positions_of_a_pattern_are_its_queries():
    shape = (2, 3, 7, 7)
    expected = np.zeros(shape, bool)
    expected[:, 1, 2] = True
    np.testing.assert_array_equal(chosen(at(positions=[2], heads=[1]), "attn_pattern", shape), expected)
    np.testing.assert_array_equal(
        chosen(at(mask=MASK), "attn_pattern", shape), np.broadcast_to(MASK[:, None, :, None], shape)
    )


def test_from_a_first_position_on():
    d = (2, 7, 1)
    np.testing.assert_array_equal(chosen(at(first=5), "resid_pre", d)[..., 0], [[False] * 5 + [True] * 2] * 2)
    by_row = chosen(at(first=[5, 0]), "resid_pre", d)[..., 0]
    np.testing.assert_array_equal(by_row, [[False] * 5 + [True] * 2, [True] * 7])


def test_rows_that_stand_at_places_of_their_own():
    """As in generation: one position of each row. A mask does not reach past its end."""
    here, d = [[2], [9]], (2, 1, 4)
    np.testing.assert_array_equal(chosen(at(positions=[9]), "resid_pre", d, here)[:, 0, 0], [False, True])
    np.testing.assert_array_equal(chosen(at(first=[3, 9]), "resid_pre", d, here)[:, 0, 0], [False, True])
    np.testing.assert_array_equal(chosen(at(mask=np.ones((2, 7), bool)), "resid_pre", d, here)[:, 0, 0], [True, False])
    np.testing.assert_array_equal(chosen(at(mask=np.ones(7, bool)), "resid_pre", d, here)[:, 0, 0], [True, False])


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"positions": [-1]}, r"positions is \[-1\]; give integers from 0 on"),
        ({"heads": [0.5]}, r"heads is \[0.5\]; give integers"),
        ({"mask": np.ones((2, 7))}, r"mask is float.*; give bool \[batch, position\]"),
        ({"mask": np.ones((2, 7, 3), bool)}, r"bool\[2, 7, 3\]; give bool \[batch, position\] or"),
    ],
)
def test_what_is_no_place_is_refused(given, shown):
    with pytest.raises(InputError, match=shown):
        at(**given)


@pytest.mark.parametrize(
    ("site", "where", "shown"),
    [
        ("resid_post.0", at(heads=[0]), "is for certain heads; sites with heads are attn_q"),
        ("attn_z.0", at(heads=[4]), "head of the edit at attn_z.0 is 4, but there are 4 heads, counted from 0"),
        ("attn_k.0", at(heads=[2]), "is 2, but there are 2 heads"),  # key-value heads
        ("resid_post.0", at(positions=[7]), "position of the edit at resid_post.0 is 7, but there are 7 positions"),
        ("resid_post.0", at(mask=np.ones((3, 7), bool)), "is for 3 rows, the pass has 2"),
        ("resid_post.0", at(mask=np.ones((2, 6), bool)), "is for 6 positions, the pass has 7"),
        ("resid_post.0", at(first=[1, 2, 3]), "first position of the edit at resid_post.0 is for 3 rows"),
    ],
)
def test_a_place_that_the_pass_lacks_is_refused(loaded, site, where, shown):
    for stop in (None, jnp.array(2)):
        with pytest.raises(InputError, match=shown):
            forward(loaded("mistral"), TOKENS, edits=[Edit(site, zero, where=where)], stop=stop)


def test_an_edit_holds_where_it_says_and_nowhere_else(loaded):
    lm, site = loaded("llama"), "attn_z.1"
    clean = forward(lm, TOKENS, capture=[site]).captured[site]
    edit = Edit(site, zero, where=at(heads=[1, 3], mask=MASK))
    expected = np.where((MASK[:, :, None] & np.isin(np.arange(4), [1, 3]))[..., None], 0, clean)
    np.testing.assert_array_equal(forward(lm, TOKENS, capture=[site], edits=[edit]).captured[site], expected)
    by_hand = forward(lm, TOKENS, edits=[Edit(site, put, (jnp.array(expected),))]).logits
    np.testing.assert_allclose(forward(lm, TOKENS, edits=[edit]).logits, by_hand, atol=1e-5)
    # The same with the range as arrays.
    upper = forward(lm, forward(lm, TOKENS, stop=1).residual, edits=[edit], start=jnp.array(1)).logits
    np.testing.assert_allclose(upper, by_hand, atol=1e-5)


def test_a_causal_model_is_only_changed_from_the_edited_position_on(loaded):
    for name in ("gpt2-hub", "qwen3"):
        lm = loaded(name)
        clean = np.asarray(forward(lm, TOKENS).logits)
        edited = np.asarray(forward(lm, TOKENS, edits=[Edit("resid_pre.0", zero, where=at(positions=[4]))]).logits)
        np.testing.assert_allclose(edited[:, :4], clean[:, :4], atol=3e-6 * np.abs(clean).max())
        assert (np.abs(edited - clean)[:, 4:].max(-1) > 1e-3).all()


def test_other_places_and_heads_compile_nothing_new(loaded):
    """2,048 different ablations (feature, head, position, amount) are one program."""
    lm, tokens = loaded("gpt2-hub"), np.ones((1, 8), np.int32)  # a shape that no other test here has
    rng, before, seen = np.random.default_rng(0), _forward_static._cache_size(), set()
    directions = rng.normal(size=(64, lm.config.d_model)).astype(np.float32)
    for i in range(2048):
        feature, head, position = i % 64, i % 4, i // 256
        edits = [
            Edit("resid_post.0", add, (jnp.array(directions[feature]), jnp.float32(i / 100)), at(positions=[position])),
            Edit("attn_z.1", zero, where=at(heads=[head])),
        ]
        logits = forward(lm, tokens, edits=edits).logits
        seen.add(np.asarray(logits).tobytes())
    assert _forward_static._cache_size() == before + 1
    assert len(seen) == 2048


# Interventions


def random(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_interventions_by_hand():
    value = random(2, 3, 4)
    np.testing.assert_array_equal(zero(value), np.zeros((2, 3, 4)))
    np.testing.assert_array_equal(put(value, value + 1), value + 1)
    np.testing.assert_array_equal(fill(value, jnp.arange(4.0)), np.broadcast_to(np.arange(4.0), (2, 3, 4)))
    np.testing.assert_array_equal(resample(value, jnp.array([1, 0])), np.asarray(value)[::-1])
    np.testing.assert_array_equal(scale(value, jnp.array(-2.0)), -2 * value)
    np.testing.assert_allclose(add(value, jnp.array([1.0, 0, 0, 2]), jnp.array(3.0))[1, 1] - value[1, 1], [3, 0, 0, 6])
    direction = jnp.array([0.0, 3.0, 0.0, 4.0])  # of length 5
    without = np.asarray(remove_direction(value, direction))
    np.testing.assert_allclose(without @ np.asarray(direction), 0, atol=1e-6)
    along = (np.asarray(value) @ [0, 0.6, 0, 0.8])[..., None] * np.array([0, 0.6, 0, 0.8])
    np.testing.assert_allclose(without, value - along, atol=1e-6)


def test_mean_ablation_of_a_head():
    mean = random(3, 5)
    np.testing.assert_array_equal(fill(random(2, 4, 3, 5), mean)[1, 2], mean)


class Coder(NamedTuple):
    """A dictionary of 3 features in 4 dimensions."""

    encoder: jax.Array
    decoder: jax.Array
    bias: jax.Array

    def encode(self, x):
        return jax.nn.relu((x - self.bias) @ self.encoder)

    def decode(self, codes, x=None):
        return codes @ self.decoder + self.bias


CODER = Coder(random(4, 3, seed=1), random(3, 4, seed=2), 0.1 * random(4, seed=3))


def test_a_reconstruction_with_and_without_its_error():
    value = random(2, 3, 4)
    rebuilt = CODER.decode(CODER.encode(value))
    np.testing.assert_allclose(reconstruct(value, CODER), rebuilt, rtol=1e-5)
    np.testing.assert_allclose(reconstruct_with_error(value, CODER), value, rtol=1e-5)
    assert np.abs(rebuilt - value).max() > 0.5
    # Both let gradients through the codes alone.
    weights = random(2, 3, 4, seed=9)
    without, along = (
        jax.grad(lambda v, fn=fn: jnp.sum(weights * fn(v, CODER)))(value)
        for fn in (reconstruct, reconstruct_with_error)
    )
    np.testing.assert_allclose(without, along, rtol=1e-5)
    through_codes = jax.grad(lambda v: jnp.sum(weights * CODER.decode(CODER.encode(v))))(value)
    np.testing.assert_allclose(without, through_codes, rtol=1e-5)


def test_set_and_scaled_features_keep_the_error():
    value = random(4, 6, 4)
    codes = np.asarray(CODER.encode(value))
    assert (codes[..., [0, 2]] > 0).any((0, 1)).all()
    direction = np.asarray(CODER.decoder)
    # Ablating a feature takes away its code times its direction, nothing else.
    ablated = set_features(value, CODER, jnp.array([2]), jnp.array(0.0))
    np.testing.assert_allclose(ablated, value - codes[..., 2:] * direction[2], atol=1e-5)
    np.testing.assert_allclose(scale_features(value, CODER, jnp.array([2]), jnp.array(0.0)), ablated, atol=1e-6)
    both = set_features(value, CODER, jnp.array([2, 0]), jnp.array([7.0, 1.0]))
    by_hand = value + (7 - codes[..., 2:]) * direction[2] + (1 - codes[..., :1]) * direction[0]
    np.testing.assert_allclose(both, by_hand, rtol=1e-4, atol=1e-4)
    doubled = scale_features(value, CODER, jnp.array([0]), jnp.array([2.0]))
    np.testing.assert_allclose(doubled, value + codes[..., :1] * direction[0], atol=1e-5)


def test_a_dictionary_of_a_site_with_heads_sees_them_flattened():
    value = random(2, 3, 2, 2)
    flat = reconstruct(value.reshape(2, 3, 4), CODER)
    np.testing.assert_array_equal(reconstruct(value, CODER), flat.reshape(2, 3, 2, 2))


def test_interventions_keep_the_models_dtype():
    value = random(2, 3, 4).astype(jnp.bfloat16)
    vector, number, one = jnp.ones(4), jnp.array(2.0), jnp.array([1])
    made = [
        zero(value), put(value, jnp.ones((2, 3, 4))), fill(value, vector), resample(value, jnp.array([0, 0])),
        scale(value, number), add(value, vector, number), remove_direction(value, vector), reconstruct(value, CODER),
        reconstruct_with_error(value, CODER), set_features(value, CODER, one, number),
        scale_features(value, CODER, one, number),
    ]  # fmt: skip
    assert {(v.dtype, v.shape) for v in made} == {(jnp.dtype(jnp.bfloat16), (2, 3, 4))}


def test_a_patch_from_another_run(loaded):
    """The value of run A at one head and position, put into run B, is what B goes on with."""
    lm, site = loaded("llama"), "attn_z.0"
    a, b = TOKENS[:1], TOKENS[1:]
    from_a, from_b = (forward(lm, tokens, capture=[site]).captured[site] for tokens in (a, b))
    patch = Edit(site, put, (from_a,), at(positions=[3], heads=[2]))
    patched = forward(lm, b, capture=[site], edits=[patch])
    np.testing.assert_array_equal(patched.captured[site][0, 3, 2], from_a[0, 3, 2])
    rest = np.ones(from_b.shape, bool)
    rest[0, 3, 2] = False
    np.testing.assert_array_equal(np.asarray(patched.captured[site])[rest], np.asarray(from_b)[rest])
    # Everything of A put in at every layer's start makes it A.
    whole = forward(lm, a, capture=["resid_pre.0"]).captured["resid_pre.0"]
    np.testing.assert_array_equal(
        forward(lm, b, edits=[Edit("resid_pre.0", put, (whole,))]).logits, forward(lm, a).logits
    )


def test_a_dictionary_in_a_model(loaded):
    """Spliced at a site under a mask: the same as continuing from the spliced stream."""
    lm = loaded("gpt2-hub")
    d = lm.config.d_model
    coder = Coder(random(d, 6, seed=1), random(6, d, seed=2), random(d, seed=3))
    stream = forward(lm, TOKENS, stop=1).residual
    spliced = jnp.where(jnp.array(MASK)[..., None], reconstruct(stream, coder), stream)
    edit = Edit("resid_post.0", reconstruct, (coder,), at(mask=MASK))
    expected = forward(lm, spliced, start=1).logits
    np.testing.assert_allclose(forward(lm, TOKENS, edits=[edit]).logits, expected, atol=1e-4)
