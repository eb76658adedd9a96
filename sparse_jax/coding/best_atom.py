"""The choice that every pursuit makes: which atom is most like what is left. Source: Mallat & Zhang 1993.

    j = argmax over i of  r . w_i / ||w_i||        (of its magnitude where codes may be negative)

Of all atoms, w_j lowers ||r - v w_j||^2 the most for the best v, by the square of this correlation, whatever the atoms'
norms. A zero atom has correlation 0.
"""

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul
from sparse_jax.numerics.norms import safe_norm


def check_pursuit(x: jax.Array, W: jax.Array, k: int) -> None:
    """What every pursuit is given.

    Raises:
        InputError: shapes that do not belong together, or k below 1.
    """
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        raise InputError(f"x of shape {x.shape} and W of shape {W.shape}: give x [rows, d] and W [n_features, d]")
    if k < 1:
        raise InputError(f"k {k}: give 1 or more")


def inverse_norms(W: jax.Array) -> jax.Array:
    """`[n_features]`: 1 over the norm of each row of `W [n_features, d]`; 0 for a zero row."""
    norms = safe_norm(W)
    return jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)


def best_atom(left: jax.Array, W: jax.Array, inverse: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """The atom that is most like what is left of each row.

    Args:
        left: `[rows, d]`.
        W: `[n_features, d]`.
        inverse: `[n_features]`, its `inverse_norms`.
        signed: whether an atom may be taken with a negative value.

    Returns:
        (chosen `[rows]` int32, its correlation `[rows]`). Nothing was found where the correlation is 0, or not positive
        with signed False; then chosen says nothing.
    """
    correlations = matmul(left, W.T) * inverse
    size = jnp.abs(correlations) if signed else correlations
    chosen = jnp.argmax(size, axis=-1).astype(jnp.int32)
    found = jnp.take_along_axis(size, chosen[:, None], axis=1)[:, 0]
    correlation = jnp.take_along_axis(correlations, chosen[:, None], axis=1)[:, 0]
    return chosen, jnp.where(found > 0, correlation, 0)
