"""How well simulated activations fit the real ones, and means with their errors.

The score of an explanation is the correlation over all tokens of the scored fragments together: of the top ones, of
the random ones, and of both. A constant simulation scores 0: it says nothing of where the feature is active.

Source: Bills et al. 2023, "Score" (correlation scoring); Cunningham et al. 2023 (top, random, both).
"""

import math
from collections.abc import Sequence

import numpy as np

from sparse_jax.features.explain.examples import Example


def correlation(simulated: np.ndarray, real: np.ndarray) -> float | None:
    """Pearson's correlation; 0 for a constant simulation, None where the real activations are constant.

    By hand: [0, 1, 2] against [0, 1, 5] gives 5 / sqrt(2 * 14) = 0.9449.
    """
    a, b = np.asarray(simulated, np.float64), np.asarray(real, np.float64)
    if len(b) == 0 or np.ptp(b) == 0:
        return None
    if np.ptp(a) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(np.sum(a * b) / math.sqrt(np.sum(a * a) * np.sum(b * b)), -1, 1))


def simulation_scores(
    top: Sequence[tuple[Example, np.ndarray]], random: Sequence[tuple[Example, np.ndarray]]
) -> dict[str, float | None]:
    """The three scores from pairs (fragment, simulated activations); tokens that do not count are left out."""

    def score(pairs: Sequence[tuple[Example, np.ndarray]]) -> float | None:
        simulated = [np.asarray(values)[example.counts] for example, values in pairs]
        real = [example.activations[example.counts] for example, _ in pairs]
        return correlation(np.concatenate(simulated), np.concatenate(real)) if pairs else None

    return {"top": score(top), "random": score(random), "both": score([*top, *random])}


def mean_and_error(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean over those that are there, its standard error (None for fewer than two) and their number."""
    there = np.array([value for value in values if value is not None], np.float64)
    if not len(there):
        return {"mean": None, "error": None, "n": 0}
    error = float(there.std(ddof=1) / math.sqrt(len(there))) if len(there) > 1 else None
    return {"mean": float(there.mean()), "error": error, "n": len(there)}
