"""Ways in which the inputs of a unit make it fire, or keep it off: clusters of tokens by how strong each input is.

    found = unit_clusters(inputs, W[:, u], fires, u)
    [cluster.words(names) for cluster in found.clusters]     "IF 3 large, IF 8 small", "IF 8 large, IF 3 small", ...

Of a unit with inputs A and B one may ask whether it answers to either, to both in proportion, or to one large with the
other small. Its tokens are points of what each strong input has there, as a share of its own level (the 95th percentile
of its codes on these tokens where it is on), and points that lie together are one way. Two kinds of tokens are looked
at: those where the unit fires, and those where its positive inputs alone would fire it and its negative ones stop it.

Clusters are cut from Ward's tree (scipy) at the number, of 2 to `most`, with the largest mean silhouette. All tokens
are one cluster where none reaches 0.5, below which "the structure is weak and could be artificial" (an even square cut
in four has 0.4), or where there is one input: strong and weak are no two ways.

Source: Ward 1963; Rousseeuw 1987 (silhouettes); Kaufman & Rousseeuw 1990, table 2.4 (the limit).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.cluster import hierarchy
from scipy.spatial import distance

from sparse_jax.errors import InputError

# Shares of an input's level: from here on it is large, and below here it is off.
LARGE, OFF = 0.5, 0.1
STRUCTURE = 0.5


@dataclass(frozen=True, eq=False)
class Cluster:
    """Tokens of a unit on which its inputs are alike.

    Attributes:
        tokens: `[members]` rows of the codes, the strongest activation first.
        levels: `[inputs]` float64 mean share of each input's level.
        fires: the share of the tokens on which the unit fires: near 0 where the negative inputs stop it.
        activation: mean activation of the unit.
    """

    tokens: np.ndarray
    levels: np.ndarray
    fires: float
    activation: float

    def words(self, names: Sequence[str]) -> str:
        """ "IF 3 large with IF 8 small": what is large, then what is small; inputs that are off are not said."""
        order = np.argsort(-self.levels, kind="stable")
        large = [names[i] for i in order if self.levels[i] >= LARGE]
        small = [names[i] for i in order if OFF <= self.levels[i] < LARGE]
        said = [f"{' and '.join(some)} {size}" for some, size in ((large, "large"), (small, "small")) if some]
        return " with ".join(said) or "no strong input"


@dataclass(frozen=True, eq=False)
class UnitClusters:
    """Clusters of one unit.

    Attributes:
        unit: its number.
        inputs: `[m]` rows of W, the strongest |weight| x mean code first.
        weights: `[m]` theirs.
        clusters: those in which the unit fires most first; empty where it never does.
        silhouette: mean over the tokens; None of one cluster.
        sampled, firing, stopped: tokens that were clustered, and how many there are in all where it fires, and where
            its negative inputs stop it.
        correlation: `[m, m]` float64 of the inputs' levels over the clustered tokens; below 0: one large where the
            other is small. 0 beside an input that does not vary.
    """

    unit: int
    inputs: np.ndarray
    weights: np.ndarray
    clusters: tuple[Cluster, ...]
    silhouette: float | None
    sampled: int
    firing: int
    stopped: int
    correlation: np.ndarray


def unit_clusters(
    inputs: sparse.csc_array,
    weights: np.ndarray,
    fires: sparse.csc_array,
    unit: int,
    *,
    bias: float = 0.0,
    strongest: int = 8,
    most: int = 8,
    tokens: int = 1000,
    smallest: int = 20,
    seed: int = 0,
) -> UnitClusters:
    """Cluster the tokens of one unit.

    Memory: distances of all pairs of `2 x tokens` tokens, 32 MB for 1,000.

    Args:
        inputs: `[tokens, n_in]` codes by feature (`code_columns`).
        weights: `[n_in]` into the unit: its column of W.
        fires: `[tokens, units]` activations of units by unit (`hidden_columns`, or `code_columns` of targets).
        unit: its column of `fires`.
        bias: of the unit.
        strongest: inputs that tokens are compared by.
        most: clusters at the most.
        tokens: drawn, at most, of those where it fires, and as many of those where it is stopped.
        smallest: tokens that a cluster has at the least; numbers of clusters with a smaller one are not considered.
        seed: decides the draws.

    Raises:
        InputError: shapes or numbers that do not fit.
    """
    weights = np.asarray(weights, np.float64)
    if weights.shape != (inputs.shape[1],) or inputs.shape[0] != fires.shape[0]:
        raise InputError(
            f"weights {weights.shape}, inputs {inputs.shape}, units {fires.shape}: give [n_in], [tokens, n_in] and "
            "[tokens, units]"
        )
    if not 0 <= unit < fires.shape[1]:
        raise InputError(f"unit {unit}: there are 0 to {fires.shape[1] - 1}")
    if min(strongest, most, tokens, smallest) < 1:
        raise InputError(f"strongest {strongest}, most {most}, tokens {tokens}, smallest {smallest}: give 1 or more")
    activation = np.zeros(fires.shape[0])
    part = slice(fires.indptr[unit], fires.indptr[unit + 1])
    activation[fires.indices[part]] = fires.data[part]
    stopped = _stopped(inputs, weights, activation, bias)
    firing, generator = np.flatnonzero(activation > 0), np.random.default_rng(seed)
    drawn = np.concatenate([generator.permutation(some)[:tokens] for some in (firing, stopped)])
    chosen = _strongest(inputs, weights, strongest)
    levels = _levels(inputs, chosen, drawn)
    groups, silhouette = cut(levels, most=most, smallest=smallest)
    made = [_cluster(drawn[groups == g], levels[groups == g], activation) for g in np.unique(groups)]
    made.sort(key=lambda c: (-c.fires, -len(c.tokens)))
    return UnitClusters(
        unit, chosen, weights[chosen], tuple(made), silhouette, len(drawn), len(firing), len(stopped),
        _correlation(levels),
    )  # fmt: skip


def _stopped(inputs, weights, activation, bias) -> np.ndarray:
    """Tokens where the unit does not fire and would if its negative inputs were off."""
    positive = np.maximum(weights, 0)
    drive = bias + np.asarray(inputs @ positive)
    full = bias + np.asarray(inputs @ weights)
    return np.flatnonzero((activation <= 0) & (drive > 0) & (full < drive))


def _strongest(inputs, weights, count) -> np.ndarray:
    rows = np.flatnonzero(weights)
    mean = np.asarray(inputs.sum(axis=0))[rows] / np.maximum(np.diff(inputs.indptr)[rows], 1)
    return rows[np.argsort(-np.abs(weights[rows]) * mean, kind="stable")][:count]


def _levels(inputs, chosen, drawn) -> np.ndarray:
    """`[drawn, chosen]` codes as shares of each input's level."""
    codes = np.zeros((len(drawn), len(chosen)))
    column = np.zeros(inputs.shape[0])
    for i, row in enumerate(chosen):
        part = slice(inputs.indptr[row], inputs.indptr[row + 1])
        column[inputs.indices[part]] = inputs.data[part]
        codes[:, i] = column[drawn]
        column[inputs.indices[part]] = 0
        if (codes[:, i] > 0).any():
            codes[:, i] /= np.percentile(codes[codes[:, i] > 0, i], 95)
    return codes


