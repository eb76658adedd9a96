"""Causal attention: in blocks of queries where nobody looks at the pattern, whole where somebody does."""

import jax
import jax.numpy as jnp

from sparse_jax.lm.layers import accurate_dtype
from sparse_jax.lm.tap import Tap
from sparse_jax.numerics import dot_general

# Queries that are handled together: a block sees no key after its own end, so less than half of the scores of a long
# row are ever made. Below this length a row is one block.
QUERY_BLOCK = 128


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, tap: Tap) -> jax.Array:
    """Mix `v` by softmax(scale * q k^T) over earlier positions and the own one.

    Args:
        q, k, v: `[batch, position, head, head_dim]`.
        scale: what the scores are multiplied with, usually head_dim^-0.5.
        tap: sees "attn_pattern" `[batch, head, query, key]` and "attn_z" `[batch, position, head, head_dim]`.

    The softmax is taken in float32 (or float64) whatever the compute dtype.
    """
    if "attn_pattern" in tap.watched:
        weights, total = _weights(q, k, scale, 0)
        pattern = tap("attn_pattern", (weights / total).astype(q.dtype))
        mixed = _mix(pattern, v).astype(q.dtype)
    else:
        length = q.shape[1]
        starts = range(0, length, QUERY_BLOCK)
        mixed = [_attend(q, k, v, scale, start, min(start + QUERY_BLOCK, length)) for start in starts]
        mixed = mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=2)
    return tap("attn_z", mixed.transpose(0, 2, 1, 3))


def _attend(q, k, v, scale, start, end):
    """Queries `start` to `end` against all keys up to `end`; the division comes last, on head_dim numbers each."""
    weights, total = _weights(q[:, start:end], k[:, :end], scale, start)
    return (_mix(weights.astype(q.dtype), v[:, :end]) / total).astype(q.dtype)


def _weights(q, k, scale, first_query):
    """exp(score - max) `[batch, head, query, key]`, zero for later keys, and its sum over keys."""
    accurate = accurate_dtype(q.dtype)
    # Batch axes (batch, head), contraction over head_dim.
    scores = dot_general(q, k, (((3,), (3,)), ((0, 2), (0, 2))), preferred_element_type=accurate) * scale
    query = first_query + jnp.arange(q.shape[1])
    scores = jnp.where(query[:, None] >= jnp.arange(k.shape[1])[None, :], scores, jnp.finfo(accurate).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _mix(weights, v):
    """`[batch, head, query, head_dim]` in the accurate dtype."""
    return dot_general(weights, v, (((3,), (1,)), ((0, 1), (0, 2))), preferred_element_type=accurate_dtype(v.dtype))
