"""Iterative hard thresholding for many rows at once. Source: Blumensath & Davies 2009 ("Iterative hard thresholding for
compressed sensing"; convergence: their 2008 "Iterative thresholding for sparse approximations"); the adaptive step:
Blumensath & Davies 2010 ("Normalized iterative hard thresholding").

    minimise ||x - c W||^2 with at most k active features:       c = H_k(c + mu (x - c W) W^T)

H_k keeps the k entries of largest magnitude (those that are positive, with signed False). With mu at most 1 over the
largest eigenvalue of W W^T no step raises the objective: the safe step. It is far too careful where atoms are coherent.

The adaptive step is the best one along the gradient g on the active features A (at c = 0: on those that H_k of the
gradient would keep), mu = ||g_A||^2 / ||g_A W_A||^2. It is taken where the move m that it makes has

    mu ||m W||^2 <= ||m||^2         from which the objective does not rise; it is so where the active features stay

and the safe step is in its place where not (the paper tries smaller and smaller ones, to the same condition).

The minimum it ends in is a local one, and depends on the norms of the atoms: a long atom's entry is small.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding.best_atom import check_pursuit
from sparse_jax.coding.lasso import spectral_bound
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul
from sparse_jax.numerics.topk import keep_top_k


def iterative_hard_thresholding(
    x: jax.Array,
    W: jax.Array,
    k: int,
    iterations: int,
    *,
    signed: bool = False,
    start: jax.Array | None = None,
    adaptive: bool = True,
) -> jax.Array:
    """Codes of at most k active features; the objective of a row never rises.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`.
        k: active features of a row at most, static.
        iterations: static; two products with W each, four if adaptive.
        signed: whether codes may be negative.
        start: `[rows, n_features]` codes to begin with, of which the k largest are kept; zeros by default.
        adaptive: False takes the safe step only.

    Returns:
        `[rows, n_features]`, dense.

    Raises:
        InputError: shapes that do not belong together, k below 1, fewer than 0 iterations.
    """
    check_pursuit(x, W, k)
    if iterations < 0:
        raise InputError(f"iterations {iterations}: give 0 or more")
    shape = (x.shape[0], W.shape[0])
    if start is not None and start.shape != shape:
        raise InputError(f"start of shape {start.shape}: give [rows, n_features], {shape}")
    bound = spectral_bound(W)
    safe = 1 / jnp.where(bound > 0, bound, 1)
    # The condition holds with equality where the active features stay: rounding must not turn that into a refusal.
    slack = 1 + 1000 * float(jnp.finfo(x.dtype).eps)

    def step(state, _):
        codes, left = state
        gradient = matmul(left, W.T)
        made = _kept(codes + safe * gradient, k, signed)
        decoded = matmul(made, W)
        if adaptive:
            mu = _best_step(W, codes, gradient, k, signed)
            bold = _kept(codes + mu * gradient, k, signed)
            bold_decoded = matmul(bold, W)
            moved = bold_decoded - (x - left)
            holds = mu[:, 0] * jnp.sum(moved * moved, axis=-1) <= slack * jnp.sum((bold - codes) ** 2, axis=-1)
            made, decoded = (jnp.where(holds[:, None], a, b) for a, b in ((bold, made), (bold_decoded, decoded)))
        return (made, x - decoded), None

    codes = jnp.zeros(shape, x.dtype) if start is None else _kept(start, k, signed)
    left = x if start is None else x - matmul(codes, W)
    (codes, _), _ = lax.scan(step, (codes, left), None, length=iterations)
    return codes


def _kept(codes: jax.Array, k: int, signed: bool) -> jax.Array:
    """The nearest codes that are admissible."""
    return keep_top_k(codes if signed else jnp.maximum(codes, 0), k)


def _best_step(W: jax.Array, codes: jax.Array, gradient: jax.Array, k: int, signed: bool) -> jax.Array:
    """`[rows, 1]`: how far the gradient on the active features leads downhill."""
    some = jnp.any(codes != 0, axis=-1, keepdims=True)
    among = jnp.where(some, jnp.where(codes != 0, gradient, 0), _kept(gradient, k, signed))
    slope = jnp.sum(among * among, axis=-1, keepdims=True)
    moved = matmul(among, W)
    bend = jnp.sum(moved * moved, axis=-1, keepdims=True)
    return jnp.where(bend > 0, slope / jnp.where(bend > 0, bend, 1), 0)
