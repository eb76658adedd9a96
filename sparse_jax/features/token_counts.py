"""On which tokens features fire, how often and how strongly: for every pair that occurs, not for all that could.

    counts.of(12)              tokens, firings, sums and firings in each bin of activation, of feature 12

The pairs of 5 million tokens are a small part of n_features x vocabulary. They are kept sorted, in arrays.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparse_jax.errors import InputError

# Firings that are put aside before they are sorted in, 8 bytes each.
CHUNK = 1 << 22


class FeatureTokens(NamedTuple):
    """The tokens on which one feature fires, ascending; all `[tokens]` but `bins`.

    tokens: int32 ids.
    counts: int64 firings.
    sums: float64 sum of the codes.
    bins: `[tokens, bins]` int32 firings by the activation's bin, the weakest first.
    """

    tokens: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    bins: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """Pairs of a feature and a token on which it fires, by feature, then by token id.

    Attributes:
        starts: `[n_features + 1]` int64: the pairs of feature f are starts[f] to starts[f + 1] - 1.
        tokens: `[pairs]` int32 token ids.
        sums: `[pairs]` float64 sum of the codes.
        bins: `[pairs, bins]` int32 firings by bin: bin b holds what is above edge b - 1 and not above edge b; the last
            bin is open.
        edges: `[n_features, bins - 1]` float32, ascending.
        occurrences: `[vocab]` int64: how often each token counted, whatever fired.
        lost: `[n_features]` int64 firings on rare tokens that were dropped to keep memory bounded; 0 where counts are
            exact.
    """

    starts: np.ndarray
    tokens: np.ndarray
    sums: np.ndarray
    bins: np.ndarray
    edges: np.ndarray
    occurrences: np.ndarray
    lost: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """`[pairs]` int64 firings."""
        return self.bins.sum(axis=1, dtype=np.int64)

    @property
    def features(self) -> np.ndarray:
        """`[pairs]` int64 feature of each pair."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def of(self, feature: int) -> FeatureTokens:
        """The tokens of one feature."""
        part = slice(self.starts[feature], self.starts[feature + 1])
        bins = self.bins[part]
        return FeatureTokens(self.tokens[part], bins.sum(axis=1, dtype=np.int64), self.sums[part], bins)

    def bin_counts(self) -> np.ndarray:
        """`[n_features, bins]` int64 firings by bin, of all tokens together (those in `lost` left out)."""
        made = np.zeros((len(self.starts) - 1, self.bins.shape[1]), np.int64)
        np.add.at(made, self.features, self.bins)
        return made

    def merge(self, other: "TokenCounts") -> "TokenCounts":
        """Counts of both texts.

        Raises:
            InputError: they have other features, tokens or edges.
        """
        if self.occurrences.shape != other.occurrences.shape or not np.array_equal(self.edges, other.edges):
            raise InputError("token counts of other features, vocabularies or edges of bins: give the same `edges`")
        table = _both(_table(self), _table(other))
        return _made(table, self.edges, self.occurrences + other.occurrences, self.lost + other.lost)


class _Table(NamedTuple):
    keys: np.ndarray  # feature x vocab + token, ascending
    sums: np.ndarray
    bins: np.ndarray


def _table(counts: TokenCounts) -> _Table:
    return _Table(counts.features * len(counts.occurrences) + counts.tokens, counts.sums, counts.bins)


def _made(table: _Table, edges: np.ndarray, occurrences: np.ndarray, lost: np.ndarray) -> TokenCounts:
    features, tokens = np.divmod(table.keys, len(occurrences))
    starts = np.searchsorted(features, np.arange(len(edges) + 1))
    return TokenCounts(starts, tokens.astype(np.int32), table.sums, table.bins, edges, occurrences, lost)


def _both(a: _Table, b: _Table) -> _Table:
    """Sums of two tables."""
    keys = np.concatenate([a.keys, b.keys])
    # Stable: two ascending runs, which it merges without sorting.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    fresh = np.r_[True, keys[1:] != keys[:-1]][: len(keys)]
    starts, again = np.flatnonzero(fresh), np.flatnonzero(~fresh)
    of = np.cumsum(fresh)[again] - 1  # which entry of the answer the second of a pair belongs to
    sums, bins = np.concatenate([a.sums, b.sums]), np.concatenate([a.bins, b.bins])
    made = _Table(keys[starts], sums[order[starts]], bins[order[starts]])
    made.sums[of] += sums[order[again]]
    made.bins[of] += bins[order[again]]
    return made


