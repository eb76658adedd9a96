"""TopK's and BatchTopK's objective and gradient without autodiff; equal to those of `loss`, and faster on a CPU.

Given which codes are active, the gradient is that of dense_gradient.py with f' = [c > 0]. Two forms of it:

    dense     codes as rows of n features; every product is a matrix product
    sparse    codes as k values and indices: decoding gathers rows of W_dec, gradients scatter rows. The encoder is
              the only matrix product left. For h only the k entries where f' = 1 are made.

`TopK.sparse_gradient` chooses. BatchTopK selects over the whole batch, so it has no bound on the active
features of a row, and is always dense.

AuxK is rarely active and keeps its autodiff, down to the pre-activations and W_dec; those are computed once more where
it is, so that nothing need be kept where it is not. Its error and b_dec are detached: no other gradient exists.

In every form x is centred before it is rounded or multiplied: see dense_gradient.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.dictionaries.aux_k import dead_features
from sparse_jax.dictionaries.dense_gradient import (
    centred_input,
    decoded,
    dense_sums,
    gradients,
    layers,
    preactivations,
    row_count,
)
from sparse_jax.dictionaries.protocol import Batch, Context, Losses, Params
from sparse_jax.numerics.axes import divided
from sparse_jax.numerics.matmul import product_tn
from sparse_jax.numerics.row_blocks import rows_in_block, sum_over_blocks
from sparse_jax.numerics.sparse_codes import (
    SparseCodes,
    decode,
    dense,
    feature_sums,
    row_gradient,
    top_k_codes,
    value_gradient,
)
from sparse_jax.numerics.topk import top_k_mask

if TYPE_CHECKING:
    from sparse_jax.dictionaries.batch_topk import BatchTopK
    from sparse_jax.dictionaries.topk import TopK


def top_k_value_and_grad(
    dictionary: TopK, params: Params, batch: Batch, ctx: Context, k_now: jax.Array, sparse: bool | None = None
) -> tuple[jax.Array, Losses, Params]:
    """(objective, losses, gradients) of TopK, as `Dictionary.value_and_grad` gives them.

    Args:
        dictionary: the static choices.
        params, batch, ctx: as `loss` takes them.
        k_now: the k in use, int32.
        sparse: which form; None: `dictionary.sparse_gradient`.
    """
    made, k = layers(params, True, dictionary.compute_dtype), dictionary.k_bound
    if sparse is None:
        sparse = dictionary.sparse_gradient

    def largest(x):
        return top_k_codes(jax.nn.relu(preactivations(made, x)), k, k_now)

    def dense_codes(x, _):
        if not divided():
            return dense(largest(x), dictionary.n_features)
        values = jax.nn.relu(preactivations(made, x))  # each device keeps its own features: nothing is scattered
        return jnp.where(top_k_mask(values, k, k_now), values, 0)

    if sparse:
        squared, fired, y_hat, grads = _sparse_gradients(params, made, batch, largest)
    else:
        squared, fired, y_hat, grads = _dense_gradients(params, made, batch, dense_codes)
    return _with_aux_k(dictionary, params, made, batch, ctx, squared, Losses({}, y_hat, fired, {}), grads)


def batch_top_k_value_and_grad(
    dictionary: BatchTopK, params: Params, batch: Batch, ctx: Context
) -> tuple[jax.Array, Losses, Params]:
    """(objective, losses, gradients) of BatchTopK, as `Dictionary.value_and_grad` gives them."""
    made = layers(params, True, dictionary.compute_dtype)
    codes = dictionary.batch_codes(preactivations(made, batch.x), batch.weight, ctx)
    squared, fired, y_hat, grads = _dense_gradients(params, made, batch, lambda _, codes: codes, codes)
    frozen = {"threshold": dictionary.moved_threshold(params["threshold"], codes, ctx)}
    return _with_aux_k(dictionary, params, made, batch, ctx, squared, Losses({}, y_hat, fired, frozen), grads)


def _dense_gradients(params, made, batch, codes_of, extra=None):
    """(mean squared error, fired, y, gradients) by matrix products."""
    sums, y_hat = dense_sums(
        made, batch, codes_of, slope=lambda codes: codes > 0, active=lambda codes: codes != 0, extra=extra
    )
    return sums.squared / row_count(batch), sums.fired, y_hat, gradients(params, sums, True)


def _sparse_gradients(params, made, batch, largest):
    """(mean squared error, fired, y, gradients) by gathers and scatters."""
    x, target, weight, _ = batch
    count, n_features = row_count(batch), params["W_dec"].shape[0]
    _, codes = sum_over_blocks(lambda x: ((), largest(x)), x, rows_in_block(len(x)))
    y_hat = decode(codes, params["W_dec"]) + params["b_dec"]
    error = y_hat - target
    g = (2 / count) * weight[:, None] * error
    h = jnp.where(codes.values > 0, value_gradient(codes, params["W_dec"], g), 0)
    counted = (codes.values > 0) & (weight > 0)[:, None]
    h_sums = feature_sums(SparseCodes(h, codes.indices), n_features)
    grads = {
        "W_enc": row_gradient(SparseCodes(h, codes.indices), centred_input(made, x), n_features).T,
        "b_enc": h_sums,
        "W_dec": row_gradient(codes, g, n_features),
        "b_dec": jnp.sum(g, axis=0) - decoded(params, h_sums),
    }
    fired = feature_sums(SparseCodes(counted.astype(jnp.int32), codes.indices), n_features)
    return jnp.sum(jnp.sum(error**2, axis=-1) * weight) / count, fired, y_hat, grads


def _with_aux_k(dictionary, params, made, batch, ctx, squared, losses, grads):
    """What `value_and_grad` answers: AuxK added to the gradients, and to the terms."""
    error = batch.target - losses.y_hat
    x_low = centred_input(made, batch.x).astype(made.W_dec.dtype)

    def some_dead(grads):
        def term(values, W_dec):
            # b_dec is not among what is differentiated: that it must get no gradient needs no care here.
            return dictionary.aux_k_term({**params, "W_dec": W_dec}, values, error, batch, ctx)

        values = preactivations(made, batch.x)
        value, (h, by_W_dec) = jax.value_and_grad(term, argnums=(0, 1))(values, params["W_dec"])
        x_h = product_tn(x_low, h.astype(x_low.dtype), h.dtype)
        more = {"W_enc": x_h, "b_enc": jnp.sum(h, axis=0), "W_dec": by_W_dec}
        return value, {**grads, **{name: grads[name] + more[name] for name in more}}

    def none_dead(grads):
        return jnp.zeros((), error.dtype), grads

    aux, grads = lax.cond(jnp.any(dead_features(ctx)), some_dead, none_dead, grads)
    terms = {"reconstruction": squared, "aux_k": aux}
    return sum(terms.values()), losses._replace(terms=terms), grads
