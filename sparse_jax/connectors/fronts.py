"""How well connectors predict on held-out tokens against how many connections they use: fronts and elbows.

R^2 is that of `block_errors.py`; averages are over alive targets, intervals from a bootstrap over blocks of documents.

Elbows, by two rules:
    nonzeros_at_share    for each target the fewest nonzeros, among the points of the path, whose R^2 is at least 90 %
                         of the dense connector's (an upper bound: the path has steps)
    chord_elbow          the point farthest above the line from a front's first point to its last, in (log nonzeros,
                         R^2), both scaled to 0 .. 1 (Satopaa et al. 2011, "Finding a kneedle in a haystack")
"""

import warnings
from dataclasses import dataclass

import numpy as np

from sparse_jax.connectors.block_errors import MIN_FIRINGS, BlockErrors
from sparse_jax.connectors.document_blocks import Interval, bootstrap_weights, interval
from sparse_jax.errors import InputError

SHARE, REPLICATES = 0.9, 200


@dataclass(frozen=True, eq=False)
class Front:
    """R^2 of connectors against what they use, averaged over alive targets; the sparsest first.

    Attributes:
        nonzeros, median_nonzeros: `[points]` mean and median over alive targets.
        l1: `[points]` mean over alive targets of the l1 norm of weights in scaled units; NaN where it was not given.
        r2, r2_low, r2_high: `[points]` mean R^2 and its bootstrap interval over blocks of documents.
        median_r2: `[points]`.
        targets: how many are alive.
        order: `[points]` which connector each point is.
    """

    nonzeros: np.ndarray
    median_nonzeros: np.ndarray
    l1: np.ndarray
    r2: np.ndarray
    r2_low: np.ndarray
    r2_high: np.ndarray
    median_r2: np.ndarray
    targets: int
    order: np.ndarray

    @property
    def elbow(self) -> int:
        """The point by `chord_elbow`."""
        return chord_elbow(self.nonzeros, self.r2)


