"""Causal attention: in blocks of queries where nobody looks at the pattern, whole where somebody does."""

import jax
import jax.numpy as jnp

from sparse_jax.lm.layers import accurate_dtype
from sparse_jax.lm.tap import Tap
from sparse_jax.numerics import dot_general

# Queries that are handled together: a block sees no key after its own end, so less than half of the scores of a long
# row are ever made. Below this length a row is one block.
QUERY_BLOCK = 128


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | jax.Array, tap: Tap, window: int | jax.Array | None = None
) -> jax.Array:
    """Mix `v` by softmax(scale * q k^T) over earlier positions and the own one.

    Args:
        q: `[batch, position, head, head_dim]`.
        k, v: `[batch, position, kv_head, head_dim]`; consecutive query heads share a key-value head (grouped-query
            attention, Ainslie et al. 2023) where there are fewer of these.
        scale: what the scores are multiplied with, usually head_dim^-0.5.
        tap: sees "attn_pattern" `[batch, head, query, key]` and "attn_z" `[batch, position, head, head_dim]`.
        window: a query sees this many positions, its own included; None: all.

    The softmax is taken in float32 (or float64) whatever the compute dtype.
    """
    q, length = _grouped(q, k), q.shape[1]
    if "attn_pattern" in tap.watched:
        return _whole(q, k, v, scale, tap, window, jnp.arange(length, dtype=jnp.int32))
    parts = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        # A window of known width drops the keys that no query of the block can see.
        low = max(0, start - window + 1) if isinstance(window, int) else 0
        weights, total = _weights(
            q[:, start:end],
            k[:, low:end],
            scale,
            window,
            jnp.arange(start, end, dtype=jnp.int32),
            jnp.arange(low, end, dtype=jnp.int32),
        )
        # The division comes last, on head_dim numbers each.
        parts.append((_mix(weights.astype(q.dtype), v[:, low:end]) / total).astype(q.dtype))
    return tap("attn_z", _ungrouped(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)))


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float | jax.Array,
    tap: Tap,
    window: int | jax.Array | None,
    positions: jax.Array,
) -> jax.Array:
    """The same for queries at `positions [batch, query]` over remembered keys and values `[batch, slot, kv_head,
    head_dim]`, where slot i holds position i; slots past a query's position may hold anything finite.
    """
    return _whole(_grouped(q, k), k, v, scale, tap, window, positions)


def _whole(q, k, v, scale, tap, window, positions):
    """Every query at once, the pattern made and shown to the tap. `q` is grouped."""
    weights, total = _weights(q, k, scale, window, positions, jnp.arange(k.shape[1], dtype=jnp.int32))
    pattern = (weights / total).astype(q.dtype)
    batch, kv_heads, queries, group, keys = pattern.shape
    pattern = pattern.transpose(0, 1, 3, 2, 4).reshape(batch, kv_heads * group, queries, keys)
    pattern = tap("attn_pattern", pattern)
    pattern = pattern.reshape(batch, kv_heads, group, queries, keys).transpose(0, 1, 3, 2, 4)
    return tap("attn_z", _ungrouped(_mix(pattern, v).astype(q.dtype)))


def _grouped(q, k):
    """Queries `[batch, position, kv_head, group, head_dim]`: query head h belongs to key-value head h // group."""
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])


def _ungrouped(mixed):
    """`[batch, position, head, head_dim]` from `[batch, kv_head, position, group, head_dim]`."""
    mixed = mixed.transpose(0, 2, 1, 3, 4)
    return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


def _weights(q, k, scale, window, queries, keys):
    """exp(score - max) `[batch, kv_head, query, group, key]`, zero for keys out of sight, and its sum over keys.

    queries: `[query]` or `[batch, query]` positions; keys: `[key]` positions.
    """
    accurate = accurate_dtype(q.dtype)
    # Batch axes (batch, kv_head), contraction over head_dim.
    scores = dot_general(q, k, (((4,), (3,)), ((0, 2), (0, 2))), preferred_element_type=accurate) * scale
    seen = queries[..., None] >= keys
    if window is not None:
        seen &= queries[..., None] - keys < window
    seen = seen.reshape(-1, 1, queries.shape[-1], 1, keys.shape[0])
    scores = jnp.where(seen, scores, jnp.finfo(accurate).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _mix(weights, v):
    """`[batch, kv_head, query, group, head_dim]` in the accurate dtype."""
    return dot_general(weights, v, (((4,), (1,)), ((0, 1), (0, 2))), preferred_element_type=accurate_dtype(v.dtype))
