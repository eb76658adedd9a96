"""Norms whose value and gradient are finite at zero."""

import jax
import jax.numpy as jnp


def safe_norm(x: jax.Array, axis: int = -1, keepdims: bool = False) -> jax.Array:
    """Euclidean norm along `axis`; at a zero vector both the norm and its gradient are 0 (not NaN)."""
    squared = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    nonzero = squared > 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squared, 1)), 0)


def unit_rows(w: jax.Array) -> jax.Array:
    """Each row of `w [n, d]` divided by its norm; a zero row stays zero."""
    norm = safe_norm(w, keepdims=True)
    return w / jnp.where(norm > 0, norm, 1)