def cut(points: np.ndarray, *, most: int, smallest: int) -> tuple[np.ndarray, float | None]:
    """(`[points]` numbers of clusters, mean silhouette) of Ward's tree, cut where the silhouette is largest."""
    one = np.ones(len(points), np.int64), None
    if len(points) < 2 * smallest or points.shape[1] < 2:
        return one
    between = distance.pdist(points)
    tree = hierarchy.ward(between)
    square = distance.squareform(between)
    best, found = STRUCTURE, one
    for n in range(2, most + 1):
        groups = hierarchy.fcluster(tree, n, "maxclust")
        if len(np.unique(groups)) < n or np.bincount(groups)[1:].min() < smallest:
            continue
        if (value := silhouette(square, groups)) > best:
            best, found = value, (groups, value)
    return found


def silhouette(distances: np.ndarray, groups: np.ndarray) -> float:
    """Mean over points of (b - a) / max(a, b): a the mean distance to its own cluster, b to the nearest other one.

    A point alone in its cluster has 0, and so has one at distance 0 from both.

    Args:
        distances: `[points, points]`.
        groups: `[points]` numbers of clusters, of which there are at least two.
    """
    _, own = np.unique(groups, return_inverse=True)
    members = np.eye(own.max() + 1)[own]
    sizes = members.sum(axis=0)
    sums = distances @ members
    points = np.arange(len(own))
    a = sums[points, own] / np.maximum(sizes[own] - 1, 1)
    others = sums / sizes
    others[points, own] = np.inf
    b = others.min(axis=1)
    larger = np.maximum(a, b)
    return float(np.where((sizes[own] > 1) & (larger > 0), (b - a) / np.where(larger > 0, larger, 1), 0).mean())


def _cluster(tokens, levels, activation) -> Cluster:
    its = activation[tokens]
    return Cluster(
        tokens[np.argsort(-its, kind="stable")], levels.mean(axis=0), float((its > 0).mean()), float(its.mean())
    )


def _correlation(levels) -> np.ndarray:
    if len(levels) < 2:
        return np.zeros((levels.shape[1],) * 2)
    centred = levels - levels.mean(axis=0)
    norms = np.linalg.norm(centred, axis=0)
    units = centred / np.where(norms > 1e-12, norms, 1) * (norms > 1e-12)
    return units.T @ units