class TokenCounter:
    """Counts a stream of firings.

    Firings are put aside, CHUNK at a time, and sorted into a table; tables of similar size are merged, so that each
    pair is moved a logarithmic number of times. A table of more than `capacity` pairs drops its rarest pairs.
    """

    def __init__(self, edges: np.ndarray, vocab_size: int, capacity: int, chunk: int = CHUNK):
        """Args: `edges [n_features, bins - 1]`; ids of tokens are below `vocab_size`."""
        self.edges, self.vocab_size, self.capacity, self.chunk = edges, vocab_size, capacity, chunk
        self.occurrences = np.zeros(vocab_size, np.int64)
        self.lost = np.zeros(len(edges), np.int64)
        self._aside, self._count, self._tables = [], 0, []
        # A key shares 64 bits with a float32: features are counted in groups whose keys have 32 bits.
        self._group = max(1, (1 << 32) // vocab_size)

    def add(self, features: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> None:
        """Count firings: feature, token id and code (> 0) of each."""
        self._aside.append((features, tokens, values))
        self._count += len(features)
        if self._count >= self.chunk:
            self._sort_in()

    def _sort_in(self) -> None:
        if not self._count:
            return
        features, tokens, values = (np.concatenate(each) for each in zip(*self._aside))
        self._aside, self._count = [], 0
        parts = []
        for first in range(0, len(self.edges), self._group):
            inside = slice(None)
            if self._group < len(self.edges):
                inside = np.flatnonzero((features >= first) & (features < first + self._group))
            keys = (features[inside].astype(np.int64) - first) * self.vocab_size + tokens[inside]
            packed = (keys.astype(np.uint64) << np.uint64(32)) | values[inside].view(np.uint32)
            parts.append(self._counted(packed, first))
        self._push(_Table(*(np.concatenate(each) for each in zip(*parts))))

    def _counted(self, packed: np.ndarray, first: int) -> _Table:
        """The table of firings as key x 2^32 + the bits of the value, which ascend with a positive float32."""
        packed.sort()
        keys = (packed >> np.uint64(32)).astype(np.int64)
        values = (packed & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
        n_bins = self.edges.shape[1] + 1
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
        if not len(starts):
            return _Table(keys, np.zeros(0), np.zeros((0, n_bins), np.int32))
        of = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(keys)]))
        bins = np.bincount(of * n_bins + self._bins(keys, values, first), minlength=len(starts) * n_bins)
        sums = np.add.reduceat(values.astype(np.float64), starts)
        keys = keys[starts] + first * self.vocab_size
        return _Table(keys, sums, bins.reshape(-1, n_bins).astype(np.int32))

    def _bins(self, keys: np.ndarray, values: np.ndarray, first: int) -> np.ndarray:
        """The bin of each value; `keys` ascend."""
        last = min(first + self._group, len(self.edges))
        ends = np.searchsorted(keys, np.arange(1, last - first + 1) * self.vocab_size)
        bins, start = np.empty(len(values), np.int64), 0
        for feature, end in zip(range(first, last), ends):
            if end > start:
                bins[start:end] = np.searchsorted(self.edges[feature], values[start:end])
            start = end
        return bins

    def _push(self, table: _Table) -> None:
        self._tables.append(table)
        while len(self._tables) > 1 and len(self._tables[-2].keys) < 2 * len(self._tables[-1].keys):
            b, a = self._tables.pop(), self._tables.pop()
            self._tables.append(self._bounded(_both(a, b)))

    def _bounded(self, table: _Table) -> _Table:
        """The table, or the half of the capacity with most firings."""
        if len(table.keys) <= self.capacity:
            return table
        counts, half = table.bins.sum(axis=1), max(1, self.capacity // 2)
        kept = counts > np.partition(counts, -half)[-half]
        dropped = table.keys[~kept] // self.vocab_size
        self.lost += np.bincount(dropped, counts[~kept], len(self.lost)).astype(np.int64)
        return _Table(*(each[kept] for each in table))

    def result(self) -> TokenCounts:
        """What was counted."""
        self._sort_in()
        if not self._tables:
            self._tables = [
                _Table(np.zeros(0, np.int64), np.zeros(0), np.zeros((0, self.edges.shape[1] + 1), np.int32))
            ]
        while len(self._tables) > 1:
            b, a = self._tables.pop(), self._tables.pop()
            self._tables.append(self._bounded(_both(a, b)))
        return _made(self._bounded(self._tables[0]), self.edges, self.occurrences, self.lost)
