"""Places where features fire, a few kept of each: the strongest, or a uniform sample.

A place is (number of the row in the text, position in the row). What is kept of a text does not depend on the order it
is read in, so that what was kept of disjoint parts merges into exactly what would have been kept of the whole:

    strongest   the largest value first, then the lowest row and position; of a row its strongest place only
    sample      the places of lowest priority, a 64-bit hash of (seed, row, position, feature): without replacement,
                each set of places as likely as any other, in random order

Source: the sample is the "bottom-k" of Cohen and Kaplan 2007, "Summarizing data using bottom-k sketches".
"""

from typing import NamedTuple

import numpy as np

from sparse_jax.errors import InputError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NEVER = np.uint64(2**64 - 1)
# Firings that are put aside before they are sorted in, at least.
_ASIDE = 1 << 18


class Places(NamedTuple):
    """Places of every feature, `[n_features, slots]`; an empty slot has row -1, position -1 and value 0.

    values: float32, the feature's code there.
    rows: int32, number of the row in the text.
    positions: int32, in the row.
    """

    values: np.ndarray
    rows: np.ndarray
    positions: np.ndarray


class Found(NamedTuple):
    """Firings one after the other, all `[firings]`."""

    features: np.ndarray
    values: np.ndarray
    rows: np.ndarray
    positions: np.ndarray

    def at(self, chosen: np.ndarray) -> "Found":
        """Those that are chosen, by number or by a mask."""
        return Found(*(each[chosen] for each in self))


def joined(*parts: Found) -> Found:
    """All of them one after the other."""
    return Found(*(np.concatenate(each) for each in zip(*parts)))


def no_firings() -> Found:
    """Nothing found."""
    return Found(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.int32))


# Priorities


def _mixed(h: np.ndarray) -> np.ndarray:
    """The end of splitmix64 (Steele et al. 2014): every bit of the answer depends on every bit of the uint64 `h`."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _next(h: np.ndarray, number: np.ndarray) -> np.ndarray:
    return _mixed((h ^ np.asarray(number).astype(np.uint64)) + _GOLDEN)


def token_priorities(seed: int, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint64 for each token: uniform, a pure function of the seed and of where it stands."""
    start = _mixed(np.array([seed], np.uint64) + _GOLDEN)
    return _next(_next(start, rows), positions)


def priorities(of_tokens: np.ndarray, features: np.ndarray) -> np.ndarray:
    """uint64 for each firing, from its token's priority and its feature."""
    return _next(of_tokens, features)


# What is kept


def _first_of_each(features: np.ndarray, slots: int) -> np.ndarray:
    """Which of the sorted features are among the first `slots` of their own."""
    return _ranks(features) < slots


def _ranks(features: np.ndarray) -> np.ndarray:
    """Place of each among those of the same feature; `features` is sorted."""
    if not len(features):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, features[1:] != features[:-1]])
    return np.arange(len(features)) - np.repeat(starts, np.diff(np.r_[starts, len(features)]))


def _falling(values: np.ndarray, then: np.ndarray) -> np.ndarray:
    """uint64 that ascends as `values` (float32, not below 0) fall, and with `then` where they are equal."""
    # The bits of such numbers, read as integers, ascend with them.
    return ((~values.view(np.uint32)).astype(np.uint64) << np.uint64(32)) | then.astype(np.uint64)


def strongest(found: Found, slots: int, seed: int = 0) -> Found:
    """The `slots` strongest places of each feature, one of each row at most; by feature, strongest first."""
    feature_row = (found.features.astype(np.int64) << 32) | found.rows
    order = np.lexsort((_falling(found.values, found.positions), feature_row))
    feature_row = feature_row[order]
    found = found.at(order[np.r_[True, feature_row[1:] != feature_row[:-1]][: len(order)]])
    found = found.at(np.lexsort((_falling(found.values, found.rows), found.features)))
    return found.at(_first_of_each(found.features, slots))


def drawn(found: Found, slots: int, seed: int) -> Found:
    """A uniform sample of `slots` places of each feature, or all; by feature, in random order."""
    chance = priorities(token_priorities(seed, found.rows, found.positions), found.features)
    order = np.argsort(chance)
    # Two sorts, the second stable: of 16 bits it is a radix sort, 20 times as fast as sorting by both at once.
    features = found.features[order]
    features = features.astype(np.uint16) if features.max(initial=0) < 1 << 16 else features
    found = found.at(order[np.argsort(features, kind="stable")])
    return found.at(_first_of_each(found.features, slots))


def to_places(kept: Found, n_features: int, slots: int) -> Places:
    """What `strongest` or `drawn` kept, as arrays."""
    made = Places(
        np.zeros((n_features, slots), np.float32),
        np.full((n_features, slots), -1, np.int32),
        np.full((n_features, slots), -1, np.int32),
    )
    where = kept.features, _ranks(kept.features)
    for array, values in zip(made, kept[1:]):
        array[where] = values
    return made


