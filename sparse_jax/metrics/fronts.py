"""Fronts: what dictionaries reach at each sparsity, as means over seeds with their spread.

A *member* is one trained and measured dictionary, as plain figures:

    {"site", "n_features", "learning_rate", "sparsity", "seed", "l0", "fvu", "ce_increase", ...}

Members that differ in nothing but the seed make a point; points that differ in nothing but the sparsity (a coefficient,
a k, a wished L0) make a front, ordered by L0. Example, two seeds at one k:

    fvu 0.2 and 0.3  ->  {"mean": 0.25, "sd": 0.0707, "low": 0.2, "high": 0.3, "count": 2}
"""

from collections.abc import Iterable, Sequence

import numpy as np

from sparse_jax.errors import InputError

# What members of one front have in common.
FRONT = ("site", "n_features", "learning_rate")
# What is averaged over seeds.
MEASURES = ("l0", "fvu", "ce_increase", "dead_fraction")


def spread(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean, standard deviation, lowest and highest of some numbers.

    The standard deviation is that of a sample (divided by count - 1): None for a single number.

    Raises:
        InputError: there is no number, or one that is not finite.
    """
    numbers = np.array(list(values), np.float64)
    if not numbers.size or not np.isfinite(numbers).all():
        raise InputError(f"a mean over seeds of {numbers.tolist()}: give finite numbers, at least one")
    return {
        "mean": float(numbers.mean()),
        "sd": float(numbers.std(ddof=1)) if numbers.size > 1 else None,
        "low": float(numbers.min()),
        "high": float(numbers.max()),
        "count": int(numbers.size),
    }


def fronts(members: Sequence[dict], measures: Sequence[str] = MEASURES) -> list[dict]:
    """Members grouped over seeds.

    Args:
        members: figures as above.
        measures: which of them are averaged; "l0" is always among them.

    Returns:
        A list of {site, n_features, learning_rate, "points": [{"sparsity", "seeds", measure -> `spread`, ...}]}, fronts
        in the order in which their first members stand, points by mean L0.

    Raises:
        InputError: two members have the same place and seed; a figure is not finite.
    """
    measures = tuple(dict.fromkeys(("l0", *measures)))
    grouped: dict[tuple, dict[float, list[dict]]] = {}
    for member in members:
        front = grouped.setdefault(tuple(member[name] for name in FRONT), {})
        front.setdefault(member["sparsity"], []).append(member)
    made = []
    for place, points in grouped.items():
        rows = [_point(sparsity, group, measures) for sparsity, group in points.items()]
        made.append({**dict(zip(FRONT, place)), "points": sorted(rows, key=lambda row: row["l0"]["mean"])})
    return made


def _point(sparsity: float, members: list[dict], measures: Sequence[str]) -> dict:
    seeds = [member["seed"] for member in members]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"two members at sparsity {sparsity} have the same seed (seeds {seeds}): a mean needs others")
    return {
        "sparsity": sparsity,
        "seeds": seeds,
        **{name: spread(member[name] for member in members) for name in measures},
    }


def ks_between(l0s: Iterable[float], most: int) -> list[int]:
    """Whole numbers at which to measure floors beside dictionaries of these L0s: few, spread evenly in the logarithm.

    All L0s, rounded (1 at least), where they are at most `most` different numbers; otherwise `most` from the smallest
    to the largest.

    Raises:
        InputError: there is no L0; `most` is below 2.
    """
    rounded = sorted({max(1, round(l0)) for l0 in l0s})
    if not rounded or most < 2:
        raise InputError(f"floors at {most} of the numbers {rounded}: give an L0, and at least 2")
    if len(rounded) <= most:
        return rounded
    return sorted({round(k) for k in np.geomspace(rounded[0], rounded[-1], most)})
