"""Gradients through the solution of the lasso, however it was found. Source: Mairal et al. 2012 ("Task-driven
dictionary learning", proposition 1); Bertrand et al. 2020 (implicit differentiation on the support).

On the active features A of a row, with signs s, the conditions read  G c = W x - lambda s / 2,  G = W_A W_A^T. They
hold near by too, where no feature enters or leaves, and differentiating them gives for a gradient g in the codes

    v = G^-1 g_A     grad x = v W_A     grad W_j = v_j r - c_j (v W_A)     grad lambda_j = -v_j s_j / 2     r = x - c W

G^-1 is applied by conjugate gradients, two products with W an iteration, all rows at once. Where a row's active atoms
depend on each other the solution is not unique, and v is the smallest that does.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding.lasso import check_problem
from sparse_jax.numerics import matmul

# Iterations of conjugate gradients at most: in exact arithmetic as many do as a row has active features.
_ITERATIONS = 200


def differentiable_lasso(
    solve: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    W: jax.Array,
    penalty: jax.Array | float,
) -> jax.Array:
    """`solve(x, W, penalty)`, codes `[rows, n_features]`, with the gradient of the exact solution in all three.

    Args:
        solve: any solver that answers with codes close to the solution; static, as is what it closes over.
        x, W, penalty: see lasso.py.

    Raises:
        InputError: shapes that do not belong together.
    """
    return _solved(solve, x, W, check_problem(x, W, penalty))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solved(solve, x, W, penalty):
    return solve(x, W, penalty)


def _forward(solve, x, W, penalty):
    codes = solve(x, W, penalty)
    return codes, (x, W, penalty, codes)


def _backward(solve, saved, g):
    x, W, penalty, codes = saved
    v = solve_on_support(W, codes != 0, g)
    left, along = x - matmul(codes, W), matmul(v, W)
    grad_W = matmul(v.T, left) - matmul(codes.T, along)
    grad_penalty = -0.5 * v * jnp.sign(codes)
    # What the penalty was broadcast over is summed.
    lead = grad_penalty.ndim - penalty.ndim
    summed = jnp.sum(grad_penalty, axis=tuple(range(lead)))
    for axis, size in enumerate(penalty.shape):
        if size == 1:
            summed = jnp.sum(summed, axis=axis, keepdims=True)
    return along, grad_W, summed


_solved.defvjp(_forward, _backward)


def solve_on_support(W: jax.Array, active: jax.Array, g: jax.Array) -> jax.Array:
    """v `[rows, n_features]` with `(v W) W^T = g` in each row's active features, and v = 0 in the others.

    Args:
        W: `[n_features, d]`.
        active: `[rows, n_features]` bool.
        g: `[rows, n_features]`; only what is active counts.
    """
    g = jnp.where(active, g, 0)
    enough = jnp.finfo(g.dtype).eps ** 2 * jnp.sum(g * g, axis=-1)

    def apply(v):
        return jnp.where(active, matmul(matmul(v, W), W.T), 0)

    def step(state):
        v, left, direction, squared, i = state
        image = apply(direction)
        curvature = jnp.sum(direction * image, axis=-1)
        go = (squared > enough) & (curvature > 0)
        length = jnp.where(go, squared / jnp.where(go, curvature, 1), 0)[:, None]
        v, left = v + length * direction, left - length * image
        now = jnp.sum(left * left, axis=-1)
        ratio = jnp.where(go, now / jnp.where(squared > 0, squared, 1), 0)[:, None]
        return v, left, left + ratio * direction, jnp.where(go, now, 0), i + 1

    state = jnp.zeros_like(g), g, g, jnp.sum(g * g, axis=-1), jnp.zeros((), jnp.int32)
    return lax.while_loop(lambda state: jnp.any(state[3] > enough) & (state[4] < _ITERATIONS), step, state)[0]