def from_places(places: Places) -> Found:
    """The slots that are not empty."""
    features, slots = np.nonzero(places.rows >= 0)
    return Found(features.astype(np.int32), *(each[features, slots] for each in places))


def merged(a: Places, b: Places, keep, seed: int) -> Places:
    """What would have been kept of both texts; `keep` is `strongest` or `drawn`."""
    n, slots = a.values.shape
    return to_places(keep(joined(from_places(a), from_places(b)), slots, seed), n, slots)


class Keeper:
    """Keeps `slots` places of each feature of a stream of firings.

    What cannot be kept any more is passed over by a threshold for each feature; what might be is put aside and sorted
    in once there is enough of it.
    """

    def __init__(self, n_features: int, slots: int, seed: int, keep):
        """Args: see `merged`; `keep` is `strongest` or `drawn`."""
        self.n_features, self.slots, self.seed, self.keep = n_features, slots, seed, keep
        self.limit = max(_ASIDE, n_features * slots)
        self._kept, self._aside, self._count = no_firings(), [], 0
        # Values from which, or priorities up to which, a firing may be kept.
        self.threshold = np.zeros(n_features, np.float32) if keep is strongest else np.full(n_features, _NEVER)

    def may_keep(self, features: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Which firings might be kept, by number: `values` are their codes, or for `drawn` their priorities."""
        threshold = self.threshold[features]
        return np.flatnonzero(values >= threshold if self.keep is strongest else values <= threshold)

    def add(self, found: Found) -> None:
        """Put firings aside that `may_keep` has let through."""
        self._aside.append(found)
        self._count += len(found.features)
        if self._count > self.limit:
            self._sort_in()

    def _sort_in(self) -> None:
        self._kept = self.keep(joined(self._kept, *self._aside), self.slots, self.seed)
        self._aside, self._count = [], 0
        last = np.flatnonzero(_ranks(self._kept.features) == self.slots - 1)
        features, _, rows, positions = worst = self._kept.at(last)
        if self.keep is strongest:
            self.threshold[features] = worst.values
        else:
            self.threshold[features] = priorities(token_priorities(self.seed, rows, positions), features)

    def places(self) -> Places:
        """What was kept."""
        self._sort_in()
        return to_places(self._kept, self.n_features, self.slots)


# Samples across quantiles


def across_quantiles(sample: Places, quantiles: int, per_quantile: int, *, distinct_rows: bool = False) -> Places:
    """Places drawn uniformly from each quantile of a feature's activations where it fires.

    The quantiles are those of the sample: equally many of its places in each, the lowest first. With fewer places than
    quantiles some stay empty.

    Args:
        sample: uniform, in random order.
        quantiles: how many.
        per_quantile: places of each, at most.
        distinct_rows: no row twice for a feature, so that contexts do not overlap (firings in rows where the feature
            fires often are then drawn less often).

    Returns:
        Arrays `[n_features, quantiles, per_quantile]`.

    Raises:
        InputError: a number below 1.
    """
    if quantiles < 1 or per_quantile < 1:
        raise InputError(f"{per_quantile} places of each of {quantiles} quantiles: give at least 1")
    there = sample.rows >= 0
    if distinct_rows:
        there &= _first_in_row(sample.rows)
    n, slots = there.shape
    # Stable: of equal values the one that was drawn first is the lower.
    order = np.argsort(np.where(there, sample.values, np.inf), axis=1, kind="stable")
    rank = np.empty((n, slots), np.int64)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(slots), (n, slots)), axis=1)
    group = rank * quantiles // np.maximum(there.sum(axis=1, keepdims=True), 1)
    shape = (n, quantiles, per_quantile)
    made = Places(np.zeros(shape, np.float32), np.full(shape, -1, np.int32), np.full(shape, -1, np.int32))
    for quantile in range(quantiles):
        inside = there & (group == quantile)
        number = np.cumsum(inside, axis=1)
        features, slot = np.nonzero(inside & (number <= per_quantile))
        for array, values in zip(made, sample):
            array[features, quantile, number[features, slot] - 1] = values[features, slot]
    return made


def _first_in_row(rows: np.ndarray) -> np.ndarray:
    """`[n, slots]`: whether no earlier slot of the feature is of the same row."""
    order = np.argsort(rows, axis=1, kind="stable")
    by_row = np.take_along_axis(rows, order, axis=1)
    fresh = np.ones(rows.shape, bool)
    fresh[:, 1:] = by_row[:, 1:] != by_row[:, :-1]
    made = np.empty(rows.shape, bool)
    np.put_along_axis(made, order, fresh, axis=1)
    return made
