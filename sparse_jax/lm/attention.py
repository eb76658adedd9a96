"""Causal attention with its pattern exposed to the tap."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_jax.lm.layers import accurate_dtype
from sparse_jax.numerics import dot_general

Tap = Callable[[str, jax.Array], jax.Array]


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, tap: Tap) -> jax.Array:
    """Mix `v` by softmax(scale * q k^T) over earlier positions and the own one.

    Args:
        q, k, v: `[batch, position, head, head_dim]`.
        scale: what the scores are multiplied with, usually head_dim^-0.5.
        tap: sees "attn_pattern" `[batch, head, query, key]` and "attn_z" `[batch, position, head, head_dim]`.

    The softmax is taken in float32 (or float64) whatever the compute dtype.
    """
    length = q.shape[1]
    accurate = accurate_dtype(q.dtype)
    # Batch axes (batch, head), contraction over head_dim: [batch, head, query, key].
    scores = dot_general(q, k, (((3,), (3,)), ((0, 2), (0, 2))), preferred_element_type=accurate) * scale
    causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    scores = jnp.where(causal, scores, jnp.finfo(accurate).min)
    pattern = tap("attn_pattern", jax.nn.softmax(scores, axis=-1).astype(q.dtype))
    mixed = dot_general(pattern, v, (((3,), (1,)), ((0, 1), (0, 2))))  # [batch, head, query, head_dim]
    return tap("attn_z", mixed.transpose(0, 2, 1, 3))
