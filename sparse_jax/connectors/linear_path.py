"""The linear connector with an l1 penalty, solved exactly for every target at once from moments alone, along a path.

    minimise over W, b   sum over targets j of
        (1/N) sum over tokens (F2_j - F1 w_j - b_j)^2 / s_j^2  +  alpha * sum over inputs i of (r_i / s_j) |W_ij|

with r_i the norm of input i and s_j the scale of target j: the loss of `linear.Linear`. The data only enter through
moments (`moments.py`); in the units of `standardised.py` it is the lasso of each target,

    minimise over v_j   v_j A v_j - 2 B_j v_j + alpha ||v_j||_1         v_ij = W_ij r_i / s_j

with conditions   2 (B_j - A v_j)_i = alpha sign(v_ij)  where v_ij is not 0,   |2 (B_j - A v_j)_i| <= alpha  elsewhere.
scikit-learn's `Lasso(alpha / 2)` on F1 / r and F2_j / s_j solves the same. From alpha = 2 max |B| on all weights are 0.

Solved by `coding.working_set`, which wants A = M M' and B_j = x_j M': M and x come from an eigendecomposition of A (its
eigenvalues below rounding left out). Each alpha starts from the solution before, the larger one. The violation that is
reported is measured afterwards, in float64, from A and B themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg, sparse

from sparse_jax.coding import working_set
from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.moments import Moments
from sparse_jax.connectors.standardised import Standardised, standardised
from sparse_jax.errors import InputError

# Slots of the working sets; a target with more inputs is solved by FISTA on all of them.
SLOTS = (32, 128, 512)
# Points of a path by default, and its smallest alpha over the one from which all weights are 0.
POINTS, SMALLEST = 12, 2e-2


@dataclass(frozen=True, eq=False)
class LinearMaps:
    """Some linear connectors between the same codes.

    Attributes:
        weights: for each `[n1, n2]` float32, target units per unit of input; zeros not stored.
        bias: `[points, n2]` float64.
    """

    weights: tuple[sparse.csc_array, ...]
    bias: np.ndarray

    @property
    def nonzeros(self) -> np.ndarray:
        """`[points, n2]` int64: inputs that each target is made of."""
        return np.stack([np.diff(W.indptr) for W in self.weights]).astype(np.int64)

    def trained(self, point: int, problem: Standardised | None = None) -> Trained:
        """One of them as a connector; `problem` gives it the norms and scales of a loss (else they are 1)."""
        n1, n2 = self.weights[point].shape
        norms, scales = (np.ones(n1), np.ones(n2)) if problem is None else (problem.norms, problem.scales)
        params = {
            "W_dec": self.weights[point].toarray(),
            "b_dec": self.bias[point],
            "input_norm": np.where(norms > 0, norms, 1),
            "target_scale": np.where(scales > 0, scales, 1),
        }
        return Trained(Linear().sized(n1, n2), {name: jnp.array(each, jnp.float32) for name, each in params.items()})


@dataclass(frozen=True, eq=False)
class LinearPath(LinearMaps):
    """Linear connectors along a path, the strongest penalty first.

    Attributes:
        alphas: `[points]` descending.
        violation: `[points, n2]` by how much the conditions are broken at worst, over alpha; measured in float64.
        objective: `[points, n2]` what is minimised, of each target.
        l1: `[points, n2]` sum over inputs of r_i |W_ij| / s_j.
        problem: what was solved.
    """

    alphas: np.ndarray
    violation: np.ndarray
    objective: np.ndarray
    l1: np.ndarray
    problem: Standardised


def default_alphas(problem: Standardised, points: int = POINTS, smallest: float = SMALLEST) -> np.ndarray:
    """From just below the alpha at which all weights of all targets are 0, down to `smallest` times that.

    Raises:
        InputError: fewer than one point, a `smallest` outside (0, 1), or targets that no input goes along with.
    """
    largest = 2 * float(np.abs(problem.B).max(initial=0))
    if points < 1 or not 0 < smallest < 1 or not largest > 0:
        raise InputError(
            f"a path of {points} points down to {smallest} of the largest alpha, {largest:.3g}: give at least 1 point, "
            "a share between 0 and 1, and targets that are not constant"
        )
    return np.geomspace(largest, smallest * largest, points + 1)[1:]


def linear_path(
    given: Moments | Standardised,
    alphas: Sequence[float] | None = None,
    *,
    scales: np.ndarray | None = None,
    norms: np.ndarray | None = None,
    with_bias: bool = True,
    tolerance: float = 1e-3,
    float64: bool = False,
    slots: Sequence[int] = SLOTS,
    progress: Callable[[int, np.ndarray], None] | None = None,
) -> LinearPath:
    """Every alpha of a path for every target.

    Args:
        given: moments, or the problem made of them (then scales, norms and with_bias stand in it).
        alphas: penalties above 0, in any order; None: `default_alphas`.
        scales, norms, with_bias: see `standardised`.
        tolerance: of the conditions, over alpha; what float32 cannot tell, 1e-6 / alpha or so, is taken in its place.
        float64: compute in float64.
        slots: of the working sets.
        progress: is told of each point when it is solved, and of the nonzeros of its targets.

    Raises:
        InputError: alphas that are not above 0, moments of no tokens, scales or norms that cannot be.
    """
    problem = given
    if isinstance(given, Moments):
        problem = standardised(given, scales=scales, norms=norms, with_bias=with_bias)
    alphas = default_alphas(problem) if alphas is None else np.sort(np.asarray(alphas, np.float64))[::-1]
    if alphas.ndim != 1 or not alphas.size or not np.isfinite(alphas).all() or not (alphas > 0).all():
        raise InputError(f"alphas {np.asarray(alphas).tolist()}: give finite numbers above 0")
    with jax.enable_x64(float64):
        solutions = _solutions(
            problem, alphas, tolerance, jnp.float64 if float64 else jnp.float32, tuple(slots), progress
        )
    points = []
    for alpha, v in zip(alphas, solutions):
        W = problem.weights(v)
        l1 = np.asarray(abs(v).sum(axis=1)).reshape(-1)
        points.append((W, problem.bias(W), violation(problem, v, alpha), problem.error(v) + alpha * l1, l1))
    weights, bias, broken, objective, l1 = zip(*points)
    return LinearPath(
        tuple(W.astype(np.float32) for W in weights),
        np.stack(bias),
        alphas,
        *(np.stack(each) for each in (broken, objective, l1)),
        problem,
    )


def factored(problem: Standardised) -> tuple[np.ndarray, np.ndarray]:
    """(M `[n1, rank]`, x `[n2, rank]`) with M M' = A and x M' = B, up to rounding."""
    values, vectors = linalg.eigh(problem.A)
    kept = values > 1e-12 * max(float(values.max(initial=0)), 1e-300)
    root = np.sqrt(values[kept])
    return vectors[:, kept] * root, problem.B @ (vectors[:, kept] / root)


@partial(jax.jit, static_argnames=("slots",))
def _solved(x, M, A, alpha, tolerance, start, slots):
    return working_set.lasso(x, M, alpha, tolerance, measure="kkt", start=start, signed=True, gram=A, slots=slots).codes


def _solutions(problem, alphas, tolerance, dtype, slots, progress) -> list[sparse.csr_array]:
    """`[n2, n1]` v of each alpha, float64."""
    M, x = (jnp.array(part, dtype) for part in factored(problem))
    A = jnp.array(problem.A, dtype)
    v = jnp.zeros(problem.B.shape, dtype)
    found = []
    for point, alpha in enumerate(alphas):
        # Rounding of 2 (B - A v), of which the terms are at most 1, over alpha.
        reachable = max(tolerance, 32 * float(jnp.finfo(dtype).eps) / alpha)
        v = _solved(x, M, A, jnp.array(alpha, dtype), jnp.array(reachable, dtype), v, slots)
        found.append(sparse.csr_array(np.asarray(v).astype(np.float64)))
        if progress is not None:
            progress(point, np.diff(found[-1].indptr))
    return found


def violation(problem: Standardised, v: sparse.csr_array, alpha: float) -> np.ndarray:
    """`[n2]`: by how much the conditions of `v [n2, n1]` are broken at worst, over alpha; float64."""
    correlation = 2 * (problem.B - v @ problem.A)
    broken = np.maximum(np.abs(correlation) - alpha, 0)
    rows, columns = v.nonzero()
    broken[rows, columns] = np.abs(correlation[rows, columns] - alpha * np.sign(v.data[v.data != 0]))
    return broken.max(axis=1, initial=0) / alpha
