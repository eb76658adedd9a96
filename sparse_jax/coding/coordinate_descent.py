"""Coordinate descent on small problems, many at once. Source: Friedman et al. 2010, section 2.2 (covariance updates).

    for each feature j in turn:   c_j = shrink(c_j G_jj + w_j . r, lambda_j / 2) / G_jj       r = x - c W,  G = W W^T

With the Gram matrix G and b = W x, what is needed of r is q = b - G c, which a change of c_j moves by a row of G. A
pass does the work of four to five iterations of FISTA with a good step size, but is made of m small operations in a
row: on 64 problems of 64 coherent atoms FISTA was twice as fast to the same gap, on a CPU. It needs no step size, and
suits problems of a few atoms.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding.lasso import shrink


def descend(
    gram: jax.Array, b: jax.Array, threshold: jax.Array, start: jax.Array, cycles: int, signed: bool = False
) -> jax.Array:
    """Codes after so many passes over all features of each row's own small problem.

    Args:
        gram: `[rows, m, m]`, products of each row's atoms; one of length 0 never becomes active.
        b: `[rows, m]`, products of its atoms with x.
        threshold: lambda / 2, broadcasts against `[rows, m]`.
        start: `[rows, m]` codes to begin with.
        cycles: passes, static.
        signed: whether codes may be negative.

    Returns:
        `[rows, m]`.
    """
    # Rows last: an update is then a handful of operations on whole vectors of rows. The barrier keeps the transposition
    # from being fused into what made the matrices (a gather, say), which took several times as long on a CPU.
    G = lax.optimization_barrier(gram).transpose(1, 2, 0)
    q = (b - jnp.einsum("bij,bj->bi", gram, start)).T
    rows, m = start.shape
    threshold = jnp.broadcast_to(threshold, (rows, m)).T
    lengths = jnp.einsum("iib->ib", G)
    inverse = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
    # Unsigned, and scanned rather than indexed: half the operations of a loop over i % m.
    features = jnp.arange(m, dtype=jnp.uint32)

    def update(q, feature):
        j, row, c, t, length, inverse = feature
        product = lax.dynamic_index_in_dim(q, j, keepdims=False)
        made = inverse * shrink(product + length * c, t, signed)
        return q - row * (made - c), made

    def cycle(_, state):
        q, c = state
        return lax.scan(update, q, (features, G, c, threshold, lengths, inverse))

    _, c = lax.fori_loop(0, cycles, cycle, (q, start.T))
    return c.T
