"""How linear is what makes a feature of others? A linear predictor against an MLP, target by target, with intervals.

    g_j = (MSE_linear,j - MSE_mlp,j) / Var(F2_j)                on held-out tokens

    errors = document_errors(held_out, {"linear/0": ..., "linear/1": ..., "mlp/0": ..., "mlp/1": ...})
    measured = linearity(errors.constant(training_means), ["linear/0", "linear/1"], ["mlp/0", "mlp/1"])
    classes = classify(measured, threshold)                     s*^2 of `noise_threshold`

g is in shares of the target's variance: the noise that one would have to add to a target to lose as much as its linear
prediction does against the MLP's. A threshold on the MSE itself (`original_rule`) calls every rare feature linear.

Intervals are those of g for the mean over fits, with other documents and other seeds: in each replicate documents are
drawn with replacement, and so are the linear fits and the MLP fits, each for itself. The seeds' part is widened by
sqrt(S / (S - 1)), since a draw with replacement from S fits spreads less than S new fits would. With one fit of a kind
its spread over seeds is not in the interval (`seed_spread` is NaN then).

Source of the question: Riggs et al. 2023, "Finding Sparse Linear Connections between Features in LLMs".
Bootstrap: Efron and Tibshirani 1993, chapters 13 (percentiles) and 8 (clusters are what is drawn).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_jax.connectors.document_errors import DocumentErrors, variance_of
from sparse_jax.errors import InputError

CLASSES = ("linear", "nonlinear", "undecided", "unexplained", "rare", "dead")
# Targets whose replicates are held at once: 5 arrays of replicates x this many float64.
_TARGETS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Linearity:
    """Per target, `[targets]` float64 unless told; NaN where the target does not vary. Means are over the fits.

    Attributes:
        g: (MSE_linear - MSE_mlp) / variance.
        low, high: ends of its interval.
        seed_spread: standard deviation of g from one pair of fits to another; NaN with one fit of either kind.
        r2_linear, r2_mlp: mean R^2 of the fits.
        r2_linear_interval, r2_mlp_interval: `[2, targets]` ends of their intervals.
        r2_constant: of a constant; NaN where none was given to `errors`.
        mse_linear, mse_mlp: mean squared errors in squared units of the target.
        variance, density: of the target over the tokens.
        fired: int64 tokens on which it fires.
        documents: int64 documents (or groups of them) in which it fires.
        level: of the intervals.
    """

    g: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seed_spread: np.ndarray
    r2_linear: np.ndarray
    r2_mlp: np.ndarray
    r2_linear_interval: np.ndarray
    r2_mlp_interval: np.ndarray
    r2_constant: np.ndarray
    mse_linear: np.ndarray
    mse_mlp: np.ndarray
    variance: np.ndarray
    density: np.ndarray
    fired: np.ndarray
    documents: np.ndarray
    level: float


def linearity(
    errors: DocumentErrors,
    linear: Sequence[str],
    mlp: Sequence[str],
    *,
    level: float = 0.95,
    replicates: int = 1000,
    seed: int = 0,
) -> Linearity:
    """g and its interval, R^2 of both predictors and theirs.

    Memory: `40 x replicates x min(256, targets)` bytes beside `errors`.

    Args:
        errors: on held-out tokens.
        linear, mlp: names of fits in it, that differ in their seeds only.
        level: of the intervals, between percentiles.
        replicates: of the bootstrap.
        seed: decides it.

    Raises:
        InputError: no fit of a kind, a name that `errors` does not have, fewer than two documents, a level that cannot
            be.
    """
    _check(errors, linear, mlp, level, replicates)
    rng = np.random.default_rng(seed)
    groups, n = len(errors.tokens), errors.fired.shape[1]
    drawn = rng.multinomial(groups, np.full(groups, 1 / groups), replicates).astype(np.float64)
    tokens = drawn @ errors.tokens
    of_seeds = [_seed_weights(rng, len(names), replicates) for names in (linear, mlp)]
    ends = np.array([(1 - level) / 2, (1 + level) / 2])
    intervals = np.full((3, 2, n), np.nan)
    varies = errors.variance > 0
    alive = np.flatnonzero(varies)
    for begin in range(0, len(alive), _TARGETS_AT_ONCE):
        part = alive[begin : begin + _TARGETS_AT_ONCE]
        mean = (drawn @ errors.total[:, part]) / tokens[:, None]
        variance = variance_of(mean, (drawn @ errors.squares[:, part]) / tokens[:, None])
        # Where no document with a firing was drawn, there is nothing to explain: such a replicate says nothing.
        variance = np.where(variance > 0, variance, np.nan)
        mse = []
        for names, weights in zip((linear, mlp), of_seeds, strict=True):
            sums = sum(w[:, None] * (drawn @ errors.errors[name][:, part]) for name, w in zip(names, weights.T))
            mse.append(sums / tokens[:, None])
        figures = ((mse[0] - mse[1]) / variance, 1 - mse[0] / variance, 1 - mse[1] / variance)
        for at, figure in enumerate(figures):
            intervals[at][:, part] = np.nanquantile(figure, ends, axis=0)
    mses = [np.mean([errors.mse(name) for name in names], axis=0) for names in (linear, mlp)]
    variance = np.where(varies, errors.variance, np.nan)
    r2 = [1 - mse / variance for mse in mses]
    constant = 1 - errors.mse("constant") / variance if "constant" in errors.errors else np.full(n, np.nan)
    return Linearity(
        (mses[0] - mses[1]) / variance, intervals[0, 0], intervals[0, 1], _seed_spread(errors, linear, mlp, variance),
        *r2, intervals[1], intervals[2], constant, *mses, errors.variance, errors.density,
        errors.fired.sum(axis=0), np.count_nonzero(errors.fired, axis=0), level,
    )  # fmt: skip


def _check(errors, linear, mlp, level, replicates) -> None:
    if not linear or not mlp:
        raise InputError(f"{len(linear)} linear fits, {len(mlp)} MLP fits: give at least one of each")
    if missing := [name for name in (*linear, *mlp) if name not in errors.errors]:
        raise InputError(f"no errors of {', '.join(missing)}; there are those of {', '.join(errors.errors)}")
    if len(errors.tokens) < 2:
        raise InputError("an interval over documents needs two of them; there is one")
    if not 0 < level < 1 or replicates < 2:
        raise InputError(f"level {level}, {replicates} replicates: give a level in (0, 1), at least 2 replicates")


def _seed_weights(rng, fits: int, replicates: int) -> np.ndarray:
    """`[replicates, fits]` that sum to 1: shares of a draw with replacement, spread as widely as new fits would be."""
    if fits == 1:
        return np.ones((replicates, 1))
    shares = rng.multinomial(fits, np.full(fits, 1 / fits), replicates) / fits
    return 1 / fits + np.sqrt(fits / (fits - 1)) * (shares - 1 / fits)


def _seed_spread(errors, linear, mlp, variance) -> np.ndarray:
    """Standard deviation of g over pairs of one linear and one MLP fit; the two kinds are independent."""
    spread = np.zeros(len(variance))
    for names in (linear, mlp):
        if len(names) < 2:
            return np.full(len(variance), np.nan)
        spread += np.var([errors.mse(name) for name in names], axis=0, ddof=1)
    return np.sqrt(spread) / variance


def classify(measured: Linearity, threshold: float, *, unexplained: float = 0.5, min_documents: int = 10) -> np.ndarray:
    """`[targets]` str, one of `CLASSES`; the first that holds:

        dead         never fires on these tokens
        rare         fires in fewer than `min_documents` documents: no interval over documents can be trusted
        unexplained  R^2 of the MLP below `unexplained`: what a linear map misses of so little says nothing
        linear       upper end of g's interval below the threshold
        nonlinear    lower end above it
        undecided    neither: more tokens, or more fits, would tell

    Args:
        measured: by `linearity`.
        threshold: on g, in shares of the variance: s*^2 of `noise_threshold`.
        unexplained, min_documents: see above.

    Raises:
        InputError: a threshold that is not positive.
    """
    if not threshold > 0:
        raise InputError(f"a threshold of {threshold} on g: give a positive share of the variance (s*^2)")
    conditions = {
        "dead": measured.fired == 0,
        "rare": measured.documents < min_documents,
        # NaN compares as False: a target that is constant where it fires, everywhere, is not called anything better.
        "unexplained": ~(measured.r2_mlp >= unexplained),
        "linear": measured.high < threshold,
        "nonlinear": measured.low > threshold,
    }
    return np.select(list(conditions.values()), list(conditions), "undecided")


def class_counts(classes: np.ndarray, apart: np.ndarray | None = None) -> dict[str, int]:
    """How many targets are in each of `CLASSES`; those `apart` (bool, such as outlier features) under "outlier" only.

    Shares of linear targets are of "linear" + "nonlinear" + "undecided", or of all alive: say which.
    """
    apart = np.zeros(len(classes), bool) if apart is None else apart & (classes != "dead")
    counts = {name: int(np.sum((classes == name) & ~apart)) for name in CLASSES}
    return {**counts, "outlier": int(apart.sum())}
