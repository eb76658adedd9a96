"""Codes found by Adam on the codes themselves. Source: Cunningham et al. 2023's early code, which optimised codes so;
Adam: Kingma & Ba 2015, algorithm 1.

    minimise over c   ||x - c W||^2 + sum of lambda |c|,    optionally c >= 0         (the objective of lasso.py)

Adam on |c| never makes a value exactly 0: its steps jump to and fro over 0 by about the learning rate, and every
feature stays active. So a step is Adam's, and what has crossed 0 is put there:

    c >= 0:    g = 2 (c W - x) W^T + lambda,     c = max(c - rate m / (sqrt(v) + eps), 0)
    signed:    g = 2 (c W - x) W^T,              c = shrink(c - rate m / (sqrt(v) + eps), rate lambda / (sqrt(v) + eps))

with m, v Adam's bias-corrected means of g and g^2. The threshold of the signed step is in Adam's own metric, each
coordinate by its own v: a threshold of rate x lambda for all would be the solution of another problem.

A point that stays is a solution. With a constant rate of 0.1 the objective came within 1e-6 of its minimum in some 300
steps (signed: 1,000) on 40 unit atoms in 16 dimensions; but in 4,000 v had become so small that Adam jumped away again,
to 1e-5: a rate that falls to 0 does not. `fista.py` needs no rate and is far faster; this is here to compare with.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.coding.lasso import check_problem, shrink
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul

# Adam's, as in the paper.
_B1, _B2, _EPS = 0.9, 0.999, 1e-8


def code_gradient(
    x: jax.Array,
    W: jax.Array,
    penalty: jax.Array | float,
    iterations: int,
    *,
    learning_rate: float | optax.Schedule = 0.1,
    start: jax.Array | None = None,
    signed: bool = False,
) -> jax.Array:
    """Codes after a fixed number of Adam's steps.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`.
        penalty: lambda, see lasso.py.
        iterations: static; two products with W each.
        learning_rate: in units of the codes: one moves by about this in a step. A number, or a schedule, which is given
            the number of the step.
        start: `[rows, n_features]` codes to begin with; zeros by default.
        signed: whether codes may be negative.

    Returns:
        `[rows, n_features]`.

    Raises:
        InputError: shapes that do not belong together, fewer than 0 iterations, a negative learning rate.
    """
    penalty = check_problem(x, W, penalty)
    if iterations < 0:
        raise InputError(f"iterations {iterations}: give 0 or more")
    shape = (x.shape[0], W.shape[0])
    if start is not None and start.shape != shape:
        raise InputError(f"start of shape {start.shape}: give [rows, n_features], {shape}")
    if isinstance(learning_rate, (int, float)) and learning_rate < 0:
        raise InputError(f"learning_rate {learning_rate}: give 0 or more")
    adam = optax.scale_by_adam(_B1, _B2, _EPS)

    def step(state, i):
        codes, moments = state
        gradient = 2 * matmul(matmul(codes, W) - x, W.T)
        if not signed:
            gradient = gradient + penalty
        # Optax mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            update, moments = adam.update(gradient, moments)
            rate = jnp.asarray(learning_rate(i) if callable(learning_rate) else learning_rate, x.dtype)
            scale = jnp.sqrt(optax.tree.bias_correction(moments.nu, _B2, moments.count)) + _EPS
        threshold = rate * penalty / scale if signed else jnp.zeros((), x.dtype)
        return (shrink(codes - rate * update, threshold, signed), moments), None

    codes = jnp.zeros(shape, x.dtype) if start is None else start
    if not signed:
        codes = jnp.maximum(codes, 0)
    (codes, _), _ = lax.scan(step, (codes, adam.init(codes)), jnp.arange(iterations, dtype=jnp.int32))
    return codes
