"""Which tokens features fire on, and behind which: sparse counts over a text, kept on the host and mergeable.

    table = read_tables(lm, coder, site, text, numbers, features, vocab_size)
    table.here                  at the token itself
    table.before                at the token before it

A table has an entry for each (feature, token) that occurs together, so memory follows the firings and not n_features x
vocab_size: all firings of the features that are asked for are held (20 bytes each), and while tables are made of them
some 90 bytes of each. Ask for few features, or for parts of them one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from sparse_jax.dictionaries import Normalised
from sparse_jax.features.counted_codes import BATCH_ROWS, chosen_firings
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site


class TokenTable(NamedTuple):
    """Counts of (feature, token), sorted by feature, then token.

    Attributes:
        vocab: tokens are 0 to vocab - 1.
        keys: `[entries]` feature x vocab + token.
        counts: `[entries]` at how many of the token's places the feature fires.
        sums: `[entries]` sum of its activation there.
        totals: `[vocab]` places that count, by token.
    """

    vocab: int
    keys: Int64[np.ndarray, " entries"]
    counts: Int64[np.ndarray, " entries"]
    sums: Float64[np.ndarray, " entries"]
    totals: Int64[np.ndarray, " vocab"]

    @property
    def features(self) -> Int64[np.ndarray, " entries"]:
        return self.keys // self.vocab

    @property
    def tokens(self) -> Int64[np.ndarray, " entries"]:
        return self.keys % self.vocab

    def merge(self, other: "TokenTable") -> "TokenTable":
        """The counts of both parts."""
        keys = np.concatenate([self.keys, other.keys])
        values = (np.concatenate(pair) for pair in ((self.counts, other.counts), (self.sums, other.sums)))
        return _summed(self.vocab, keys, *values, self.totals + other.totals)

    def at(self, features: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(counts, sums) of these pairs; 0 where a pair does not occur."""
        wanted = np.asarray(features, np.int64) * self.vocab + tokens
        place = np.minimum(np.searchsorted(self.keys, wanted), max(len(self.keys) - 1, 0))
        if not len(self.keys):
            return np.zeros(wanted.shape, np.int64), np.zeros(wanted.shape)
        there = self.keys[place] == wanted
        return np.where(there, self.counts[place], 0), np.where(there, self.sums[place], 0.0)


def table_of(
    features: np.ndarray, tokens: np.ndarray, values: np.ndarray, totals: np.ndarray, vocab: int
) -> TokenTable:
    """The table of firings, `[firings]` each; `totals [vocab]` are all places that count, by token."""
    keys = np.asarray(features, np.int64) * vocab + tokens
    return _summed(vocab, keys, np.ones(len(keys), np.int64), np.asarray(values, np.float64), totals)


def _summed(vocab, keys, counts, sums, totals) -> TokenTable:
    keys, inverse = np.unique(keys, return_inverse=True)
    whole = np.zeros(len(keys), np.int64)
    np.add.at(whole, inverse, counts)
    return TokenTable(vocab, keys, whole, np.bincount(inverse, sums, len(keys)), np.asarray(totals, np.int64))


class FiringList(NamedTuple):
    """Every firing of some features, in the order of the text; `[firings]` each (20 bytes a firing).

    Attributes:
        feature: which of those that were asked for.
        value: its activation.
        here, before: ids of the token and of the one before it; `vocab` where none stands before.
    """

    feature: Int32[np.ndarray, " firings"]
    value: Float32[np.ndarray, " firings"]
    here: Int32[np.ndarray, " firings"]
    before: Int32[np.ndarray, " firings"]


@dataclass(frozen=True, eq=False)
class Tables:
    """What rules are found on.

    Attributes:
        places: how many count.
        fired: `[features]` at how many each feature fires.
        sums, squares: `[features]` of its activation and the activation's square, over all places.
        here, before: tables of the token and of the one before it (id `vocab_size` stands for: none, a row begins).
        firings: all of them.
    """

    places: int
    fired: Int64[np.ndarray, " features"]
    sums: Float64[np.ndarray, " features"]
    squares: Float64[np.ndarray, " features"]
    here: TokenTable
    before: TokenTable
    firings: FiringList

    def merge(self, other: "Tables") -> "Tables":
        """Both parts of a text."""
        return Tables(
            self.places + other.places,
            self.fired + other.fired,
            self.sums + other.sums,
            self.squares + other.squares,
            self.here.merge(other.here),
            self.before.merge(other.before),
            FiringList(*(np.concatenate(pair) for pair in zip(self.firings, other.firings))),
        )


def tokens_before(tokens: Int32[np.ndarray, "rows position"], none: int) -> Int32[np.ndarray, "rows position"]:
    """The token before each in its row; `none` at the first position."""
    return np.concatenate([np.full((len(tokens), 1), none, tokens.dtype), tokens[:, :-1]], axis=1)


def read_tables(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    text: Rows,
    numbers: np.ndarray,
    features: Sequence[int] | np.ndarray,
    vocab_size: int,
    *,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> Tables:
    """Stream a text and keep where `features` fire.

    Args:
        lm, site, coder: model, place, dictionary.
        text, numbers: which rows of which text.
        features: their numbers; tables count features among these.
        vocab_size: every token id of the text is below it.
        max_norm: places with a larger activation do not count.
        batch_rows: rows at once, a multiple of 8 or fewer.
    """
    parts, totals = [], np.zeros((2, vocab_size + 1), np.int64)
    options = {"max_norm": max_norm, "batch_rows": batch_rows}
    for batch in chosen_firings(lm, coder, site, text, numbers, np.asarray(features), **options):
        both = batch.rows.tokens, tokens_before(batch.rows.tokens, vocab_size)
        for total, ids in zip(totals, both):
            total += np.bincount(ids[batch.counted], minlength=vocab_size + 1)
        ids = [tokens[batch.row, batch.position].astype(np.int32) for tokens in both]
        parts.append((batch.feature.astype(np.int32), batch.value, *ids))
    listed = FiringList(*(np.concatenate(columns) for columns in zip(*parts)))
    n, values = len(features), listed.value.astype(np.float64)
    return Tables(
        places=int(totals[0].sum()),
        fired=np.bincount(listed.feature, minlength=n),
        sums=np.bincount(listed.feature, values, n),
        squares=np.bincount(listed.feature, values**2, n),
        here=table_of(listed.feature, listed.here, values, totals[0], vocab_size + 1),
        before=table_of(listed.feature, listed.before, values, totals[1], vocab_size + 1),
        firings=listed,
    )
