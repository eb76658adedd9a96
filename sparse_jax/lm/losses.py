"""Losses of next-token predictions, per token, in nats."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target), `[batch, position]` in nats, for `logits [batch, position, vocab]`.

    Where a target is negative (there is none) the loss is 0.
    """
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)


def kl_divergence(clean: jax.Array, other: jax.Array) -> jax.Array:
    """KL(clean || other), `[batch, position]` in nats, of two arrays of logits `[batch, position, vocab]`."""
    clean_log, other_log = jax.nn.log_softmax(clean, axis=-1), jax.nn.log_softmax(other, axis=-1)
    return jnp.sum(jnp.exp(clean_log) * (clean_log - other_log), axis=-1)
