"""Trios of an attention head against plain loops over tokens, and their intervention check against plain runs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors.attention_check import (
    Agreement,
    agreement,
    check_trios,
    random_places,
    sample_places,
)
from sparse_jax.connectors.attention_codes import collect_attention
from sparse_jax.connectors.attention_heads import heads_of, read_by, written_by
from sparse_jax.connectors.attention_trios import find_trios, head_vectors
from sparse_jax.connectors.trio_places import figures_of, places_of
from sparse_jax.errors import InputError
from sparse_jax.lm import forward
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.families.llama import LlamaConfig
from sparse_jax.lm.rows import Rows
from tests.connectors.test_attention_maps import coder_of, drawn, turned_by_hand

CONTEXT, VOCAB, D, LAYER, SOURCES = 12, 20, 16, 1, 3
SIZES = {"n_layers": 2, "d_model": D, "d_mlp": 16, "n_heads": 4, "vocab_size": VOCAB, "max_positions": 16}
CONFIG = LlamaConfig(**SIZES, n_kv_heads=2, head_dim=4, qkv_bias=True)
NUMBERS = np.array([4, 0, 2, 7, 5])


def text():
    """10 rows of random tokens; documents of 40 tokens behind a separator, 0."""
    stream = np.random.default_rng(0).integers(1, VOCAB, 10 * CONTEXT + 1)
    starts = np.arange(0, 10 * CONTEXT, 40)
    stream[starts] = 0
    names = tuple(f"document {i}" for i in range(len(starts)))
    return Rows(stream.astype(np.uint16), starts, names, CONTEXT, 1, (0,), None, 0, 0)


@pytest.fixture(scope="module")
def setting():
    """(model, dictionary before, after, text, codes and attention)."""
    lm, before, after = drawn(CONFIG), coder_of("topk", D, 0, k=4), coder_of("topk", D, 1, k=4)
    found = collect_attention(lm, LAYER, text(), NUMBERS, before, after, sources=SOURCES, slots=5, batch_rows=2)
    return lm, before, after, text(), found


@pytest.fixture(scope="module")
def plain(setting):
    """Activations of the rows by site name, and the codes `[row, position, n]`, of plain runs."""
    lm, before, after, rows, _ = setting
    names = ("resid_pre", "attn_pattern", "attn_q", "attn_k", "attn_out")
    got = forward(lm, rows[NUMBERS].tokens, capture=[f"{name}.{LAYER}" for name in names]).captured
    got = {name: np.asarray(got[f"{name}.{LAYER}"]) for name in names}
    codes = [
        np.asarray(coder.encode(jnp.array(got[name].reshape(-1, D)))).reshape(*got[name].shape[:2], -1)
        for coder, name in ((before, "resid_pre"), (after, "attn_out"))
    ]
    return got, codes


def test_codes_and_sources_of_a_text(setting, plain):
    *_, rows, found = setting
    got, codes = plain
    batch = rows[NUMBERS]
    row, position = np.nonzero(batch.mask)
    np.testing.assert_array_equal(found.tokens.row, NUMBERS[row])
    np.testing.assert_array_equal(found.tokens.position, position)
    np.testing.assert_array_equal(found.tokens.document, batch.document[row, position])
    np.testing.assert_array_equal(found.tokens.token, batch.tokens[row, position])
    for side, expected in ((found.before, codes[0]), (found.after, codes[1])):
        np.testing.assert_allclose(side.dense(slice(None)), expected[row, position], rtol=1e-3, atol=1e-4)
        assert side.overflow == 0
    assert len(found.pair()) == len(row)
    number = {place: i for i, place in enumerate(zip(row, position))}
    pattern = got["attn_pattern"]
    for head in range(4):
        for i, (r, p) in enumerate(zip(row, position)):
            seen = sorted((-pattern[r, head, p, q], q) for q in range(p + 1) if batch.mask[r, q])[:SOURCES]
            expected = [number[r, q] for _, q in seen] + [-1] * (SOURCES - len(seen))
            assert found.sources[head, i].tolist() == expected
            np.testing.assert_allclose(found.attention[head, i, : len(seen)], [-w for w, _ in seen], rtol=1e-3)
            assert (found.attention[head, i, len(seen) :] == 0).all()
    at = pattern.transpose(0, 2, 1, 3)[row, position]
    np.testing.assert_allclose(found.own, at[np.arange(len(row)), :, position].mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.uncounted, (at * ~batch.mask[row][:, None]).sum(2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.kept, found.attention.sum(2).mean(1), rtol=1e-4)


def by_hand(setting, head):
    """`[n, n, n_out]` strengths by loops over tokens and sources, in float64."""
    lm, before, after, _, found = setting
    heads = heads_of(lm, LAYER)
    directions, (W, _) = np.asarray(written_by(before)[0], np.float64), read_by(after)
    qw, kw, vw = (
        directions @ np.asarray(w, np.float64) for w in (heads.W_q[head], heads.W_k[head // 2], heads.W_v[head // 2])
    )
    ov = vw @ np.asarray(heads.W_o[head], np.float64) @ np.asarray(W, np.float64)
    c, out = (side.dense(slice(None)).astype(np.float64) for side in (found.before, found.after))
    c = c * found.scale[:, None]
    strength = np.zeros((len(directions), len(directions), ov.shape[1]))
    for i in range(len(found)):
        for j, weight in zip(found.sources[head, i], found.attention[head, i]):
            if j < 0:
                continue
            # Both turned at their places, in place of the query at the distance.
            q, k = (
                turned_by_hand(CONFIG, np.stack([np.zeros_like(a)] * found.tokens.position[at] + [a]))[-1]
                for a, at in ((qw, i), (kw, j))
            )
            logit = np.outer(c[i], c[j]) * (q @ k.T) * CONFIG.head_dim**-0.5
            written = c[j][:, None] * ov * (out[i] > 0)
            strength += weight * logit[:, :, None] * written[None]
    return strength / len(found)


@pytest.mark.parametrize(("head", "pairs", "per_pair"), [(2, 10**6, None), (3, 3, None), (3, 200, 1)])
def test_the_strongest_trios_against_loops(setting, head, pairs, per_pair):
    lm, before, after, _, found = setting
    heads = heads_of(lm, LAYER)
    trios = find_trios(heads, head, found, before, after, count=15, pairs=pairs, per_pair=per_pair)
    expected = by_hand(setting, head)
    np.testing.assert_allclose(
        trios.strength, expected[trios.query, trios.key, trios.output], rtol=1e-3, atol=1e-6 * np.abs(expected).max()
    )
    if per_pair:
        expected = np.where(np.abs(expected) == np.abs(expected).max(2, keepdims=True), expected, 0)
    order = np.sort(np.abs(expected), axis=None)[::-1]
    certain = trios.certain
    assert certain < 15 if pairs == 3 else certain == 15
    np.testing.assert_allclose(np.abs(trios.strength[:certain]), order[:certain], rtol=1e-3)
    # No trio of a pair that was not summed exceeds the bound.
    pairs_above = {*zip(*np.nonzero(np.abs(expected).max(2) > trios.bound))}
    assert len(pairs_above) <= pairs
    # The places of a trio sum to its strength.
    vectors = head_vectors(heads, head, before, after)
    for strength, places in zip(trios.strength, places_of(heads, vectors, found, trios)):
        figures = figures_of(found, places)
        assert figures.strength == pytest.approx(strength, rel=1e-3)
        assert figures.places == len(places) > 0
        assert (places.head == head).all()
        assert figures.own_share == (places.i == places.j).mean()


def turned_logit(q, k, i, j, head):
    """The logit between places i and j of one row's `[position, head, head_dim]`."""
    q, k = turned_by_hand(CONFIG, q), turned_by_hand(CONFIG, k)
    return q[i, head] @ k[j, head // 2] * CONFIG.head_dim**-0.5


def test_the_check_is_what_plain_runs_give(setting):
    lm, before, after, rows, found = setting
    heads = heads_of(lm, LAYER)
    places = random_places(found, 11, seed=3)
    check = check_trios(lm, rows, found, before, after, places, batch_rows=4)
    directions, readers = np.asarray(written_by(before)[0]), np.asarray(read_by(after)[0])
    codes = found.before.dense(slice(None))
    names = [f"{name}.{LAYER}" for name in ("resid_pre", "attn_z", "attn_out", "attn_q", "attn_k")]
    row, position = found.tokens.row, found.tokens.position
    for number, (head, f, g, t, i, j) in enumerate(
        zip(places.head, places.query, places.key, places.output, places.i, places.j)
    ):
        clean = forward(lm, rows[row[i : i + 1]].tokens, capture=names).captured
        x, z, out, q, k = (np.asarray(clean[name]) for name in names)

        def again(at, feature, x=x):
            changed = x.copy()
            changed[0, position[at]] -= codes[at, feature] * directions[feature]
            got = forward(lm, jnp.array(changed), start=LAYER, stop=LAYER + 1, capture=names[1:]).captured
            return [np.asarray(got[name]) for name in names[1:]]

        z1, out1, _, _ = again(j, g)
        reader = np.asarray(heads.W_o[head]) @ readers[:, t]
        p = position[i]
        np.testing.assert_allclose(check.head_live[number], (z1 - z)[0, p, head] @ reader, rtol=1e-2, atol=1e-4)
        np.testing.assert_allclose(check.layer_live[number], (out1 - out)[0, p] @ readers[:, t], rtol=1e-2, atol=1e-4)
        _, _, q1, k1 = again(i, f)
        at = (p, position[j], head)
        change = turned_logit(q1[0], k1[0], *at) - turned_logit(q[0], k[0], *at)
        np.testing.assert_allclose(check.logit_live[number], change, rtol=1e-2, atol=1e-4)
    # The trios' own sizes are the predictions.
    for number in range(4):
        vectors = head_vectors(heads, int(places.head[number]), before, after)
        one = places.at(np.array([number]))
        trios = dataclasses.replace(
            find_trios(heads, int(one.head[0]), found, before, after, count=1, pairs=1),
            query=one.query, key=one.key, output=one.output,
        )  # fmt: skip
        (all_places,) = places_of(heads, vectors, found, trios)
        (same,) = np.flatnonzero((all_places.i == one.i) & (all_places.j == one.j))
        made = all_places.attention[same] * all_places.written[same]
        np.testing.assert_allclose(check.predicted_head[number], -made, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(check.predicted_pair[number], -all_places.logit[same], rtol=1e-3, atol=1e-6)


def test_predictions_are_exact_where_they_must_be(setting):
    """Keys that do not depend on x: the pattern stays, and with a frozen scale the output changes as predicted."""
    _, before, after, rows, _ = setting
    config = GPTNeoXConfig(**SIZES)
    lm = drawn(config)
    kernel = lm.params["blocks"]["attn"]["qkv"]["kernel"]
    lm.params["blocks"]["attn"]["qkv"]["kernel"] = kernel.at[..., 1, :].set(0)
    found = collect_attention(lm, LAYER, rows, NUMBERS, before, after, sources=SOURCES, slots=5, batch_rows=2)
    check = check_trios(lm, rows, found, before, after, random_places(found, 12, seed=4), batch_rows=4)
    np.testing.assert_allclose(check.head_frozen, check.predicted_head, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(check.layer_frozen, check.predicted_layer, rtol=1e-2, atol=1e-4)
    assert np.abs(check.predicted_head).max() > 0.01
    assert np.abs(check.layer_live - check.predicted_layer).max() > 1e-3, "the live scale must matter"
    found = check.agreements()["output, layer, scale frozen"]
    assert found.correlation == pytest.approx(1, abs=1e-3)
    assert found.slope == pytest.approx(1, abs=1e-2)


def test_agreement_by_hand():
    assert agreement(np.array([1, 2, 3]), np.array([3, 5, 7])) == Agreement(3, pytest.approx(1), 2.0, 2.0, 5.0)
    assert np.isnan(agreement(np.ones(3), np.array([1, 2, 3])).slope)
    assert agreement(np.zeros(0), np.zeros(0)).places == 0


def test_sampled_places(setting):
    lm, before, after, _, found = setting
    heads = heads_of(lm, LAYER)
    trios = find_trios(heads, 1, found, before, after, count=6)
    every = places_of(heads, head_vectors(heads, 1, before, after), found, trios)
    sample = sample_places(every, 10**6)
    assert len(sample) == sum((each.i != each.j).sum() for each in every)
    assert len({*zip(sample.query, sample.key, sample.output, sample.i, sample.j)}) == len(sample)
    assert len(sample_places(every, 3)) == 3
    assert (sample.i != sample.j).all()
    with pytest.raises(InputError, match="more tokens"):
        sample_places([each.at(np.flatnonzero(each.i == each.j)) for each in every], 5)


def test_what_is_refused(setting):
    lm, before, after, rows, found = setting
    heads = heads_of(lm, LAYER)
    with pytest.raises(InputError, match="limit_bytes"):
        find_trios(heads, 0, found, before, after, limit_bytes=100)
    with pytest.raises(InputError, match="heads 0 to 3"):
        find_trios(heads, 9, found, before, after)
    with pytest.raises(InputError, match="at least 1"):
        find_trios(heads, 0, found, before, after, count=0)
    with pytest.raises(InputError, match="at least 1"):
        collect_attention(lm, LAYER, rows, NUMBERS, before, after, sources=0)
    with pytest.raises(InputError, match="reads 8 numbers"):
        collect_attention(lm, LAYER, rows, NUMBERS, coder_of("topk", 8, 0, k=2), after)
    places = random_places(found, 2)
    with pytest.raises(InputError, match="attends to another"):
        check_trios(lm, rows, found, before, after, dataclasses.replace(places, j=places.i))
    qwen = heads_of(drawn(dataclasses.replace(CONFIG, qk_norm=True, model_type="qwen3")), LAYER)
    with pytest.raises(InputError, match="Qwen3"):
        find_trios(qwen, 0, found, before, after)
