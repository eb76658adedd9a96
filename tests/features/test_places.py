"""Which places are kept of a stream of firings, against sorting all of them in plain Python; that draws are fair."""

import numpy as np
import pytest
from scipy import stats

from sparse_jax.errors import InputError
from sparse_jax.features.places import (
    Found,
    Keeper,
    Places,
    across_quantiles,
    drawn,
    from_places,
    joined,
    merged,
    priorities,
    strongest,
    to_places,
    token_priorities,
)

ROWS, POSITIONS, FEATURES = 60, 20, 5


def stream(seed=0, share=(0.5, 0.2, 0.02, 0.0, 1.0)):
    """Firings of features of all densities; values of few levels, so that many are equal."""
    generator = np.random.default_rng(seed)
    rows, positions, features = (each.reshape(-1) for each in np.mgrid[:ROWS, :POSITIONS, :FEATURES])
    fires = generator.random(rows.shape) < np.array(share)[features]
    values = np.ceil(generator.exponential(size=rows.shape) * 4).astype(np.float32) / 4
    found = Found(features.astype(np.int32), values, rows.astype(np.int32), positions.astype(np.int32)).at(fires)
    return found.at(generator.permutation(len(found.features)))


# In plain Python, with integers of any size


def mixed(h):
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB % 2**64
    return h ^ (h >> 31)


def priority(seed, row, position, feature):
    h = mixed((seed + 0x9E3779B97F4A7C15) % 2**64)
    for number in (row, position, feature):
        h = mixed(((h ^ number) + 0x9E3779B97F4A7C15) % 2**64)
    return h


def listed(found, feature):
    """(value, row, position) of each of a feature's firings."""
    return [(v, r, p) for f, v, r, p in zip(*(each.tolist() for each in found)) if f == feature]


def plain_strongest(places, slots):
    best = {}
    for value, row, position in sorted(places, key=lambda place: (-place[0], place[1], place[2])):
        best.setdefault(row, (value, row, position))
    return sorted(best.values(), key=lambda place: (-place[0], place[1]))[:slots]


def plain_drawn(places, slots, seed, feature):
    return sorted(places, key=lambda place: priority(seed, place[1], place[2], feature))[:slots]


def rows_of(places, feature):
    """What stands in the slots, and that the others are empty."""
    kept = [(float(v), int(r), int(p)) for v, r, p in zip(*(each[feature] for each in places)) if r >= 0]
    empty = [(float(v), int(r), int(p)) for v, r, p in zip(*(each[feature] for each in places)) if r < 0]
    assert empty == [(0.0, -1, -1)] * len(empty)
    assert len(kept) + len(empty) == places.values.shape[1]
    return kept


def kept_of(found, keep, slots, seed, batches):
    """What a Keeper keeps of the stream in batches, as `collect` feeds it."""
    keeper = Keeper(FEATURES, slots, seed, keep)
    keeper.limit = 50  # so that it sorts in often
    for part in np.array_split(np.arange(len(found.features)), batches):
        each = found.at(part)
        chance = priorities(token_priorities(seed, each.rows, each.positions), each.features)
        keeper.add(each.at(keeper.may_keep(each.features, each.values if keep is strongest else chance)))
    return keeper.places()


def test_priorities_are_a_known_hash():
    found = stream()
    chance = priorities(token_priorities(3, found.rows, found.positions), found.features)
    assert chance.dtype == np.uint64
    for i in range(0, len(chance), 97):
        assert int(chance[i]) == priority(3, *(int(each[i]) for each in (found.rows, found.positions, found.features)))
    # splitmix64's first number from state 0.
    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("slots", [1, 7, 40, 2000])
@pytest.mark.parametrize("batches", [1, 13])
def test_places_against_sorting_all(slots, batches):
    found = stream()
    top = kept_of(found, strongest, slots, 5, batches)
    sample = kept_of(found, drawn, slots, 5, batches)
    for feature in range(FEATURES):
        places = listed(found, feature)
        assert rows_of(top, feature) == plain_strongest(places, slots)
        assert rows_of(sample, feature) == plain_drawn(places, slots, 5, feature)
    assert [each.dtype for each in top] == [np.float32, np.int32, np.int32]


@pytest.mark.parametrize("keep", [strongest, drawn])
@pytest.mark.parametrize("slots", [4, 300])
def test_merged_parts_are_the_whole(keep, slots):
    found = stream(1)
    first = found.rows % 3 == 0
    parts = [to_places(keep(found.at(part), slots, 9), FEATURES, slots) for part in (first, ~first)]
    whole = to_places(keep(found, slots, 9), FEATURES, slots)
    for pair in (parts, parts[::-1]):
        for a, b in zip(merged(*pair, keep, 9), whole):
            np.testing.assert_array_equal(a, b)


