"""The penalty at which codes have a wished number of active features."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sparse_jax.coding.lasso import Solution
from sparse_jax.coding.working_set import lasso
from sparse_jax.errors import InputError


def penalty_for_l0(
    x: jax.Array,
    W: jax.Array,
    l0: float,
    *,
    signed: bool = False,
    tolerance: float = 1e-4,
    within: float = 0.01,
    solve: Callable[[jax.Array, jax.Array, jax.Array], Solution] | None = None,
) -> tuple[float, float]:
    """(lambda, the mean L0 at it), by bisection of log lambda on the rows of x.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`.
        l0: the wished mean number of codes that are not 0.
        signed: whether codes may be negative.
        tolerance: relative duality gap of the codes.
        within: how far from the wished L0 is near enough, as a share of it.
        solve: (x, W, lambda) -> Solution, in place of `lasso`.

    Raises:
        InputError: an L0 that no penalty gives.
    """
    solve = jax.jit(solve or partial(lasso, tolerance=tolerance, signed=signed))

    def mean_l0(penalty: float) -> float:
        codes = solve(x, W, jnp.array(penalty, x.dtype)).codes
        return float(jnp.mean(jnp.sum(codes != 0, axis=1, dtype=jnp.int32).astype(x.dtype)))

    correlations = jnp.abs(x @ W.T) if signed else x @ W.T
    # Above the largest correlation nothing is active.
    highest = 2 * float(jnp.max(correlations))
    if not (0 < l0 < W.shape[0] and highest > 0):
        raise InputError(f"L0 {l0}: give more than 0 and less than {W.shape[0]}, and rows that are not all 0")
    low, high, found = None, highest, 0.0
    penalty = highest / 4
    for _ in range(60):
        found = mean_l0(penalty)
        if abs(found / l0 - 1) <= within:
            return penalty, found
        if found > l0:
            low = penalty
        else:
            high = penalty
        # Until there is a lower end, a denser one is looked for; a penalty near 0 is not worth what it takes to solve.
        penalty = penalty / 2 if low is None else math.sqrt(low * high)
        if penalty < 1e-6 * highest:
            raise InputError(f"L0 {l0}: even a penalty of {penalty:.1e} leaves {found:.1f} active")
    return penalty, found
