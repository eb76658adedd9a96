"""AuxK: dead features learn to reconstruct what the others leave. Source: Gao et al. 2024, appendix A.2 and B.1.

    e     = stopgrad(y - y_hat)
    e_hat = sum over the k_aux largest dead features of pre-activation x row of W_dec        no b_dec
    loss  = aux_coefficient * d_out * mean ||e - e_hat||^2 / mean ||e - mean e||^2           means over rows

Dead: silent for more rows than the dead window. k_aux is d / 2 by default (the paper: about d / 2, appendix B.1).

The scale. The paper writes aux_coefficient * ||e - e_hat||^2; its authors' code divides the main error by the variance
of x and the auxiliary one by the variance of e, so that revival does not fade as the reconstruction improves. Here
the main error is not divided, and normalised activations have a variance of d_out: hence the factor. Others differ:
dictionary_learning divides the auxiliary error alone (its coefficient is d_out times aux_coefficient); SAELens divides
neither, sparsify both by the variance of x, and both of these multiply by min(1, dead / k_aux). Adam does not see the
scale of a gradient that a dead feature has from nowhere else.

The ReLU is left out: behind it a feature that is negative on every row has no gradient and stays dead for good, which
is how the paper's authors' own code (train.py of openai/sparse_autoencoder), dictionary_learning and sparsify lose
features whose bias has fallen. SAELens leaves it out too.

Only dead features move: the target is detached, and callers detach b_dec where it centres the input of the
pre-activations. Nothing is divided by zero, so what the authors' code does, replacing NaN by 0, is
not needed.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.dictionaries.protocol import Context, weighted_mean
from sparse_jax.numerics import matmul
from sparse_jax.numerics.topk import top_k_mask


def dead_features(ctx: Context) -> jax.Array:
    """`[n_features]` bool: silent for more rows than the dead window."""
    return ctx.age > ctx.dead_window


def aux_k_loss(
    values: jax.Array,
    error: jax.Array,
    W_dec: jax.Array,
    weight: jax.Array,
    ctx: Context,
    k_aux: int,
    compute_dtype: str = "float32",
) -> jax.Array:
    """The auxiliary loss, a scalar; 0 when no feature is dead, without computing it.

    Args:
        values: `[rows, n_features]` pre-activations, before any ReLU.
        error: `[rows, d_out]` what the reconstruction leaves; detached here.
        W_dec: `[n_features, d_out]`.
        weight: `[rows]` 1 for rows that count, 0 for masked ones.
        ctx: `coefficients["aux_k"]`, ages and dead window are read.
        k_aux: how many dead features a row may use.
        compute_dtype: of the product with W_dec.
    """
    dead = dead_features(ctx)

    def all_of_them(values):
        return jnp.where(dead, values, 0)

    def largest(values):
        return jnp.where(dead & top_k_mask(jnp.where(dead, values, -jnp.inf), k_aux), values, 0)

    def some_dead(values, W_dec):
        if k_aux < dead.shape[0]:
            # Selecting k_aux of a row costs more than the rest together; most of the time few features are dead.
            codes = lax.cond(jnp.sum(dead, dtype=jnp.int32) > k_aux, largest, all_of_them, values)
        else:
            codes = all_of_them(values)
        return residual_loss(matmul(codes, W_dec, compute_dtype), error, weight, ctx)

    def none_dead(values, W_dec):
        return jnp.zeros((), error.dtype)

    return lax.cond(jnp.any(dead), some_dead, none_dead, values, W_dec)


def residual_loss(e_hat: jax.Array, error: jax.Array, weight: jax.Array, ctx: Context) -> jax.Array:
    """`aux_coefficient * d_out * mean ||e - e_hat||^2 / mean ||e - mean e||^2` over the rows that count.

    0 where the error does not vary.
    """
    error = lax.stop_gradient(error)
    mean = jnp.sum(error * weight[:, None], axis=0) / jnp.maximum(jnp.sum(weight), 1)
    variance = weighted_mean(jnp.sum((error - mean) ** 2, axis=-1), weight)
    squared = weighted_mean(jnp.sum((error - e_hat) ** 2, axis=-1), weight)
    share = jnp.where(variance > 0, squared / jnp.where(variance > 0, variance, 1), 0)
    return ctx.coefficients["aux_k"].astype(share.dtype) * error.shape[-1] * share
