"""How much of the features after a module do the features before it explain, at the same position?

    fitted = fit_ridge(train)
    found = same_position(held_out, {"linear": fitted.predict, "MLP": mlp.predict})
    found.r2["linear"]             [targets] R^2 on held-out tokens
    found.summary()                quantiles, shares of features above thresholds, R^2 of all together

What no map of the same position explains, the others must bring: for attention that is what it moves. R^2_j = 1 -
MSE_j / Var_j on held-out tokens, Var_j about their own mean. Targets that fire on fewer than `least` held-out tokens
are left out: theirs is noise. Pooled R^2 is 1 - sum MSE_j / sum Var_j over the same targets; weighted by what a target
varies, it is ruled by the strong ones, the median is not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from sparse_jax.connectors.paired_codes import Pair, SiteCodes
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes

# From codes of some tokens to predicted target codes [tokens, n_out].
Predict = Callable[[SparseCodes], jax.Array | np.ndarray]

# Firings on held-out tokens from which a target's R^2 counts; thresholds of the summary; tokens at once.
LEAST, THRESHOLDS, ROWS = 20, (0.1, 0.3, 0.5, 0.7, 0.9), 2048
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
    held_out: Pair, predictors: dict[str, Predict], *, least: int = LEAST, rows: int = ROWS
) -> SamePosition:
    """R^2 of every target by every map, on held-out tokens.

    Args:
        held_out: codes that no map was fitted on.
        predictors: by name; each is called with codes of `rows` tokens, always as many (the rest are empty).
        least: firings from which a target counts.
        rows: tokens at once; memory: two arrays rows x targets, float64, and what the maps need.

    Raises:
        InputError: no tokens; a prediction of another shape or that is not finite.
    """
    n, targets = len(held_out), held_out.targets.n_features
    if not n or least < 1:
        raise InputError(f"{n} held-out tokens, least {least}: give at least 1 of each")
    errors = {name: np.zeros(targets) for name in predictors}
    sums, squares, fired = np.zeros(targets), np.zeros(targets), np.zeros(targets, np.int64)
    for start in range(0, n, rows):
        some = slice(start, min(start + rows, n))
        actual = held_out.targets.dense(some).astype(np.float64)
        sums, squares, fired = sums + actual.sum(0), squares + (actual**2).sum(0), fired + (actual > 0).sum(0)
        empty = rows - len(actual)
        codes = SparseCodes(*(np.pad(each, ((0, empty), (0, 0))) for each in held_out.inputs.at(some)))
        for name, predict in predictors.items():
            predicted = np.asarray(predict(codes), np.float64)
            if predicted.shape != (rows, targets) or not np.isfinite(predicted).all():
                raise InputError(
                    f"map {name!r} gave {predicted.shape} for {rows} tokens and {targets} targets, or numbers that are "
                    "not finite"
                )
            errors[name] += ((predicted[: len(actual)] - actual) ** 2).sum(0)
    variance = np.maximum(squares / n - (sums / n) ** 2, 0)
    usable = (fired >= least) & (variance > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = {name: np.where(usable, 1 - error / n / variance, np.nan) for name, error in errors.items()}
    return SamePosition(r2, variance, fired, least, n)


@dataclass(frozen=True, eq=False)
class Ridge:
    """A dense linear map with bias. Numpy.

    Attributes:
        weights: `[n_in, n_out]` float32.
        bias: `[n_out]` float32.
        ridge: the penalty it was fitted with, relative to the mean variance of the inputs.
    """

    weights: np.ndarray
    bias: np.ndarray
    ridge: float

    def predict(self, codes: SparseCodes) -> np.ndarray:
        """`[tokens, n_out]` predicted codes."""
        values, indices = (np.asarray(each) for each in codes)
        return np.asarray(_matrix(values, indices, len(self.weights)) @ self.weights) + self.bias


def fit_ridge(train: Pair, ridge: float = 1e-2) -> Ridge:
    """Least squares of all targets on all inputs, in float64: (F1'F1 + ridge x mean variance x tokens) W = F1'F2.

    Codes are centred, so the bias is not shrunk.

    Args:
        train: codes.
        ridge: penalty of squared weights, as a share of the inputs' mean variance; above 0, so that dead inputs do no
            harm.

    Raises:
        InputError: a ridge that is not above 0; inputs that never fire.
    """
    if not ridge > 0:
        raise InputError(f"ridge {ridge}: give a number above 0")
    x, y = (_site_matrix(side) for side in (train.inputs, train.targets))
    n = x.shape[0]
    mean_x, mean_y = (np.asarray(each.mean(axis=0), np.float64).reshape(-1) for each in (x, y))
    gram = (x.T @ x).toarray() - n * np.outer(mean_x, mean_x)
    cross = (x.T @ y).toarray() - n * np.outer(mean_x, mean_y)
    scale = np.trace(gram) / len(gram)
    if not scale > 0:
        raise InputError("no input feature varies on these tokens: nothing can be fitted")
    gram[np.diag_indices_from(gram)] += ridge * scale
    try:
        W = cho_solve(cho_factor(gram, overwrite_a=True), cross)
    except LinAlgError as error:
        raise InputError(f"the inputs' Gram matrix cannot be factored ({error}): give a larger ridge") from error
    return Ridge(W.astype(np.float32), (mean_y - mean_x @ W).astype(np.float32), ridge)


def choose_ridge(train: Pair, ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0), seed: int = 0) -> Ridge:
    """`fit_ridge` on all of `train` with the ridge of the best pooled R^2 on a tenth of its documents."""
    fit, check = train.split(0.1, seed)
    maps = {str(ridge): fit_ridge(fit, ridge).predict for ridge in ridges}
    summary = same_position(check, maps, least=1).summary()
    pooled = [summary[str(ridge)].get("pooled", -np.inf) for ridge in ridges]
    return fit_ridge(train, ridges[int(np.argmax(pooled))])


def _matrix(values, indices, n: int) -> sparse.csr_array:
    rows = np.repeat(np.arange(len(values)), values.shape[1])
    return sparse.csr_array((values.reshape(-1), (rows, indices.reshape(-1))), shape=(len(values), n))


def _site_matrix(site: SiteCodes) -> sparse.csr_array:
    return _matrix(np.asarray(site.values, np.float64), np.asarray(site.indices), site.n_features)


def constant(train: Pair) -> Predict:
    """The targets' means, whatever the input: the floor."""
    mean = np.zeros(train.targets.n_features)
    np.add.at(mean, np.asarray(train.targets.indices), np.asarray(train.targets.values, np.float64))
    mean = (mean / len(train)).astype(np.float32)
    return lambda codes: np.broadcast_to(mean, (len(codes.values), len(mean)))


def by_target(r2: Float[np.ndarray, " targets"], order: int = 10) -> list[tuple[int, float]]:
    """(feature, R^2) of the targets that the same position explains least: what attention must have brought."""
    there = np.flatnonzero(np.isfinite(r2))
    return [(int(j), float(r2[j])) for j in there[np.argsort(r2[there], kind="stable")][:order]]
