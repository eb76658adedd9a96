"""L1's objective and gradient without autodiff; equal to those of `L1.loss`, and about twice as fast on a CPU.

Every option of L1 is covered. Derivatives from the codes: ReLU' = [c > 0], softplus' = sigmoid(z) = 1 - exp(-c). With
`norm_weighted` the penalty of a unit of code is ||d_i||, whose own gradient is d_i / ||d_i||, 0 for a zero row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.dense_gradient import dense_sums, gradients, layers, preactivations, row_count
from sparse_jax.dictionaries.protocol import Batch, Context, Losses, Params
from sparse_jax.numerics import safe_norm, unit_rows

if TYPE_CHECKING:
    from sparse_jax.dictionaries.l1 import L1


def value_and_grad(dictionary: L1, params: Params, batch: Batch, ctx: Context) -> tuple[jax.Array, Losses, Params]:
    """(objective, losses, gradients), as `Dictionary.value_and_grad` gives them."""
    centred = dictionary.decoder_bias and dictionary.centring
    made = layers(params, centred, dictionary.compute_dtype)
    norms = safe_norm(params["W_dec"]) if dictionary.norm_weighted else jnp.ones_like(params["b_enc"])
    coefficient, count = ctx.coefficients["l1"], row_count(batch)
    sums, y_hat = dense_sums(
        made,
        batch,
        codes_of=lambda x, _: dictionary.activated(preactivations(made, x)),
        slope=(lambda codes: codes > 0) if dictionary.activation == "relu" else (lambda codes: -jnp.expm1(-codes)),
        active=lambda codes: dictionary.silenced(codes) != 0,
        penalty=coefficient * norms,
    )
    grads = gradients(params, sums, centred)
    if dictionary.norm_weighted:
        grads["W_dec"] += (coefficient / count * sums.codes)[:, None] * unit_rows(params["W_dec"])
    terms = {"reconstruction": sums.squared / count, "l1": coefficient * jnp.sum(sums.codes * norms) / count}
    return sum(terms.values()), Losses(terms, y_hat, sums.fired, {}), grads
