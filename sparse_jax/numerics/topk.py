"""Which coefficients are the largest: k of each row, or as many of a whole batch.

`lax.top_k` on float32 is the fastest exact selection measured on CPU: bfloat16 takes 25 times as long, a sort 20 times.
Its answer is never sliced statically here: XLA then falls back to a full sort, 20 times slower.

Where a mesh of devices divides rows or features the same selections are those of sharded_topk.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.numerics import sharded_topk
from sparse_jax.numerics.axes import divided


def keep_top_k(x: jax.Array, k: int) -> jax.Array:
    """`x [rows, n]` with all but the `k` entries of largest magnitude of each row set to zero.

    Ties go to the lower index.
    """
    if k >= x.shape[-1]:
        return x
    if divided():
        return jnp.where(sharded_topk.top_k_mask(jnp.abs(x), k), x, 0)
    _, indices = lax.top_k(jnp.abs(x), k)
    kept = jnp.take_along_axis(x, indices, axis=-1)
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros_like(x).at[rows, indices].set(kept, unique_indices=True)


def top_k_mask(x: jax.Array, k: int, k_now: jax.Array | None = None) -> jax.Array:
    """`[rows, n]` bool: which entries of each row of `x` are among its largest; ties go to the lower index.

    Args:
        x: `[rows, n]`; bfloat16 is compared as float32.
        k: how many, static; all of them where it exceeds n.
        k_now: a traced number of at most `k`, to be used in its place.
    """
    if divided():
        return sharded_topk.top_k_mask(x, k, k_now)
    rows, n = x.shape
    if k >= n and k_now is None:
        return jnp.ones(x.shape, bool)
    indices = _largest(x, min(k, n))
    chosen = jnp.ones(indices.shape, bool) if k_now is None else jnp.arange(indices.shape[1], dtype=jnp.int32) < k_now
    chosen = jnp.broadcast_to(chosen, indices.shape)
    where = jnp.arange(rows, dtype=jnp.int32)[:, None], indices
    return jnp.zeros(x.shape, bool).at[where].set(chosen, unique_indices=True)


def spread_top_k(x: jax.Array, k: int, per_group: int = 8) -> jax.Array:
    """`[rows, k]` int32: indices of k large entries of each row of `x [rows, n]`, the largest among them.

    Entries are dealt out to groups, entry j to group j modulo their number, and only the largest of each group is a
    candidate: a group has `per_group` entries, or as many as leave 2 k groups. Most of the k largest are found, a
    second large one of a group is not. Where n < 4 k the k largest are found exactly.

    Several times as fast as an exact selection on a CPU, for uses that come back for what was missed.
    """
    rows, n = x.shape
    per_group = min(per_group, n // (2 * k))
    if per_group < 2:
        return _largest(x, k)
    groups = -(-n // per_group)
    padded = jnp.pad(x, ((0, 0), (0, groups * per_group - n)), constant_values=-jnp.inf)
    dealt = padded.reshape(rows, per_group, groups)
    best = jnp.max(dealt, axis=1)
    # The first that equals the best; argmax by itself was slower.
    order = jnp.arange(per_group, dtype=jnp.int32)[None, :, None]
    where = jnp.min(jnp.where(dealt == best[:, None], order, per_group), axis=1)
    chosen = _largest(best, k)
    return jnp.take_along_axis(where, chosen, axis=1) * groups + chosen


def batch_top_k_mask(x: jax.Array, count: int, count_now: jax.Array) -> jax.Array:
    """`[rows, n]` bool: which entries are among the `count_now` largest of the whole of `x`.

    Ties go to the lower row, then to the lower index.

    Args:
        x: `[rows, n]`; bfloat16 is compared as float32.
        count: static bound on `count_now`.
        count_now: how many, traced.
    """
    if divided():
        return sharded_topk.batch_top_k_mask(x, count, count_now)
    indices = _largest(x.reshape(1, -1), min(count, x.size))[0]
    chosen = jnp.arange(len(indices), dtype=jnp.int32) < count_now
    return jnp.zeros(x.size, bool).at[indices].set(chosen, unique_indices=True).reshape(x.shape)


def _largest(x, k):
    """Indices of the `k` largest of each row, in falling order of value."""
    x = lax.stop_gradient(x)
    return lax.top_k(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, k)[1]
