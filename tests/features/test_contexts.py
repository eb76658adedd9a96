"""Where features fire: the samples drawn from a text, and what a feature's card says, against plain counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.features import (
    Activity,
    feature_activity,
    feature_card,
    sample_across_range,
    sample_uniformly,
    window,
)
from sparse_jax.lm import Site, forward, random_model
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from tests.texts import joined_rows

CONTEXT, VOCAB = 30, 20


@pytest.fixture(scope="module")
def text():
    """40 rows of random tokens; documents of 100 tokens behind a separator, 0."""
    stream = np.random.default_rng(0).integers(1, VOCAB, 40 * CONTEXT + 1)
    starts = np.arange(0, 40 * CONTEXT, 100)
    return joined_rows(stream, starts, CONTEXT)


@pytest.fixture(scope="module")
def values():
    """`[row, position]` a sparse feature: silent on some rows, of all strengths on others, below zero on some."""
    generator = np.random.default_rng(1)
    values = generator.exponential(size=(40, CONTEXT)) * (generator.random((40, CONTEXT)) < 0.2)
    values[5:8] = 0
    values[9] = -1
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def mask(values):
    return np.random.default_rng(2).random(values.shape) < 0.9


# Places


def strongest(values, mask, count):
    """The `count` strongest counted places of different rows."""
    found = []
    for flat in np.argsort(-np.where(mask, values, 0), axis=None, kind="stable"):
        row, position = (int(i) for i in np.unravel_index(flat, values.shape))
        if len(found) < count and row not in {r for r, _ in found}:
            found.append((row, position))
    return found


def test_the_strongest_come_first(values, mask):
    places = sample_across_range(values, mask, 0)
    assert [place[:2] for place in places[:3]] == strongest(values, mask, 3)
    assert [label for _, _, label in places[:3]] == ["top"] * 3
    masked_out = np.where(mask, 0, values)
    assert masked_out.max() > 0, "the mask must leave something out"


@pytest.mark.parametrize("seed", range(5))
def test_the_others_are_spread_over_the_range(values, mask, seed):
    places = sample_across_range(values, mask, seed)
    rows = [row for row, _, _ in places]
    assert len(set(rows)) == len(rows)
    largest = np.where(mask, values, 0).max()
    labels = [label for _, _, label in places[3:]]
    # From the strongest part of the range to the weakest, two from each that holds enough.
    parts = [f"{low}–{low + 20} %" for low in (80, 60, 40, 20, 0)]
    assert labels == sorted(labels, key=parts.index)
    assert {label: labels.count(label) for label in parts[2:]} == dict.fromkeys(parts[2:], 2)
    for row, position, label in places:
        share = values[row, position] / largest
        assert mask[row, position]
        assert share > 0
        if label != "top":
            low = int(label.split("–")[0]) / 100
            assert low - 1e-6 <= share <= low + 0.2 + 1e-6


def test_places_by_hand():
    values = np.array([[0, 9, 8], [7, 0, 0], [0, 1, 0], [2, 0, -5], [0, 0, 10]], np.float32)
    mask = np.ones_like(values, bool)
    mask[4, 2] = False
    places = sample_across_range(values, mask, 0, top=1, bins=3, per_bin=1)
    # The range is 0 to 9. Row 0 is used; (2, 1) and (3, 0) are both in the lowest third.
    assert places[:2] == [(0, 1, "top"), (1, 0, "66–100 %")]
    assert places[2] in [(2, 1, "0–33 %"), (3, 0, "0–33 %")]
    assert len(places) == 3
    assert {sample_across_range(values, mask, seed, top=1, bins=3, per_bin=1)[2] for seed in range(20)} == {
        (2, 1, "0–33 %"),
        (3, 0, "0–33 %"),
    }


def test_draws_follow_the_seed(values, mask):
    assert sample_across_range(values, mask, 3) == sample_across_range(values, mask, 3)
    assert sample_across_range(values, mask, 3) != sample_across_range(values, mask, 4)
    assert sample_uniformly(values, mask, 5, 3) == sample_uniformly(values, mask, 5, 3)
    assert sample_uniformly(values, mask, 5, 3) != sample_uniformly(values, mask, 5, 4)


def test_a_silent_feature_has_no_places(values, mask):
    for silent, where in ((np.zeros_like(values), mask), (-values - 1, mask), (values, np.zeros_like(mask))):
        assert sample_across_range(silent, where, 0) == []
        assert sample_uniformly(silent, where, 5, 0) == []


def test_uniform_draws(values, mask):
    before = values.copy(), mask.copy()
    every = {(int(r), int(p)) for r, p in np.argwhere(mask & (values > 0))}
    assert set(sample_uniformly(values, mask, 10**6, 0)) == every
    assert len(sample_uniformly(values, mask, 10**6, 0)) == len(every)
    without = {r for r, _ in every if r % 2}
    drawn = sample_uniformly(values, mask, 10**6, 0, without)
    assert set(drawn) == {place for place in every if place[0] not in without}
    assert len(sample_uniformly(values, mask, 7, 0)) == 7
    # The first drawn is any of them, each about as often.
    small, everywhere = np.array([[1.0, 0.1], [0.0, 9.0], [5.0, 0.0]]), np.ones((3, 2), bool)
    firsts = [sample_uniformly(small, everywhere, 1, seed)[0] for seed in range(800)]
    for place in ((0, 0), (0, 1), (1, 1), (2, 0)):
        assert 150 < firsts.count(place) < 250
    np.testing.assert_array_equal(values, before[0])
    np.testing.assert_array_equal(mask, before[1])


@pytest.mark.parametrize(
    ("position", "length", "start", "stop"),
    [(50, 128, 36, 57), (0, 128, 0, 7), (3, 128, 0, 10), (127, 128, 113, 128), (124, 128, 110, 128), (2, 4, 0, 4)],
)
def test_windows_stay_inside_the_row(position, length, start, stop):
    assert window(position, length) == slice(start, stop)


# Activity


def encode(params, x, tokens):
    """Codes that need the activations and the token ids."""
    return jax.nn.relu(x @ params) + (tokens % 3)[:, None].astype(x.dtype)


@pytest.mark.parametrize(("n_rows", "batch_rows"), [(10, 8), (5, 8), (16, 16)])
def test_activity_is_the_direct_encoding(text, n_rows, batch_rows):
    config = GPTNeoXConfig(2, 8, 16, 2, VOCAB, 32, initializer_range=0.3)
    lm, site = random_model(config, jax.random.key(0)), Site("mlp_out", 1)
    params = jax.random.normal(jax.random.key(1), (8, 12))
    numbers = np.random.default_rng(3).permutation(40)[:n_rows]
    activity = feature_activity(lm, site, text, numbers, encode, params, [7, 0, 3], batch_rows=batch_rows)
    tokens, _, mask, _ = text[numbers]
    x = forward(lm, tokens, capture=[site]).captured[str(site)].reshape(-1, 8)
    codes = np.asarray(encode(params, x, jnp.array(tokens.reshape(-1)))).reshape(n_rows, CONTEXT, 12)
    np.testing.assert_allclose(activity.values, codes[..., [7, 0, 3]], atol=1e-4)
    np.testing.assert_array_equal(activity.mask, mask)
    np.testing.assert_array_equal(activity.rows, numbers)
    np.testing.assert_array_equal(activity.features, [7, 0, 3])


# Cards


def shown(ids):
    return [f"<{i}>" for i in ids]


def test_a_card_against_plain_counting(text, values):
    numbers = np.random.default_rng(4).permutation(40)
    tokens, _, mask, documents = text[numbers]
    activity = Activity(np.array([3, 11]), np.stack([np.zeros_like(values), values], axis=-1), numbers, mask)
    card = feature_card(activity, 1, text, shown, 0)
    firing = np.where(mask & (values > 0), values, 0)
    assert card.index == 11
    assert card.density == pytest.approx(np.count_nonzero(firing) / mask.sum())
    assert card.maximum == pytest.approx(firing.max())
    assert card.mean == pytest.approx(firing.sum() / np.count_nonzero(firing))
    # The tokens by their summed activation, with the mean where it fires on them.
    by_token = {i: firing[(tokens == i) & (firing > 0)] for i in np.unique(tokens[firing > 0])}
    best = sorted(by_token, key=lambda i: -by_token[i].sum())[:6]
    assert [token for token, _ in card.top_tokens] == shown(best)
    np.testing.assert_allclose([mean for _, mean in card.top_tokens], [by_token[i].mean() for i in best], rtol=1e-5)
    # The contexts are the sampled places.
    places = sample_across_range(values, mask, 0)
    assert len(card.contexts) == len(places) > 5
    for context, (row, position, label) in zip(card.contexts, places):
        part = window(position, CONTEXT)
        assert context.label == label
        assert context.tokens == tuple(shown(tokens[row, part]))
        assert context.tokens[context.peak] == f"<{tokens[row, position]}>"
        assert context.activations[context.peak] == pytest.approx(values[row, position])
        np.testing.assert_allclose(context.activations, np.maximum(values[row, part], 0))
        assert context.source == f"document {documents[row, position]}"


def test_the_card_of_a_silent_feature(text, values):
    numbers = np.arange(40)
    activity = Activity(np.array([3]), np.zeros((*values.shape, 1), np.float32), numbers, text[numbers].mask)
    card = feature_card(activity, 0, text, shown, 0)
    assert (card.density, card.maximum, card.mean, card.contexts, card.top_tokens) == (0, 0, 0, (), ())
