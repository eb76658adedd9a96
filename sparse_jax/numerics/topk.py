"""Keep the k largest coefficients of each row."""

import jax
import jax.numpy as jnp
from jax import lax


def keep_top_k(x: jax.Array, k: int) -> jax.Array:
    """`x [rows, n]` with all but the `k` entries of largest magnitude of each row set to zero.

    Ties go to the lower index. `lax.top_k` on float32 is the fastest exact selection measured on CPU.
    """
    if k >= x.shape[-1]:
        return x
    _, indices = lax.top_k(jnp.abs(x), k)
    kept = jnp.take_along_axis(x, indices, axis=-1)
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros_like(x).at[rows, indices].set(kept, unique_indices=True)
