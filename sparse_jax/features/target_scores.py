"""How well a feature agrees with a target that holds at some places of a text: precision, recall, F1, correlation.

From sums over places alone, so that they can be streamed and merged. With c the feature's activation (0 where it does
not fire), y the target, 0 or 1, N places:

    precision          share of the firings at which the target holds
    recall             share of the target's places at which the feature fires
    F1                 2 hits / (firings + target's places)
    correlation        Pearson's, of c and y
    firing correlation Pearson's, of [c > 0] and y (the phi coefficient)

Example: c = [2, 0, 1, 0], y = [1, 1, 0, 0]: one hit of two firings and two places, so precision, recall and F1 are 0.5;
mean c y - mean c mean y = 0.5 - 0.375, the variances are 0.6875 and 0.25: correlation 0.302; firing correlation 0.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64


class Scores(NamedTuple):
    """Of each feature (and each target); nan where a figure is not defined (no firings, no such place, no variance)."""

    precision: Float64[np.ndarray, "*shape"]
    recall: Float64[np.ndarray, "*shape"]
    f1: Float64[np.ndarray, "*shape"]
    correlation: Float64[np.ndarray, "*shape"]
    firing_correlation: Float64[np.ndarray, "*shape"]


def scores_of(places: int, target, fired, sums, squares, hits, hit_sums) -> Scores:
    """Scores from sums; arguments broadcast against each other.

    Args:
        places: places that count.
        target: places at which the target holds.
        fired: places at which the feature fires.
        sums, squares: sum of its activation over all places, and of the activation's square.
        hits: places at which the feature fires and the target holds.
        hit_sums: sum of the activation over the target's places.
    """
    target, fired, sums, squares, hits, hit_sums = (
        np.asarray(value, np.float64) for value in (target, fired, sums, squares, hits, hit_sums)
    )
    n = max(places, 1)
    share, rate = target / n, fired / n
    variance_of_target, variance = share * (1 - share), squares / n - (sums / n) ** 2
    return Scores(
        precision=_ratio(hits, fired),
        recall=_ratio(hits, target),
        f1=_ratio(2 * hits, fired + target),
        correlation=_ratio(hit_sums / n - sums / n * share, np.sqrt(np.maximum(variance, 0) * variance_of_target)),
        firing_correlation=_ratio(hits / n - rate * share, np.sqrt(rate * (1 - rate) * variance_of_target)),
    )


def _ratio(above, below) -> np.ndarray:
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def ranking(values: np.ndarray, count: int | None = None) -> np.ndarray:
    """The places of the largest `count` of `values [n]`, largest first; of equal ones the first; nan last."""
    keyed = np.where(np.isnan(values), -np.inf, values)
    order = np.lexsort((np.arange(len(keyed)), np.isnan(values), -keyed))
    return order[:count]
