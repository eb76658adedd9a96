"""The two ends of a model that its families share: tokens to the residual stream, the residual stream to logits."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sparse_jax.lm.layers import accurate_dtype
from sparse_jax.numerics import dot_general


def embed_tokens(params: dict, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Token embeddings `[batch, position, d_model]`."""
    return params["embed"]["tokens"][tokens].astype(dtype)


def unembed(params: dict, normed: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Logits `[batch, position, vocab]` in float32 (or float64) of a residual stream after the final norm.

    A model with tied embeddings has no unembedding of its own in `params["head"]`: the embedding is used again.
    """
    table = params["head"].get("unembed", params["embed"]["tokens"]).astype(dtype)
    axes = (((2,), (1,)), ((), ()))
    return dot_general(normed.astype(dtype), table, axes, preferred_element_type=accurate_dtype(jnp.dtype(dtype)))
