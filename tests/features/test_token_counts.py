"""Counts of pairs of a feature and a token, against plain dictionaries; what is dropped where there are too many."""

from collections import defaultdict

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.token_counts import TokenCounter

FEATURES, VOCAB = 6, 40
EDGES = np.stack([np.array([0.25, 0.5, 1.5], np.float32) * (1 + f) for f in range(FEATURES)])


def stream(seed=0, count=5000):
    """Firings of all features but 2, rarely on high tokens; some values on an edge."""
    generator = np.random.default_rng(seed)
    features = generator.choice([0, 1, 3, 4, 5], count)
    tokens = np.minimum(generator.geometric(0.1, count) - 1, VOCAB - 1).astype(np.int32)
    values = generator.exponential(size=count).astype(np.float32) + np.float32(1e-3)
    values[::7] = EDGES[features[::7], 1]
    return features, tokens, values


def counted(parts, chunk=1 << 20, capacity=10_000, group=None, vocab=VOCAB):
    counter = TokenCounter(EDGES, vocab, capacity, chunk)
    if group:
        counter._group = group
    for features, tokens, values in parts:
        counter.occurrences += np.bincount(tokens, minlength=vocab)  # each firing stands for a token here
        counter.add(features, tokens, values)
    return counter.result()


def plain(features, tokens, values):
    """(feature, token) -> [count, sum, counts in bins]."""
    made = defaultdict(lambda: [0, 0.0, [0] * 4])
    for f, t, v in zip(features.tolist(), tokens.tolist(), values.tolist()):
        entry = made[f, t]
        entry[0] += 1
        entry[1] += v
        entry[2][sum(v > edge for edge in EDGES[f].tolist())] += 1
    return made


def assert_is(counts, expected):
    pairs = list(zip(counts.features.tolist(), counts.tokens.tolist()))
    assert pairs == sorted(expected)
    assert counts.starts.tolist() == [sum(f < feature for f, _ in pairs) for feature in range(FEATURES + 1)]
    np.testing.assert_array_equal(counts.counts, [expected[pair][0] for pair in pairs])
    np.testing.assert_allclose(counts.sums, [expected[pair][1] for pair in pairs], rtol=1e-12)
    np.testing.assert_array_equal(counts.bins, [expected[pair][2] for pair in pairs])


def split(firings, parts):
    return [tuple(each[i] for each in firings) for i in np.array_split(np.arange(len(firings[0])), parts)]


@pytest.mark.parametrize("chunk", [1 << 20, 700, 1])
@pytest.mark.parametrize("group", [None, 1, 4])
def test_counts_against_dictionaries(chunk, group):
    firings = stream()
    counts = counted(split(firings, 50), chunk, group=group)
    expected = plain(*firings)
    assert_is(counts, expected)
    assert not counts.lost.any()
    assert counts.sums.dtype == np.float64
    one = counts.of(3)
    mine = {t: entry for (f, t), entry in expected.items() if f == 3}
    assert one.tokens.tolist() == sorted(mine)
    assert one.counts.tolist() == [mine[t][0] for t in sorted(mine)]
    np.testing.assert_allclose(one.sums, [mine[t][1] for t in sorted(mine)])
    assert one.bins.tolist() == [mine[t][2] for t in sorted(mine)]
    assert len(counts.of(2).tokens) == 0
    np.testing.assert_array_equal(counts.bin_counts().sum(axis=1), np.bincount(firings[0], minlength=FEATURES))


def test_a_value_on_an_edge_is_in_the_lower_bin():
    features, tokens, values = (
        np.array([0, 0, 0]),
        np.array([1, 1, 1], np.int32),
        np.array([0.25, 0.5, 1.51], np.float32),
    )
    np.testing.assert_array_equal(counted([(features, tokens, values)]).bins, [[1, 1, 0, 1]])


def test_keys_beyond_32_bits():
    vocab = 1 << 31
    counter = TokenCounter(EDGES, vocab, 100)
    assert counter._group == 2
    features, tokens = np.array([5, 0, 5, 4]), np.array([vocab - 1, 3, vocab - 1, vocab - 1], np.int32)
    counter.occurrences = np.zeros(0, np.int64)  # 16 GB otherwise
    counter.add(features, tokens, np.array([1, 2, 3, 4], np.float32))
    counter._sort_in()
    (table,) = counter._tables
    assert table.keys.tolist() == [3, 5 * vocab - 1, 6 * vocab - 1]
    assert table.sums.tolist() == [2, 4, 4]


def test_merged_parts_are_the_whole():
    firings = stream(1)
    parts = split(firings, 2)
    merged = counted(parts[:1]).merge(counted(parts[1:]))
    assert_is(merged, plain(*firings))
    whole = counted([firings])
    np.testing.assert_array_equal(merged.occurrences, whole.occurrences)
    empty = counted([])
    assert len(empty.tokens) == 0
    assert_is(empty.merge(whole), plain(*firings))


def test_other_edges_do_not_merge():
    a = counted([stream()])
    b = TokenCounter(EDGES * 2, VOCAB, 100).result()
    with pytest.raises(InputError, match="edges"):
        a.merge(b)


def test_the_rarest_are_dropped_and_said():
    firings = stream(2)
    whole, bounded = counted([firings]), counted(split(firings, 10), chunk=500, capacity=60)
    assert len(bounded.tokens) <= 60 < len(whole.tokens)
    fired = np.bincount(firings[0], minlength=FEATURES)
    kept = np.bincount(bounded.features, bounded.counts, FEATURES)
    np.testing.assert_array_equal(kept + bounded.lost, fired)
    expected = plain(*firings)
    for feature in range(FEATURES):
        one = bounded.of(feature)
        for token, count in zip(one.tokens.tolist(), one.counts.tolist()):
            true = expected[feature, token][0]
            assert true - bounded.lost[feature] <= count <= true
    # What occurs most often is still there.
    common = sorted(expected, key=lambda pair: -expected[pair][0])[:20]
    assert set(common) <= set(zip(bounded.features.tolist(), bounded.tokens.tolist()))
