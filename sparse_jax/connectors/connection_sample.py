"""A stated sample of connections at places: (input feature, target feature, token) where the weight is not zero and the
input is active (its code is above 0); and, for each, another target to which the input has no weight, as often active.
"""

from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse

from sparse_jax.connectors.code_columns import code_columns
from sparse_jax.connectors.paired_codes import Pair, SiteCodes
from sparse_jax.errors import InputError

# Rounds in which what was drawn twice, or is not active together, is drawn anew.
_ROUNDS = 8
# Targets, nearest in how often they are active, of which a control is drawn.
NEIGHBOURS = 10


class Sample(NamedTuple):
    """Connections at places, `[n]` each, no two the same, in the order of the tokens.

    Attributes:
        token: int64, which token of the pair.
        input, target: int32 features.
    """

    token: np.ndarray
    input: np.ndarray
    target: np.ndarray


def sample_connections(
    pair: Pair,
    weights: np.ndarray,
    count: int,
    seed: int = 0,
    *,
    draw: Literal["connection", "firing"] = "connection",
    both_active: bool = False,
) -> Sample:
    """At most `count` connections at places; fewer where there are not as many.

    Args:
        pair: codes.
        weights: `[n_in, n_out]`; what is not 0 is a connection.
        count: how many.
        seed: decides the draw.
        draw: "connection": each connection is as likely, and each place of its input; "firing": each (connection,
            place) is as likely, so that inputs which fire often have the larger share.
        both_active: only places where the target is active too.

    Raises:
        InputError: weights of another shape, nothing asked for, no connection whose input is ever active.
    """
    weights = np.asarray(weights)
    _check(pair, weights)
    if count < 1 or draw not in ("connection", "firing"):
        raise InputError(f"count {count}, draw {draw!r}: give at least 1, and connection or firing")
    inputs = code_columns(pair.inputs)
    targets = code_columns(pair.targets) if both_active else None
    i, j = np.nonzero(weights)
    counts = np.diff(inputs.indptr)
    possible = counts[i] > 0
    i, j = i[possible], j[possible]
    if not len(i):
        raise InputError("no connection can be sampled: every weight is 0, or no input with a weight is ever active")
    odds = counts[i] / counts[i].sum() if draw == "firing" else None
    generator, found = np.random.default_rng(seed), np.zeros((0, 3), np.int64)
    for _ in range(_ROUNDS):
        if len(found) == count:
            break
        chosen = generator.choice(len(i), count - len(found), p=odds)
        tokens = _places(inputs, targets, i[chosen], j[chosen], generator)
        more = np.stack([tokens, i[chosen], j[chosen]], axis=1)[tokens >= 0]
        found = np.unique(np.concatenate([found, more]), axis=0)
    if not len(found):
        raise InputError("no connection was found whose input and target are active together")
    return Sample(found[:, 0], found[:, 1].astype(np.int32), found[:, 2].astype(np.int32))


def _places(inputs: sparse.csc_array, targets: sparse.csc_array | None, i, j, generator):
    """`[n]` a token of each connection; -1 where input and target are never active together."""
    if targets is None:
        return inputs.indices[inputs.indptr[i] + generator.integers(np.diff(inputs.indptr)[i])].astype(np.int64)
    tokens = np.full(len(i), -1)
    for n, (feature, target) in enumerate(zip(i, j)):
        together = np.intersect1d(_active(inputs, feature), _active(targets, target), assume_unique=True)
        if len(together):
            tokens[n] = generator.choice(together)
    return tokens


def _active(columns, feature):
    return columns.indices[columns.indptr[feature] : columns.indptr[feature + 1]]


def matched_targets(
    pair: Pair,
    weights: np.ndarray,
    sample: Sample,
    seed: int = 0,
    *,
    neighbours: int = NEIGHBOURS,
    both_active: bool = False,
) -> np.ndarray:
    """`[n]` int32: for each of the sample another target without a weight from its input; -1 where there is none.

    Input and place stay, so the activity of the input is the very same. The target is drawn from the `neighbours`
    nearest to the sample's own in how often they are active, of those that are ever active.

    Args:
        pair, weights, seed: as in `sample_connections`.
        sample: what it gave.
        both_active: only targets that are active at the place.
    """
    weights = np.asarray(weights)
    _check(pair, weights)
    counts = np.diff(code_columns(pair.targets).indptr)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    generator, matched = np.random.default_rng(seed), np.full(len(sample.token), -1, np.int32)
    at = pair.targets.at(sample.token)
    for n, (feature, target) in enumerate(zip(sample.input, sample.target)):
        pool = at.indices[n][at.values[n] > 0] if both_active else np.flatnonzero(counts)
        pool = pool[(weights[feature, pool] == 0) & (pool != target)]
        if len(pool):
            near = np.argsort(np.abs(rank[pool] - rank[target]), kind="stable")[:neighbours]
            matched[n] = pool[generator.choice(near)]
    return matched


def code_at(codes: SiteCodes, token: np.ndarray, feature: np.ndarray) -> np.ndarray:
    """`[n]` float32: the code of one feature at each of some tokens."""
    at = codes.at(token)
    return np.where(at.indices == feature[:, None], at.values, 0).sum(axis=1, dtype=np.float32)


def maximum_codes(codes: SiteCodes) -> np.ndarray:
    """`[features]` float32: the largest code of each feature on these tokens; 0 of one that is never above."""
    largest = np.zeros(codes.n_features, np.float32)
    np.maximum.at(largest, np.asarray(codes.indices), np.asarray(codes.values, np.float32))
    return largest


def _check(pair, weights):
    expected = (pair.inputs.n_features, pair.targets.n_features)
    if weights.shape != expected:
        raise InputError(f"weights have shape {list(weights.shape)}; the pair has {list(expected)} inputs and targets")
