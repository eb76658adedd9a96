"""The lasso on a fixed dictionary, and how far codes are from its solution. Source: Tibshirani 1996; Chen et al. 1998.

    minimise over c   P(c) = ||x - c W||^2 + sum_j lambda_j |c_j|        for each row of x; optionally c >= 0

Notation of every solver here: `x [rows, d]`, atoms are the rows of `W [n_features, d]` (of any norm), `c [rows,
n_features]`, `penalty` is lambda and broadcasts against `[rows, n_features]`: a scalar, `[rows, 1]`, `[n_features]` or
`[rows, n_features]`; it is never negative. With r = x - c W, c is a solution exactly where

    2 w_j . r = lambda_j sign(c_j)  where c_j is not 0,   |2 w_j . r| <= lambda_j (c >= 0: 2 w_j . r <= lambda_j)  else

scikit-learn's `sparse_encode(alpha=lambda / 2)`, its `Lasso(alpha=lambda / (2 d))` and SPAMS' `lasso` with `lambda1` of
lambda / 2 solve the same problem.

The dual of one row is max over theta of 2 theta . x - ||theta||^2 with |2 w_j . theta| <= lambda_j. Any admissible
theta bounds the minimum from below; a multiple of r is taken, as is usual (Kim et al. 2007, "An interior-point method
for large-scale l1-regularized least squares", eq. 8), the best one: s r with s = x . r / ||r||^2, as far as admissible.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul

# What a tolerance is a tolerance of: the relative duality gap, or the violation of the conditions over lambda.
Measure = Literal["gap", "kkt"]
# What rounding leaves of the two, in units of the dtype's smallest step from 1.
_ROUNDING = {"gap": 8, "kkt": 128}


class Solution(NamedTuple):
    """What a solver with a tolerance returns.

    Attributes:
        codes: `[rows, n_features]`.
        gap: `[rows]` relative duality gap, as the solver measured it (its dtype's rounding included).
        violation: `[rows]` relative violation of the conditions (`kkt_violation`), likewise.
        iterations: `[rows]` int32, iterations or rounds that were spent on each row.
    """

    codes: jax.Array
    gap: jax.Array
    violation: jax.Array
    iterations: jax.Array


def reachable(tolerance: jax.Array | float, dtype: DTypeLike, measure: Measure) -> jax.Array:
    """The tolerance, or what rounding leaves where that is more.

    Raises:
        InputError: a measure that is not known.
    """
    if measure not in _ROUNDING:
        raise InputError(f"measure {measure!r}: give one of {', '.join(_ROUNDING)}")
    return jnp.maximum(jnp.asarray(tolerance, dtype), _ROUNDING[measure] * float(jnp.finfo(dtype).eps))


def check_problem(x: jax.Array, W: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """The penalty as an array that broadcasts against `[rows, n_features]`.

    Raises:
        InputError: shapes that do not belong together.
    """
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        raise InputError(f"x of shape {x.shape} and W of shape {W.shape}: give x [rows, d] and W [n_features, d]")
    penalty = jnp.asarray(penalty, x.dtype)
    full = (x.shape[0], W.shape[0])
    if penalty.ndim > 2 or any(have not in (1, due) for have, due in zip(penalty.shape[::-1], full[::-1])):
        raise InputError(
            f"penalty of shape {penalty.shape}: give a scalar, [{full[0]}, 1] for one a row, [{full[1]}] for one a "
            f"feature, or [{full[0]}, {full[1]}]"
        )
    return penalty


def shrink(u: jax.Array, threshold: jax.Array, signed: bool) -> jax.Array:
    """The proximal map of the penalty: `u` moved towards 0 by `threshold`; what would cross it is 0.

    With signed False, what is negative becomes 0 too.
    """
    if signed:
        return jnp.sign(u) * jnp.maximum(jnp.abs(u) - threshold, 0)
    return jnp.maximum(u - threshold, 0)


def objective(x: jax.Array, W: jax.Array, penalty: jax.Array | float, codes: jax.Array) -> jax.Array:
    """`[rows]`: ||x - c W||^2 + sum of lambda |c|."""
    left = x - matmul(codes, W)
    return primal(left, penalty, codes)


def primal(left: jax.Array, penalty: jax.Array | float, codes: jax.Array) -> jax.Array:
    """`[rows]`: the objective, from what the codes leave of x (`left [rows, d]`)."""
    return jnp.sum(left * left, axis=-1) + jnp.sum(penalty * jnp.abs(codes), axis=-1)


def duality_gap(
    x: jax.Array, W: jax.Array, penalty: jax.Array | float, codes: jax.Array, signed: bool = False
) -> jax.Array:
    """`[rows]`: (primal - dual) / primal, an upper bound on how far the objective is above its minimum, relatively.

    0 for a row whose objective is 0. Where a feature has no penalty only the dual point 0 may be at hand, and the gap
    of a row that is solved can be 1: see `kkt_violation`.
    """
    penalty = check_problem(x, W, penalty)
    left = x - matmul(codes, W)
    limit = largest_scale(matmul(left, W.T), penalty, signed)
    return gap_within(x, left, limit, primal(left, penalty, codes))


def largest_scale(correlations: jax.Array, penalty: jax.Array, signed: bool) -> jax.Array:
    """`[rows]`: the largest s for which s r is admissible, given the products of r with the atoms."""
    size = jnp.abs(correlations) if signed else correlations
    binding = size > 0
    return jnp.min(jnp.where(binding, penalty / jnp.where(binding, 2 * size, 1), jnp.inf), axis=-1)


def gap_within(x: jax.Array, left: jax.Array, limit: jax.Array, value: jax.Array) -> jax.Array:
    """`[rows]`: (value - dual) / value for the best dual point `s left` with 0 <= s <= `limit [rows]`."""
    squared, along = jnp.sum(left * left, axis=-1), jnp.sum(x * left, axis=-1)
    s = jnp.clip(along / jnp.where(squared > 0, squared, 1), 0, limit)
    # value - (2 s x.r - s^2 r.r), without the cancellation of two large numbers where s is near 1.
    dual = s * (2 * along - s * squared)
    return jnp.where(value > 0, (value - dual) / jnp.where(value > 0, value, 1), 0)


def kkt_violation(
    x: jax.Array, W: jax.Array, penalty: jax.Array | float, codes: jax.Array, signed: bool = False
) -> jax.Array:
    """`[rows]`: by how much the conditions above are broken at worst, over the row's mean lambda.

    Where all of a row's penalties are 0, over the largest |2 w . x| in their place; 0 where that is 0 too.
    """
    penalty = check_problem(x, W, penalty)
    correlations = matmul(x - matmul(codes, W), W.T)
    return broken_conditions(correlations, penalty, codes, signed) / violation_scale(x, W, penalty)


def broken_conditions(correlations: jax.Array, penalty: jax.Array, codes: jax.Array, signed: bool) -> jax.Array:
    """`[rows]`: the largest breach of a condition, in units of 2 w . r."""
    size = jnp.abs(correlations) if signed else correlations
    inactive = jnp.maximum(2 * size - penalty, 0)
    active = jnp.abs(2 * correlations - penalty * jnp.sign(codes))
    return jnp.max(jnp.where(codes != 0, active, inactive), axis=-1)


def violation_scale(x: jax.Array, W: jax.Array, penalty: jax.Array) -> jax.Array:
    """`[rows]`: what a breach of the conditions is measured against, see `kkt_violation`."""
    mean = jnp.mean(jnp.broadcast_to(penalty, (*penalty.shape[:-1], W.shape[0])), axis=-1)
    mean = jnp.broadcast_to(mean, x.shape[:1])

    def by_x(mean):
        largest = 2 * jnp.max(jnp.abs(matmul(x, W.T)), axis=-1)
        return jnp.where(mean > 0, mean, jnp.where(largest > 0, largest, 1))

    return jax.lax.cond(jnp.all(mean > 0), lambda mean: mean, by_x, mean)


def spectral_bound(W: jax.Array, doublings: int = 8) -> jax.Array:
    """A number that is at least the largest eigenvalue of `W W^T`, and at most some percent above it.

    For a positive semidefinite M of size m, lambda_max^p <= trace(M^p) <= m lambda_max^p; with p = 2^doublings = 256
    and m = 512 the root is at most 2.5 % too large. Power iteration, cheaper, gives a number that may be too small,
    and a step that may diverge.
    """
    # The smaller of W W^T and W^T W: they share what is not 0.
    M = matmul(W, W.T) if W.shape[0] <= W.shape[1] else matmul(W.T, W)

    def double(carry, _):
        M, log_scale = carry
        trace = jnp.maximum(jnp.trace(M), jnp.finfo(M.dtype).tiny)
        M = M / trace
        # M^p = exp(log_scale) (M / trace)^p; squaring both.
        return (matmul(M, M), 2 * (log_scale + jnp.log(trace))), None

    (M, log_scale), _ = jax.lax.scan(double, (M, jnp.zeros((), M.dtype)), None, length=doublings)
    trace = jnp.maximum(jnp.trace(M), jnp.finfo(M.dtype).tiny)
    bound = jnp.exp((log_scale + jnp.log(trace)) / 2**doublings)
    return bound * (1 + 100 * float(jnp.finfo(W.dtype).eps))  # and what rounding may have taken away
