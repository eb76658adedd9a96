"""How much of the features after a module do the features before it explain, at the same position?

    found = same_position(held_out, {"linear": dense, "MLP": mlp}, means)
    found.r2["linear"]             [targets] R^2 on held-out tokens
    found.summary()                quantiles, shares of features above thresholds, R^2 of all together

What no map of the same position explains, the others must bring: for attention that is what it moves. R^2_j = 1 -
MSE_j / Var_j on held-out tokens, Var_j about their own mean. Targets that fire on fewer than `least` held-out tokens
are left out: theirs is noise. Pooled R^2 is 1 - sum MSE_j / sum Var_j over the same targets; weighted by what a target
varies, it is ruled by the strong ones, the median is not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sparse_jax.connectors.document_errors import Predictor, document_errors
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.errors import InputError

# Firings on held-out tokens from which a target's R^2 counts; thresholds of the summary.
LEAST, THRESHOLDS = 20, (0.1, 0.3, 0.5, 0.7, 0.9)
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, eq=False)
class SamePosition:
    """R^2 of each target by each map. Numpy.

    Attributes:
        r2: name -> `[targets]` float64; nan for targets that are left out.
        variance: `[targets]` float64 on held-out tokens.
        fired: `[targets]` int64 held-out tokens on which each fires.
        least: firings from which a target counts.
        tokens: held-out tokens.
    """

    r2: dict[str, np.ndarray]
    variance: np.ndarray
    fired: np.ndarray
    least: int
    tokens: int

    @property
    def counts(self) -> np.ndarray:
        """`[targets]` bool: which targets count."""
        return (self.fired >= self.least) & (self.variance > 0)

    def summary(self) -> dict[str, dict[str, float]]:
        """name -> pooled and mean R^2, quantiles ("q50"), shares of the targets above thresholds ("above 0.5")."""
        counts, made = self.counts, {}
        for name, values in self.r2.items():
            r2, variance = values[counts], self.variance[counts]
            if not len(r2):
                made[name] = {"targets": 0}
                continue
            quantiles = {f"q{round(100 * q)}": float(v) for q, v in zip(_QUANTILES, np.quantile(r2, _QUANTILES))}
            shares = {f"above {threshold}": float((r2 > threshold).mean()) for threshold in THRESHOLDS}
            pooled = float((r2 * variance).sum() / variance.sum())
            made[name] = {"targets": len(r2), "pooled": pooled, "mean": float(r2.mean()), **quantiles, **shares}
        return made


def same_position(
    held_out: Pair, predictors: Mapping[str, Predictor], means: np.ndarray, *, least: int = LEAST
) -> SamePosition:
    """R^2 of every target by every map, on held-out tokens, and by a constant ("mean").

    Args:
        held_out: codes that no map was fitted on.
        predictors: by name, see `document_errors.py`, which says what they may be and what memory it takes.
        means: `[targets]` of the training tokens: what the constant says.
        least: firings from which a target counts.

    Raises:
        InputError: no tokens; a prediction of another shape or that is not finite.
    """
    if least < 1:
        raise InputError(f"least {least}: give at least 1")
    errors = document_errors(held_out, predictors, max_groups=1).constant(means)
    variance, fired = errors.variance, errors.fired.sum(axis=0)
    usable = (fired >= least) & (variance > 0)
    names = {**dict.fromkeys(predictors), "constant": None}
    r2 = {name: np.where(usable, errors.r2(name), np.nan) for name in names}
    r2["mean"] = r2.pop("constant")
    return SamePosition(r2, variance, fired, least, errors.n_tokens)


def by_target(r2: Float[np.ndarray, " targets"], order: int = 10) -> list[tuple[int, float]]:
    """(feature, R^2) of the targets that the same position explains least: what attention must have brought."""
    there = np.flatnonzero(np.isfinite(r2))
    return [(int(j), float(r2[j])) for j in there[np.argsort(r2[there], kind="stable")][:order]]
