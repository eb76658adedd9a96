"""Target features that fire on where a token stands, or nearly everywhere: tables show them apart.

Attention sinks sit on the first tokens of a row and on its first delimiter, with activations many times the usual:
features of those are explained by anything that knows them too, and their large codes decide sums over features. The
meaning is that of `features.collected.Collected.outlier`, which is told from a pass over text; this is told from codes.
"""

from dataclasses import dataclass

import numpy as np

from sparse_jax.connectors.paired_codes import SiteCodes, Tokens
from sparse_jax.errors import InputError
from sparse_jax.features.collected import OUTLIER_FIRINGS, OUTLIER_SHARE

# A feature that fires on more than this share of the tokens fires on most of them.
MOST_TOKENS = 0.5
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class Outliers:
    """Where features fire, `[features]` each.

    Attributes:
        fired: int64 tokens.
        first: float64 share of its firings on the first token of a row that counts.
        first_delimiter: float64 share of its firings on the first delimiter of a row that counts and is not its first
            token.
        delimiters: float64 share of its firings on delimiters, wherever they stand. No ground for being an outlier.
        density: float64 share of the tokens on which it fires.
        starts: bool, of at least 10 firings more than half are on a first token or a first delimiter.
        most: bool, fires on most tokens.
    """

    fired: np.ndarray
    first: np.ndarray
    first_delimiter: np.ndarray
    delimiters: np.ndarray
    density: np.ndarray
    starts: np.ndarray
    most: np.ndarray

    @property
    def outlier(self) -> np.ndarray:
        """`[features]` bool: to be shown apart."""
        return self.starts | self.most

    @property
    def reason(self) -> np.ndarray:
        """`[features]` str: "first tokens", "first delimiters" (whichever is the larger share), "most tokens" or ""."""
        starts = np.where(self.first >= self.first_delimiter, "first tokens", "first delimiters")
        return np.where(self.starts, starts, np.where(self.most, "most tokens", ""))


def row_starts(tokens: Tokens, delimiters: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(first, first delimiter) `[tokens]` bool: which tokens are a row's first, and its first delimiter after that.

    Tell it of all tokens that were collected, and index the answer: in a part of them (the held-out documents) a row
    may begin later than it does.

    Args:
        tokens: in any order.
        delimiters: `[vocab]` bool, by `features.collect.delimiter_tokens`; None: none are.
    """
    first = _least(tokens, np.ones(len(tokens), bool))
    delimiter = np.zeros(len(tokens), bool) if delimiters is None else _is(delimiters, tokens.token)
    return first, _least(tokens, delimiter & ~first)


def outliers(
    codes: SiteCodes,
    tokens: Tokens,
    delimiters: np.ndarray | None = None,
    starts: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    most_tokens: float = MOST_TOKENS,
) -> Outliers:
    """Which features of a site are outliers.

    Args:
        codes, tokens: of the same tokens.
        delimiters: `[vocab]` bool; None: none are.
        starts: what `row_starts` said of these tokens; None: it is asked.
        most_tokens: density from which a feature fires on most tokens.

    Raises:
        InputError: codes and tokens of different lengths, or none.
    """
    if len(codes) != len(tokens) or not len(tokens):
        raise InputError(f"{len(codes)} codes, {len(tokens)} tokens: give as many of each, at least one")
    first, first_delimiter = row_starts(tokens, delimiters) if starts is None else starts
    delimiter = np.zeros(len(tokens), bool) if delimiters is None else _is(delimiters, tokens.token)
    counts = np.zeros((4, codes.n_features), np.int64)
    for begin in range(0, len(tokens), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        row, slot = np.nonzero(np.asarray(codes.values[part]) > 0)
        feature = np.asarray(codes.indices[part])[row, slot]
        for at, where in enumerate((None, first, first_delimiter, delimiter)):
            chosen = feature if where is None else feature[where[part][row]]
            counts[at] += np.bincount(chosen, minlength=codes.n_features)
    fired = counts[0]
    shares = counts[1:] / np.maximum(fired, 1)
    density = fired / len(tokens)
    starting = (fired >= OUTLIER_FIRINGS) & (shares[0] + shares[1] > OUTLIER_SHARE)
    return Outliers(fired, *shares, density, starting, density > most_tokens)


def _least(tokens: Tokens, where: np.ndarray) -> np.ndarray:
    """`[tokens]` bool: of the tokens in `where`, that with the least position in each row."""
    chosen = np.flatnonzero(where)
    order = chosen[np.lexsort((tokens.position[chosen], tokens.row[chosen]))]
    out = np.zeros(len(tokens), bool)
    out[order[np.flatnonzero(np.diff(tokens.row[order], prepend=-1))]] = True
    return out


def _is(delimiters: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Whether tokens are delimiters; a padded vocabulary has ids without text, which are none."""
    delimiters = np.asarray(delimiters)
    if delimiters.ndim != 1 or delimiters.dtype != bool:
        raise InputError(f"delimiters of shape {list(delimiters.shape)}, {delimiters.dtype}: give a bool for each id")
    return (token < len(delimiters)) & delimiters[np.minimum(token, len(delimiters) - 1)]
