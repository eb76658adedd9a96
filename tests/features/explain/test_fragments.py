"""Fragments and what fires in them, against plain slicing and the direct encoding; which of them are chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.explain import Fragments, Protocol, Reading, Selection, activity, cut, select
from sparse_jax.features.explain import fragments as module
from sparse_jax.features.explain.cases import draw_features, make_cases
from sparse_jax.features.explain.fragments import ROWS, maxima, token_activations
from sparse_jax.lm import Site, forward, random_model
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.row_cuts import Cuts
from sparse_jax.lm.rows import Rows

CONTEXT, VOCAB, LENGTH, WIDTH, N = 30, 40, 8, 8, 12


@pytest.fixture(scope="module")
def text():
    """43 rows of random tokens; documents of 170 tokens behind a separator, 0."""
    stream = np.random.default_rng(0).integers(1, VOCAB, 43 * CONTEXT + 1)
    starts = np.arange(0, 43 * CONTEXT, 170)
    stream[starts] = 0
    names = tuple(f"document {i}" for i in range(len(starts)))
    return Rows(stream.astype(np.uint16), starts, names, CONTEXT, 1, (0,), None, 0, 0)


@pytest.fixture(scope="module")
def reading(text):
    config = GPTNeoXConfig(2, WIDTH, 16, 2, VOCAB, 32, initializer_range=0.3)
    lm, site = random_model(config, jax.random.key(0)), Site("mlp_out", 1)
    dictionary = L1(n_features=N).sized(WIDTH)
    W = jax.random.normal(jax.random.key(1), (N, WIDTH))
    params = {"W_enc": W.T, "W_dec": W, "b_enc": jnp.full(N, -0.1), "b_dec": jnp.zeros(WIDTH)}
    return Reading(lm, site, text, Normalised(dictionary, params, Normaliser(jnp.zeros(WIDTH), jnp.float32(0.5))))


@pytest.fixture(scope="module")
def codes(reading, text):
    """`[rows, position, n]` by the plain way, 0 where a token does not count."""
    tokens, _, mask, _ = text[np.arange(43)]
    x = forward(reading.lm, jnp.array(tokens), capture=[reading.site]).captured[str(reading.site)].reshape(-1, WIDTH)
    params = reading.coder.params
    codes = np.maximum(np.asarray(x / 0.5) @ np.asarray(params["W_enc"]) + np.asarray(params["b_enc"]), 0)
    return codes.reshape(43, CONTEXT, N) * mask[..., None]


NUMBERS = np.random.default_rng(5).permutation(43)[:21]


def test_fragments_are_parts_of_rows(text):
    found = cut(text, NUMBERS, LENGTH)
    tokens, _, mask, document = text[np.arange(43)]
    assert len(found) == 3 * 21
    assert set(zip(found.rows.tolist(), found.starts.tolist())) == {(int(r), s) for r in NUMBERS for s in (0, 8, 16)}
    assert (np.diff(found.rows) >= 0).all()
    for i, (row, start) in enumerate(zip(found.rows, found.starts)):
        part = slice(start, start + LENGTH)
        np.testing.assert_array_equal(found.tokens[i], tokens[row, part])
        np.testing.assert_array_equal(found.counts[i], mask[row, part])
        assert found.documents[i].tolist() == [document[row, part].min(), document[row, part].max()]
    assert not found.counts.all()


def test_what_hardly_counts_is_left_out(text):
    """Rows that overlap by 20 tokens: of each but the first of a document, the first two fragments have counted."""
    cuts = Cuts(np.array([0, 10, 20, 40]), np.array([30, 30, 12, 30]), np.array([0, 20, 0, 21]))
    short = dataclasses.replace(text, cuts=cuts)
    found = cut(short, np.arange(4), LENGTH)
    # Row 1 has counted up to position 20, so 4 tokens of its last fragment count, in row 3 only 3; row 2 ends at 12, in
    # the middle of its second fragment.
    assert list(zip(found.rows.tolist(), found.starts.tolist())) == [(0, 0), (0, 8), (0, 16), (1, 16), (2, 0)]
    assert found.counts.sum(axis=1).tolist() == [7, 8, 8, 4, 7]
    assert found.documents[-1].tolist() == [0, 0]


def test_fragments_that_fit_no_row(text):
    for length in (0, 31):
        with pytest.raises(InputError, match=f"fragments of {length} tokens do not fit rows of 30"):
            cut(text, NUMBERS, length)


def test_what_fires_against_the_direct_encoding(reading, text, codes):
    fragments = cut(text, NUMBERS, LENGTH)
    assert len(NUMBERS) % ROWS, "the last batch must be ragged"
    parts = np.stack([codes[r, s : s + LENGTH] for r, s in zip(fragments.rows, fragments.starts)])
    found = activity(reading, fragments)
    np.testing.assert_array_equal(found.fragments, (parts.max(axis=1) > 0).sum(axis=0))
    np.testing.assert_array_equal(found.fired, (codes[NUMBERS] > 0).sum(axis=(0, 1)))
    np.testing.assert_allclose(found.sums, codes[NUMBERS].sum(axis=(0, 1)), rtol=1e-4)
    assert found.tokens == text[NUMBERS].mask.sum()
    assert found.l0 == pytest.approx((codes[NUMBERS] > 0).sum() / found.tokens)
    np.testing.assert_allclose(maxima(reading, fragments, [7, 0, 3]), parts.max(axis=1)[:, [7, 0, 3]], atol=1e-5)
    wanted = [(7, 4), (3, 0), (7, 60), (0, 4), (3, 31)]
    values = token_activations(reading, fragments, wanted)
    assert set(values) == set(wanted)
    for feature, i in wanted:
        np.testing.assert_allclose(values[feature, i], parts[i, :, feature], atol=1e-5)


def test_large_activations_do_not_count(reading, text, codes):
    fragments = cut(text, NUMBERS, LENGTH)
    x = forward(reading.lm, jnp.array(text[NUMBERS].tokens), capture=[reading.site]).captured[str(reading.site)]
    norms = np.linalg.norm(np.asarray(x), axis=-1)
    limit = float(np.median(norms))
    found = activity(reading._replace(max_norm=limit), fragments)
    np.testing.assert_array_equal(found.fired, ((codes[NUMBERS] > 0) & (norms <= limit)[..., None]).sum(axis=(0, 1)))
    assert found.fired.sum() < activity(reading, fragments).fired.sum()


def test_one_compilation_whatever_the_features(reading, text):
    fragments = cut(text, NUMBERS, LENGTH)
    module._some_codes.clear_cache()
    for features in ([1], [2], [3]):
        maxima(reading, fragments, features)
        token_activations(reading, fragments, [(features[0], 0)])
    assert module._maxima._cache_size() == 1
    assert module._some_codes._cache_size() == 1


# Selection


def fragments_of(rows, documents, tokens=None):
    n = len(rows)
    tokens = np.arange(4 * n).reshape(n, 4) if tokens is None else tokens
    return Fragments(
        4,
        np.asarray(rows, np.int64),
        np.zeros(n, np.int32),
        np.asarray(tokens, np.int32),
        np.ones((n, 4), bool),
        np.stack([documents, documents], axis=1).astype(np.int32),
    )


def many(n=200, documents=100, active=120, seed=0):
    generator = np.random.default_rng(seed)
    maxima = np.zeros(n, np.float32)
    maxima[generator.permutation(n)[:active]] = generator.exponential(size=active) + 0.01
    return maxima, fragments_of(np.arange(n) // 2, np.arange(n) * documents // n)


@pytest.mark.parametrize("seed", range(8))
def test_the_protocol(seed):
    maxima, fragments = many(seed=seed)
    found = select(maxima, fragments, Protocol(), (seed,))
    assert isinstance(found, Selection)
    top20 = set(np.argsort(-maxima)[:20].tolist())
    assert (len(found.explaining), len(found.top), len(found.random), len(found.silent)) == (5, 5, 5, 10)
    assert set(found.explaining) <= top20
    assert set(found.top) <= top20
    everything = [*found.explaining, *found.top, *found.random, *found.silent]
    assert len(set(everything)) == 25
    assert all(maxima[i] > 0 for i in found.random)
    assert all(maxima[i] == 0 for i in found.silent)
    assert maxima[list(found.explaining)].tolist() == sorted(maxima[list(found.explaining)], reverse=True)
    assert found.disjoint_by == "document"
    explained = {int(fragments.documents[i, 0]) for i in found.explaining}
    assert not explained & {int(fragments.documents[i, 0]) for i in (*found.top, *found.random, *found.silent)}
    assert found == select(maxima, fragments, Protocol(), (seed,))
    assert found != select(maxima, fragments, Protocol(), (seed + 1,))


@pytest.mark.parametrize("seed", range(8))
def test_few_documents_are_disjoint_by_row(seed):
    maxima, fragments = many(documents=1, seed=seed)
    found = select(maxima, fragments, Protocol(), (seed,))
    assert found.disjoint_by == "row"
    explained = {int(fragments.rows[i]) for i in found.explaining}
    assert not explained & {int(fragments.rows[i]) for i in (*found.top, *found.random, *found.silent)}


def test_fragments_across_documents_belong_to_both():
    maxima, fragments = many(documents=50)
    documents = fragments.documents.copy()
    documents[:, 1] += 1
    crossing = Fragments(4, fragments.rows, fragments.starts, fragments.tokens, fragments.counts, documents)
    for seed in range(8):
        found = select(maxima, crossing, Protocol(), (seed,))
        if found.disjoint_by == "document":
            explained = {d for i in found.explaining for d in documents[i].tolist()}
            assert not explained & {d for i in (*found.top, *found.random) for d in documents[i].tolist()}


def test_nineteen_active_fragments_are_too_few_and_twenty_are_enough():
    for active, enough in ((19, False), (20, True)):
        for seed in range(10):
            maxima, fragments = many(active=active, seed=seed)
            found = select(maxima, fragments, Protocol(), (seed,))
            assert isinstance(found, Selection) == enough
            assert enough or found == "fewer than 20 active fragments"


def test_the_same_text_twice_is_not_scored():
    """All fragments of the same two texts: what was explained from would be scored."""
    maxima, fragments = many()
    tokens = np.tile(np.arange(4), (200, 1)) + 10 * (np.arange(200) % 8)[:, None]
    copies = fragments_of(fragments.rows, fragments.documents[:, 0], tokens)
    for seed in range(20):
        found = select(maxima, copies, Protocol(), (seed,))
        if isinstance(found, Selection):
            explained = {tokens[i].tobytes() for i in found.explaining}
            assert not explained & {tokens[i].tobytes() for i in (*found.top, *found.random, *found.silent)}
    same = fragments_of(fragments.rows, fragments.documents[:, 0], np.tile(np.arange(4), (200, 1)))
    assert select(maxima, same, Protocol(), (0,)) == "active in too few rows"


def test_random_fragments_are_any_active_ones():
    maxima, fragments = many()
    drawn = [i for seed in range(40) for i in select(maxima, fragments, Protocol(), (seed,)).random]
    strongest = set(np.argsort(-maxima)[:20].tolist())
    # A sixth of the 120 active ones; fewer, for what is explained from or scored as top is not drawn again.
    assert 0 < np.mean([i in strongest for i in drawn]) < 0.2
    assert len(set(drawn)) > 60


def test_a_feature_that_is_active_everywhere_has_no_silent_fragments():
    maxima, fragments = many(active=200)
    assert select(maxima, fragments, Protocol(), (0,)).silent == ()


def test_equally_strong_fragments_come_from_all_of_the_text():
    _, fragments = many()
    found = [i for s in range(40) for i in select(np.ones(200), fragments, Protocol(), (s,)).explaining]
    assert 60 < np.mean(found) < 140


def test_pools_that_are_too_small():
    with pytest.raises(InputError, match="pools are too small"):
        Protocol(top=9)
    with pytest.raises(InputError, match="must be positive"):
        Protocol(explain=0)


# Cases


def test_cases_show_what_was_selected(reading, text, codes):
    fragments = cut(text, np.arange(43), LENGTH)
    active = activity(reading, fragments)
    strings = lambda ids: [f"<{i}>" for i in ids]  # noqa: E731
    cases, skipped = make_cases(reading, fragments, active, "dictionary", [7, 0, 3], Protocol(), strings, (0,))
    assert [case.feature for case in cases] + list(skipped) == [7, 0, 3]
    tokens, _, mask, document = text[np.arange(43)]
    for case in cases:
        of_feature = codes[..., case.feature]
        assert case.density == pytest.approx((of_feature > 0).sum() / mask.sum())
        assert case.mean == pytest.approx(of_feature[of_feature > 0].mean(), rel=1e-4)
        assert case.maximum == pytest.approx(of_feature[:, : 3 * LENGTH].max(), rel=1e-4)
        rows = {e.row for e in case.explaining}
        assert not rows & {e.row for e in (*case.scored, *case.silent)}
        for e in (*case.explaining, *case.scored, *case.silent):
            part = slice(e.start, e.start + LENGTH)
            assert list(e.tokens) == strings(tokens[e.row, part])
            np.testing.assert_allclose(e.activations, of_feature[e.row, part], atol=1e-5)
            assert e.document == text.documents[document[e.row, e.start]]
        assert all(e.activations.max() == 0 for e in case.silent)
    # A feature's fragments do not depend on which others are asked for.
    (alone,), _ = make_cases(reading, fragments, active, "dictionary", [cases[-1].feature], Protocol(), strings, (0,))
    places = lambda case: [(e.row, e.start) for e in (*case.explaining, *case.scored, *case.silent)]  # noqa: E731
    assert places(alone) == places(cases[-1])


def test_features_are_drawn_from_those_that_are_active_enough():
    active = np.array([0, 30, 19, 20, 100, 5, 40, 0])
    taken, skipped = draw_features(active, 3, 20, (0,))
    assert len(taken) == 3
    assert all(active[feature] >= 20 for feature in taken)
    assert all(active[feature] < 20 for feature in skipped)
    assert set(draw_features(active, 9, 20, (0,))[0]) == {1, 3, 4, 6}
    assert set(draw_features(active, 9, 20, (0,))[1]) == {0, 2, 5, 7}
    firsts = [draw_features(active, 1, 20, (seed,))[0][0] for seed in range(400)]
    assert all(60 < firsts.count(feature) < 140 for feature in (1, 3, 4, 6))
