"""How a trainer is brought to a wished L0 with a fixed budget, the same for every library.

Near a wished L0, log L0 and log FVU are close to straight lines in the logarithm of a sparsity coefficient. For each
learning rate there are three trials: at the first guess; where the wished L0 is expected, one octave of the
coefficient for one of L0; and on its other side, by the line through the first two. Where the knob is L0 itself, one
trial does if it comes within 3 % of it.

A longer run at the same coefficient has another L0. So where the knob is a coefficient, the first full-length run is a
pilot: if its L0 on validation activations is more than 5 % off, the coefficient is moved along the trials' line, and
the pilot and the run that replaces it say how FVU goes with L0 at full length.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# The third trial aims this far beyond the target, so that the three bracket it.
BEYOND = 1.25
# A trainer that is told L0 has come to it within this share; a full-length run within the other.
TOLD, REACHED = 0.03, 0.05
# The exponents that FVU can have in L0; what lies outside is noise.
EXPONENTS = (0.0, 1.5)
# No trial's knob is further than this factor from the one before.
FARTHEST = 8.0


@dataclass(frozen=True)
class Point:
    """A trial and what it gave: the knob, L0 and FVU on validation activations."""

    sparsity: float
    l0: float
    fvu: float


def next_sparsity(points: Sequence[Point], target: float, is_l0: bool = False) -> float:
    """The knob of the next trial (the second or the third); `is_l0`: it is a wished L0, not a coefficient."""
    last = points[-1]
    # A larger coefficient gives a smaller L0, about inversely; the line through two trials says it better.
    sign = 1.0 if is_l0 else -1.0
    slope = sign
    if len(points) == 2:
        run = math.log(points[1].sparsity / points[0].sparsity)
        rise = math.log(max(points[1].l0, 0.1) / max(points[0].l0, 0.1))
        slope = sign * max(0.2, sign * rise / run) if run else sign
    aim = target
    if len(points) == 2:
        above = [point.l0 > target for point in points]
        if above[0] == above[1]:
            aim = target / BEYOND if above[0] else target * BEYOND
    step = math.log(aim / max(last.l0, 0.1)) / slope
    bound = math.log(FARTHEST)
    return last.sparsity * math.exp(min(bound, max(-bound, step)))


def search(trial: Callable[[float], Point], first: float, is_l0: bool, target: float) -> list[Point]:
    """The trials of one learning rate."""
    points = [trial(first)]
    while len(points) < 3 and not (is_l0 and near(points[0].l0, target, TOLD)):
        points.append(trial(next_sparsity(points, target, is_l0)))
    return points


def near(l0: float, target: float, share: float) -> bool:
    """Whether an L0 is within this share of the wished one."""
    return abs(l0 / target - 1) <= share


def moved(sparsity: float, l0: float, points: Sequence[Point], target: float) -> float:
    """The coefficient in place of `sparsity`, at which a full-length run had `l0`, along the line of the trials."""
    a, b = nearest(points, target)
    run = math.log(b.sparsity / a.sparsity)
    rise = math.log(max(b.l0, 0.1) / max(a.l0, 0.1))
    slope = min(-0.2, rise / run) if run else -1.0
    return sparsity * math.exp(math.log(target / max(l0, 0.1)) / slope)


def nearest(points: Sequence[Point], target: float) -> list[Point]:
    """The two trials whose L0 is nearest to the wished one (or the one there is)."""
    return sorted(points, key=lambda p: abs(math.log(max(p.l0, 0.1) / target)))[:2]


def exponent(points: Sequence[Point]) -> float | None:
    """s in FVU ~ L0^-s through these runs; None where they do not differ in L0 by a tenth, or s is out of bounds."""
    x, y = np.log([max(p.l0, 0.1) for p in points]), np.log([p.fvu for p in points])
    if np.ptp(x) < 0.1:
        return None
    s = float(-np.polyfit(x, y, 1)[0])
    return s if EXPONENTS[0] < s < EXPONENTS[1] else None


def at_target(l0: float, fvu: float, s: float, target: float) -> float:
    """FVU moved along FVU ~ L0^-s to the wished L0."""
    return fvu * (l0 / target) ** s


def best_sparsity(points: Sequence[Point], target: float) -> float:
    """The knob at which the wished L0 is expected: on the line through the two trials nearest to it, in logarithms."""
    if len(points) == 1:
        return points[0].sparsity
    a, b = nearest(points, target)
    run = math.log(max(b.l0, 0.1) / max(a.l0, 0.1))
    if abs(run) < 1e-3:
        return a.sparsity
    share = math.log(target / max(a.l0, 0.1)) / run
    # Not further outside the two than they lie apart.
    return a.sparsity * (b.sparsity / a.sparsity) ** min(2.0, max(-1.0, share))


def score(points: Sequence[Point], s: float, target: float) -> float:
    """FVU at the wished L0 of the trial that came nearest."""
    best = nearest(points, target)[0]
    return at_target(best.l0, best.fvu, s, target)
