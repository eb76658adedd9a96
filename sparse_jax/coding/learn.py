"""Dictionary learning: how atoms move, given codes. A learner is `(init, update)`; codes come from any solver.

    quadratic   w_j += rate (c_j . r) / (h_j + lowest),   h_j a moving average of c_j^2     Yun et al. 2021, their code
    online      A = sum c^T c,  B = sum c^T x;   w_j += (B_j - A_j W) / A_jj                Mairal et al. 2009, alg. 1-2
    gradient    any Optax transformation of the gradient of ||x - c W||^2, codes fixed      Olshausen & Field 1996

    r = x - c W; sums and products are over the rows of a batch, `c_j . r` is their mean. All put the rows of W back to
    norm 1 afterwards.

With codes that solve the lasso, the gradient with codes fixed is the gradient of the lasso's minimum in W (Danskin), so
`gradient` descends the same objective as the codes.

The quadratic update is a step of Newton's method on a diagonal Hessian (h_j is the curvature in every number of w_j):
rare features, whose gradients are rarely there, move as far as frequent ones. `lowest` keeps silent ones from jumping.
The online update is coordinate descent on the whole past, what is long past weighing less.

`learn_dictionary.py` goes through rows in memory with one of them; `experiments.fista_dictionary` through a language
model's activations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_jax.numerics import matmul, unit_rows

# Yun et al.'s: batches that the moving average remembers, and the least curvature.
_HISTORY, _LOWEST = 300, 1e-3


class Learner(NamedTuple):
    """How atoms move.

    Attributes:
        init: W `[n_features, d]` -> the learner's state.
        update: (state, W, x `[rows, d]`, codes `[rows, n_features]`, weight `[rows]`) -> (state, W).
        reset: (state, which `[n_features]` bool) -> the state that knows nothing of these atoms, which are new.
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], tuple[Any, jax.Array]]
    reset: Callable[[Any, jax.Array], Any]


def quadratic(rate: float = 1.0, history: int = _HISTORY, lowest: float = _LOWEST) -> Learner:
    """Yun et al.'s basis update, with the Hessian's diagonal averaged over about `history` batches.

    Args:
        rate: 1 is a full Newton step in each atom alone; atoms that are active together move together, so that less
            may be wanted. (Their code's step size is 1e-3, over hundreds of thousands of steps.)
        history: batches that the average remembers. It is corrected for its start at 0, as Adam's are.
        lowest: least curvature, in units of squared codes.
    """

    def init(W):
        return jnp.zeros(W.shape[0], W.dtype), jnp.zeros((), jnp.int32)

    def update(state, W, x, codes, weight):
        average, count = state
        rows = jnp.maximum(jnp.sum(weight), 1)
        weighted = codes * weight[:, None]
        average = average + (jnp.sum(weighted * codes, axis=0) / rows - average) / history
        count = count + 1
        curvature = average / (1 - (1 - 1 / history) ** count.astype(W.dtype))
        step = matmul(weighted.T, x - matmul(codes, W)) / rows
        return (average, count), unit_rows(W + rate * step / (curvature + lowest)[:, None])

    def reset(state, which):
        # As if they had been as active as the others: an average of 0 would let a first step jump.
        average, count = state
        others = jnp.sum(jnp.where(which, 0, average)) / jnp.maximum(jnp.sum(~which, dtype=average.dtype), 1)
        return jnp.where(which, others, average), count

    return Learner(init, update, reset)


def online(rho: float = 8.0, passes: int = 1) -> Learner:
    """Mairal et al.'s block coordinate descent on the statistics of all batches.

    Args:
        rho: before batch t the statistics of earlier ones are multiplied by (1 - 1 / t)^rho (Mairal et al. 2010,
            section 3.4.4), so that codes found with early atoms are forgotten soon; 0 forgets nothing.
        passes: over the atoms, per batch.

    The state holds A `[n_features, n_features]` and B `[n_features, d]`; atoms are updated one after the other, in
    n_features small steps, which suits dictionaries of a few thousand.
    """

    def init(W):
        n, d = W.shape
        return jnp.zeros((n, n), W.dtype), jnp.zeros((n, d), W.dtype), jnp.zeros((), jnp.int32)

    def update(state, W, x, codes, weight):
        weighted = codes * weight[:, None]
        count = state[2] + 1
        forget = (1 - 1 / count.astype(W.dtype)) ** rho
        A = forget * state[0] + matmul(weighted.T, codes)
        B = forget * state[1] + matmul(weighted.T, x)

        def atom(j, W):
            scale = A[j, j]
            moved = W[j] + (B[j] - A[j] @ W) / jnp.where(scale > 0, scale, 1)
            return W.at[j].set(jnp.where(scale > 0, unit_rows(moved[None])[0], W[j]))

        W = lax.fori_loop(0, passes * W.shape[0], lambda i, W: atom(i % W.shape[0], W), W)
        return (A, B, count), W

    def reset(state, which):
        A, B, count = state
        return jnp.where(which[:, None] | which, 0, A), jnp.where(which[:, None], 0, B), count

    return Learner(init, update, reset)


def gradient(transform: optax.GradientTransformation) -> Learner:
    """Any Optax transformation (its learning rate included) of the gradient with codes fixed."""

    def update(state, W, x, codes, weight):
        rows = jnp.maximum(jnp.sum(weight), 1)
        grad = 2 * matmul((codes * weight[:, None]).T, matmul(codes, W) - x) / rows
        # Along an atom of norm 1 a step only changes its length, which is put back.
        grad = grad - jnp.sum(grad * W, axis=-1, keepdims=True) * W
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
            updates, state = transform.update(grad, state, W)
        return state, unit_rows(W + updates)

    def reset(state, which):
        # Whatever has a row for each atom (moments).
        rows = lambda a: getattr(a, "ndim", 0) == 2 and a.shape[0] == which.shape[0]  # noqa: E731
        return jax.tree.map(lambda a: jnp.where(which[:, None], 0, a) if rows(a) else a, state)

    return Learner(transform.init, update, reset)


def refresh(
    W: jax.Array, dead: jax.Array, x: jax.Array, codes: jax.Array, weight: jax.Array, key: jax.Array
) -> jax.Array:
    """W with the dead atoms replaced by rows of what is left of x, drawn with probability proportional to its square.

    Args:
        W: `[n_features, d]`.
        dead: `[n_features]` bool.
        x, codes, weight: a batch; rows of weight 0 are not drawn, no row is drawn twice while there are others.
        key: for the draw.
    """
    left = x - matmul(codes, W)
    squared = jnp.where(weight > 0, jnp.sum(left * left, axis=-1), 0)
    noise = jax.random.gumbel(key, squared.shape, squared.dtype)
    order = jnp.argsort(-jnp.where(squared > 0, jnp.log(jnp.where(squared > 0, squared, 1)) + noise, -jnp.inf))
    rank = jnp.cumsum(dead, dtype=jnp.int32) - 1
    drawn = unit_rows(left[order[rank % jnp.maximum(jnp.sum(squared > 0, dtype=jnp.int32), 1)]])
    usable = dead & jnp.any(squared > 0)
    return jnp.where(usable[:, None], drawn, W)