def test_places_and_back():
    found = strongest(stream(2), 10)
    back = from_places(to_places(found, FEATURES, 10))
    for a, b in zip(found, back):
        np.testing.assert_array_equal(a, b)
    nothing = found.at(np.zeros(len(found.features), bool))
    for keep in (strongest, drawn):
        places = to_places(keep(joined(nothing, nothing), 3, 0), FEATURES, 3)
        assert (places.rows == -1).all()
        assert not places.values.any()


def test_the_sample_is_uniform():
    """Every one of a feature's firings is drawn as often, by chi squared over seeds; and every order is as likely."""
    found = Found(*(np.array(each) for each in zip(*[(3, np.float32(1 + i), i // 4, i % 4) for i in range(20)])))
    draws = [drawn(found, 5, seed) for seed in range(2000)]
    often = np.bincount([4 * r + p for each in draws for r, p in zip(each.rows, each.positions)], minlength=20)
    assert often.sum() == 10_000
    assert stats.chisquare(often).pvalue > 1e-3
    # Without replacement the counts vary less than chance alone would have it: by 1 - 5/20.
    assert 0.3 < often.var() / (500 * 0.75) < 2.2
    first = np.bincount([int(4 * each.rows[0] + each.positions[0]) for each in draws], minlength=20)
    assert stats.chisquare(first).pvalue > 1e-3
    pairs = np.bincount([int(each.values[0] > each.values[1]) for each in draws])
    assert stats.binomtest(int(pairs[0]), 2000).pvalue > 1e-3


def test_samples_of_features_and_seeds_differ():
    found = stream(3, share=(1, 1, 1, 1, 1))
    sample = to_places(drawn(found, 50, 0), FEATURES, 50)
    other = to_places(drawn(found, 50, 1), FEATURES, 50)
    sets = [{(r, p) for r, p in zip(sample.rows[f].tolist(), sample.positions[f].tolist())} for f in range(FEATURES)]
    assert all(len(a & b) < 12 for i, a in enumerate(sets) for b in sets[:i])  # 2 by chance
    assert (sample.rows != other.rows).mean() > 0.9


# Quantiles


def sample_of(values):
    """A sample of one feature in the order given, each place in a row of its own."""
    values = np.array([values], np.float32)
    rows = np.where(values > 0, np.arange(values.shape[1])[None], -1).astype(np.int32)
    return Places(values, rows, np.where(rows >= 0, 7, -1).astype(np.int32))


def test_quantiles_by_hand():
    places = across_quantiles(sample_of([5, 1, 9, 2, 8, 4, 0, 0]), 3, 2)
    # Ranked: 1 2 | 4 5 | 8 9; within a quantile in the sample's order.
    np.testing.assert_array_equal(places.values, [[[1, 2], [5, 4], [9, 8]]])
    np.testing.assert_array_equal(places.rows, [[[1, 3], [0, 5], [2, 4]]])
    assert (places.positions == 7).all()
    few = across_quantiles(sample_of([5, 1, 0]), 4, 2)
    np.testing.assert_array_equal(few.values, [[[1, 0], [0, 0], [5, 0], [0, 0]]])
    np.testing.assert_array_equal(few.rows, [[[1, -1], [-1, -1], [0, -1], [-1, -1]]])
    silent = across_quantiles(sample_of([0, 0]), 2, 3)
    assert (silent.rows == -1).all()
    assert silent.values.shape == (1, 2, 3)


def test_quantiles_of_distinct_rows():
    sample = Places(
        np.array([[3, 1, 4, 2]], np.float32), np.array([[6, 6, 2, 6]], np.int32), np.array([[0, 1, 2, 3]], np.int32)
    )
    places = across_quantiles(sample, 2, 2, distinct_rows=True)
    np.testing.assert_array_equal(places.values, [[[3, 0], [4, 0]]])
    assert sorted(across_quantiles(sample, 2, 2).values[0].ravel().tolist()) == [1, 2, 3, 4]


def test_quantile_samples_are_uniform_in_their_quantile():
    """Drawn from all firings by way of the sample: each of a quantile's firings about as often, over seeds."""
    values = np.arange(1, 41, dtype=np.float32)
    found = Found(np.zeros(40, np.int32), values, np.arange(40, dtype=np.int32), np.zeros(40, np.int32))
    everything = np.zeros(41)
    for seed in range(1500):
        places = across_quantiles(to_places(drawn(found, 40, seed), 1, 40), 4, 2)
        # The sample holds all firings: the quantiles are exact.
        for quantile, got in enumerate(places.values[0]):
            assert ((got > 10 * quantile) & (got <= 10 * quantile + 10)).all()
        np.add.at(everything, places.values[0].ravel().astype(int), 1)
    for quantile in range(4):
        assert stats.chisquare(everything[1 + 10 * quantile : 11 + 10 * quantile]).pvalue > 1e-3


@pytest.mark.parametrize(("quantiles", "each"), [(0, 1), (3, 0)])
def test_quantiles_that_cannot_be(quantiles, each):
    with pytest.raises(InputError, match="give at least 1"):
        across_quantiles(sample_of([1, 2]), quantiles, each)