def front(
    errors: BlockErrors,
    nonzeros: np.ndarray,
    l1: np.ndarray | None = None,
    *,
    min_firings: int = MIN_FIRINGS,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Front:
    """The front of some connectors.

    Args:
        errors: of the connectors.
        nonzeros, l1: `[points, n2]` of each connector and target.
        min_firings: from which a target is alive.
        replicates, seed: of the bootstrap; the interval is NaN where there is one block only.

    Raises:
        InputError: arrays that are not of these points and targets, no target alive.
    """
    alive = _checked(errors, nonzeros, min_firings)
    if l1 is not None and l1.shape != nonzeros.shape:
        raise InputError(f"l1 norms of shape {l1.shape} beside nonzeros of {nonzeros.shape}: give one for each")
    order = np.argsort(nonzeros[:, alive].mean(axis=1), kind="stable")
    r2 = errors.r2()[:, alive]
    low = high = np.full(len(order), np.nan)
    if len(errors.count) > 1:
        drawn = [_mean(errors.r2(w)[:, alive]) for w in bootstrap_weights(len(errors.count), replicates, seed)]
        low, high = np.array([interval(0.0, column)[1:] for column in np.stack(drawn).T]).T
    l1 = np.full(nonzeros.shape, np.nan) if l1 is None else l1
    made = (
        nonzeros[:, alive].mean(axis=1), np.median(nonzeros[:, alive], axis=1), l1[:, alive].mean(axis=1),
        r2.mean(axis=1), low, high, np.median(r2, axis=1),
    )  # fmt: skip
    return Front(*(each[order] for each in made), int(alive.sum()), order)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over targets that vary in what was drawn."""
    there = ~np.isnan(values)
    return np.where(there, values, 0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)


def _checked(errors: BlockErrors, nonzeros: np.ndarray, min_firings: int) -> np.ndarray:
    points, _, n2 = errors.error.shape
    if nonzeros.shape != (points, n2):
        raise InputError(
            f"nonzeros of shape {nonzeros.shape} for {points} connectors of {n2} targets: give one for each"
        )
    alive = errors.alive(min_firings)
    if not alive.any():
        raise InputError(f"no target fires on {min_firings} of {errors.count.sum()} held-out tokens: give more tokens")
    return alive


def nonzeros_at_share(r2: np.ndarray, nonzeros: np.ndarray, dense_r2: np.ndarray, share: float = SHARE) -> np.ndarray:
    """`[n2]` the fewest nonzeros with which a target reaches `share` of the dense R^2.

    Infinite where no point does; NaN where the dense R^2 is not above 0: a target that nothing explains.

    Args:
        r2, nonzeros: `[points, n2]`.
        dense_r2: `[n2]`.
        share: between 0 and 1.
    """
    with np.errstate(invalid="ignore"):
        reached, explained = r2 >= share * dense_r2, dense_r2 > 0
    fewest = np.where(reached, nonzeros.astype(np.float64), np.inf).min(axis=0, initial=np.inf)
    return np.where(explained, fewest, np.nan)


@dataclass(frozen=True)
class NonzerosAtShare:
    """Connections that an alive target needs for a share of what the dense connector reaches.

    Attributes:
        median: over explained targets, with its bootstrap interval over blocks of held-out documents; infinite where
            fewer than half of them reach the share on the path.
        alive, explained, reached: how many targets are alive, have a dense R^2 above 0, reach the share on the path.
        share: of the dense R^2.
        dense_r2: mean over alive targets.
    """

    median: Interval
    alive: int
    explained: int
    reached: int
    share: float
    dense_r2: float


def median_nonzeros(
    errors: BlockErrors,
    nonzeros: np.ndarray,
    dense: BlockErrors,
    *,
    share: float = SHARE,
    min_firings: int = MIN_FIRINGS,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> NonzerosAtShare:
    """Median nonzeros per alive target at a share of the dense R^2: a figure of sparsity that needs no alpha.

    Args:
        errors: of the connectors of a path, on held-out tokens.
        nonzeros: `[points, n2]`.
        dense: of the dense connector (one point), on the same tokens.
        share, min_firings: see `nonzeros_at_share`, `BlockErrors.alive`.
        replicates, seed: of the bootstrap.

    Raises:
        InputError: as `front`; errors of other tokens; a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"a share {share} of the dense R^2: give one above 0 and at most 1")
    alive = _checked(errors, nonzeros, min_firings)
    both = errors.joined(dense)
    if len(both.error) != len(nonzeros) + 1:
        raise InputError(f"{len(dense.error)} dense connectors: give one")

    def needed(weights):
        r2 = both.r2(weights)[:, alive]
        return nonzeros_at_share(r2[:-1], nonzeros[:, alive], r2[-1], share), r2[-1]

    counts, dense_r2 = needed(None)
    value, bounds = _median(counts), (float("nan"), float("nan"))
    if len(both.count) > 1:
        drawn = [_median(needed(w)[0]) for w in bootstrap_weights(len(both.count), replicates, seed)]
        bounds = interval(value, np.array(drawn))[1:]
    explained = ~np.isnan(counts)
    return NonzerosAtShare(
        Interval(value, *bounds), int(alive.sum()), int(explained.sum()), int(np.isfinite(counts).sum()), share,
        float(dense_r2.mean()),
    )  # fmt: skip


def _median(counts: np.ndarray) -> float:
    counts = counts[~np.isnan(counts)]
    if not counts.size:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of two infinite ones in the middle
        return float(np.median(counts))


def chord_elbow(nonzeros: np.ndarray, r2: np.ndarray) -> int:
    """Which point of a front `[points]` each lies farthest above the chord; the sparsest point of equals.

    Points without nonzeros have no logarithm and are left out.

    Raises:
        InputError: fewer than three points, or all with as many nonzeros or the same R^2.
    """
    nonzeros, r2 = np.asarray(nonzeros, np.float64), np.asarray(r2, np.float64)
    kept = np.flatnonzero(nonzeros > 0)
    kept = kept[np.argsort(nonzeros[kept], kind="stable")]
    x, y = np.log(nonzeros[kept]), r2[kept]
    if len(kept) < 3 or not np.ptp(x) > 0 or not np.ptp(y) > 0:
        raise InputError(f"an elbow of {len(kept)} points with nonzeros {nonzeros.tolist()}: give three that differ")
    x, y = (x - x[0]) / (x[-1] - x[0]), (y - y.min()) / np.ptp(y)
    above = y - (y[0] + (y[-1] - y[0]) * x)
    return int(kept[np.argmax(above)])
