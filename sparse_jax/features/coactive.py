"""Which features fire together: from a uniform sample of the tokens that count, with all that fires on each.

neighbours, cosine, together = coactive.most(10)
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from sparse_jax.errors import InputError
from sparse_jax.features.places import token_priorities

# Features whose co-firings with all others are in memory at once.
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Coactive:
    """A uniform sample of tokens (the ones of lowest `places.token_priorities`) and which features fire on them.

    Attributes:
        n_features: of the dictionary.
        limit: tokens that the sample has at most.
        rows, positions: `[tokens]` int32, where they stand in the text; in random order.
        starts: `[tokens + 1]` int64: the firings of token t are starts[t] to starts[t + 1] - 1.
        features: `[firings]` int32, which features fire.
    """

    n_features: int
    limit: int
    rows: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    features: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens in the sample."""
        return len(self.rows)

    def matrix(self) -> scipy.sparse.csr_array:
        """`[tokens, n_features]` float32: 1 where the feature fires."""
        ones = np.ones(len(self.features), np.float32)
        return scipy.sparse.csr_array((ones, self.features, self.starts), (self.tokens, self.n_features))

    def fired(self) -> np.ndarray:
        """`[n_features]` int64 tokens of the sample on which each fires."""
        return np.bincount(self.features, minlength=self.n_features)

    def together(self, features: np.ndarray) -> np.ndarray:
        """`[len(features), n_features]` float32: tokens of the sample on which both fire."""
        matrix = self.matrix()
        return np.asarray((matrix[:, features].T @ matrix).todense())

    def most(self, count: int, least: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The features that fire with each feature, by the cosine between their firings.

            cosine(a, b) = tokens on which both fire / sqrt(tokens on which a fires x tokens on which b fires)

        Args:
            count: how many of each.
            least: pairs that fire together on fewer tokens of the sample are left out.

        Returns:
            Their numbers (-1 where there are fewer), cosines and tokens together: `[n_features, count]` int32,
            float32, int32, the highest cosine first, then the lowest number.

        Raises:
            InputError: a number below 1.
        """
        if count < 1 or least < 1:
            raise InputError(f"the {count} most co-active features, together on {least} tokens: give at least 1")
        matrix, fired = self.matrix(), np.maximum(self.fired(), 1)
        count_now = min(count, self.n_features)
        shape = self.n_features, count
        found = np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        for first in range(0, self.n_features, _BLOCK):
            block = np.arange(first, min(first + _BLOCK, self.n_features))
            both = np.asarray((matrix[:, block].T @ matrix).todense())
            both[np.arange(len(block)), block] = 0
            cosine = np.where(both >= least, both / np.sqrt(fired[block][:, None] * fired), 0).astype(np.float32)
            order = np.argsort(-cosine, axis=1, kind="stable")[:, :count_now]
            best = np.take_along_axis(cosine, order, axis=1)
            for array, values in zip(found, (order, best, np.take_along_axis(both, order, axis=1))):
                array[block, :count_now] = np.where(best > 0, values, array[block, :count_now])
        return found

    def merge(self, other: "Coactive", seed: int) -> "Coactive":
        """The sample of both texts."""
        keeper = TokenKeeper(self.n_features, self.limit, seed)
        keeper.add_sample(self)
        keeper.add_sample(other)
        return keeper.result()


class TokenKeeper:
    """Keeps a uniform sample of a stream of tokens with what fires on them."""

    def __init__(self, n_features: int, limit: int, seed: int):
        """Args: see `Coactive`; `seed` of the priorities."""
        self.n_features, self.limit, self.seed = n_features, limit, seed
        self.threshold = np.uint64(2**64 - 1)
        self._aside, self._count = [], 0

    def add(self, priority, rows, positions, counts, features) -> None:
        """Put tokens aside.

        Args:
            priority, rows, positions, counts: `[tokens]`: priority, place, and how many features fire.
            features: `[firings]` which, token by token.
        """
        chosen = priority <= self.threshold
        fires = np.repeat(chosen, counts)
        self._aside.append(
            (
                priority[chosen],
                rows[chosen].astype(np.int32),
                positions[chosen].astype(np.int32),
                counts[chosen],
                features[fires].astype(np.int32),
            )
        )
        self._count += int(chosen.sum())
        if self._count > 2 * self.limit:
            self._sort_in()

    def add_sample(self, sample: Coactive) -> None:
        """Put the tokens of a sample aside."""
        priority = token_priorities(self.seed, sample.rows, sample.positions)
        self.add(priority, sample.rows, sample.positions, np.diff(sample.starts), sample.features)

    def _sort_in(self) -> None:
        priority, rows, positions, counts, features = (np.concatenate(each) for each in zip(*self._aside))
        order = np.argsort(priority, kind="stable")[: self.limit]
        starts = np.cumsum(counts) - counts
        counts = counts[order]
        # Firing i of the answer is firing i - (where its token starts there) + (where its token starts here).
        shift = np.repeat(starts[order] - (np.cumsum(counts) - counts), counts)
        features = features[np.arange(len(shift)) + shift]
        self._aside = [(priority[order], rows[order], positions[order], counts, features)]
        self._count = len(order)
        if len(order) == self.limit:
            self.threshold = priority[order[-1]]

    def result(self) -> Coactive:
        """What was kept."""
        nothing = np.zeros(0, np.uint64), *(np.zeros(0, np.int32),) * 4
        self._aside.append(nothing)
        self._sort_in()
        _, rows, positions, counts, features = self._aside[0]
        starts = np.r_[0, np.cumsum(counts, dtype=np.int64)]
        return Coactive(self.n_features, self.limit, rows, positions, starts, features)
