"""A Jacobian pair's objective and gradient without autodiff of the whole; equal to those of `JacobianPair.loss`.

Each side has the gradient of dictionaries/topk_gradient.py, whose codes are made once for all terms. What the penalty
adds is its direct gradient in W_dec of the inputs and W_enc of the outputs (through P and Q), and, where J is taken at
the reconstruction, a gradient in x_hat (through the slopes). The latter joins that of the reconstruction error,

    g = 2 w (x_hat - x) / R + d penalty / d x_hat

before it goes backwards through decoder and encoder: no product is made a second time. With a coefficient of 0 nothing
of the penalty is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.dictionaries.dense_gradient import Layers, centred_input, decoded, layers, preactivations, row_count
from sparse_jax.dictionaries.protocol import Batch, Context, Losses, Params
from sparse_jax.dictionaries.topk import TopK, current_k
from sparse_jax.dictionaries.topk_gradient import _with_aux_k
from sparse_jax.numerics.matmul import product, product_nt, product_tn, transposed
from sparse_jax.numerics.sparse_codes import (
    SparseCodes,
    decode,
    dense,
    feature_sums,
    row_gradient,
    top_k_codes,
    value_gradient,
)

if TYPE_CHECKING:
    from sparse_jax.connectors.jacobian_sae import JacobianPair


def join(sides: dict[str, Params]) -> Params:
    """Parameters or gradients of "in" and of "out" as one dict: `in_W_dec` and so on."""
    return {f"{side}_{name}": value for side, own in sides.items() for name, value in own.items()}


def joined_losses(inputs: Losses, outputs: Losses, penalty: jax.Array) -> Losses:
    """The losses of a pair, of those of its sides."""
    terms = {
        f"{name}_{side}": value for side, of in (("in", inputs), ("out", outputs)) for name, value in of.terms.items()
    }
    y_hat = jnp.concatenate([inputs.y_hat, outputs.y_hat], axis=-1)
    return Losses({**terms, "jacobian": penalty}, y_hat, jnp.concatenate([inputs.fired, outputs.fired]), {})


def pair_value_and_grad(
    pair: JacobianPair, params: Params, batch: Batch, ctx: Context
) -> tuple[jax.Array, Losses, Params]:
    """(objective, losses, gradients) of a pair, as `Dictionary.value_and_grad` gives them."""
    sides, values = pair.sides(params), pair.split(batch.x)
    made = [layers(own, True, side.compute_dtype) for side, own in sides]
    codes = [
        top_k_codes(jax.nn.relu(preactivations(of, x)), side.k_bound, current_k(ctx))
        for (side, _), of, x in zip(sides, made, values)
    ]
    x_hats = [reconstructed(side, of, each) for (side, _), of, each in zip(sides, made, codes)]
    penalty, by_W_dec, by_W_enc, by_x_hat = penalty_gradients(pair, params, batch, ctx, codes, x_hats[0])
    found, grads = [], {}
    for name, (side, own), of, x, each, x_hat, more, here in zip(
        ("in", "out"), sides, made, values, codes, x_hats, (by_x_hat, None), pair.contexts(ctx)
    ):
        _, losses, grads[name] = side_gradients(side, own, of, Batch(x, x, batch.weight), here, each, x_hat, more)
        found.append(losses)
    grads["in"]["W_dec"] = grads["in"]["W_dec"] + by_W_dec
    grads["out"]["W_enc"] = grads["out"]["W_enc"] + by_W_enc
    losses = joined_losses(*found, penalty)
    return sum(losses.terms.values()), losses, join(grads)


def penalty_gradients(
    pair: JacobianPair, params: Params, batch: Batch, ctx: Context, codes: list[SparseCodes], x_hat: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The penalty, and its gradients in the inputs' W_dec, the outputs' W_enc and the inputs' reconstruction."""
    (_, own_in), (_, own_out) = pair.sides(params)
    at_input = pair.at == "input"
    coefficient = ctx.coefficients["jacobian"].astype(x_hat.dtype)
    codes = lax.stop_gradient(codes)
    arguments = (own_in["W_dec"], own_out["W_enc"], pair.split(batch.x)[0] if at_input else x_hat)

    def term(W_dec, W_enc, place):
        return coefficient * pair.mean_l1(params, W_dec, W_enc, place, codes, batch.weight)

    def computed(arguments):
        if at_input:
            value, grads = jax.value_and_grad(term, argnums=(0, 1))(*arguments)
            return value, *grads, jnp.zeros_like(arguments[2])
        value, grads = jax.value_and_grad(term, argnums=(0, 1, 2))(*arguments)
        return value, *grads

    def none(arguments):
        return jnp.zeros((), x_hat.dtype), *(jnp.zeros_like(each) for each in arguments)

    return lax.cond(coefficient > 0, computed, none, arguments)


def reconstructed(side: TopK, made: Layers, codes: SparseCodes) -> jax.Array:
    """`[rows, d]` the reconstruction of codes, in whichever form is faster here."""
    if side.sparse_gradient:
        return decode(codes, made.W_dec.astype(codes.values.dtype)) + made.b_dec
    low = dense(codes, side.n_features).astype(made.W_dec.dtype)
    return product(low, made.W_dec, codes.values.dtype) + made.b_dec


def side_gradients(
    side: TopK,
    params: Params,
    made: Layers,
    batch: Batch,
    ctx: Context,
    codes: SparseCodes,
    y_hat: jax.Array,
    more: jax.Array | None,
) -> tuple[jax.Array, Losses, Params]:
    """One side's own terms and their gradients, with `more [rows, d]` added to the gradient in its reconstruction."""
    count, column = row_count(batch), batch.weight[:, None]
    error = y_hat - batch.target
    g = (2 / count) * column * error
    g = g if more is None else g + more
    counted = ((codes.values > 0) & (column > 0)).astype(jnp.int32)
    fired = feature_sums(SparseCodes(counted, codes.indices), side.n_features)
    backward = _sparse if side.sparse_gradient else _dense
    grads, h = backward(side, params, made, batch.x, codes, g)
    grads |= {"b_enc": h, "b_dec": jnp.sum(g, axis=0) - decoded(params, h)}
    squared = jnp.sum(jnp.sum(error**2, axis=-1) * batch.weight) / count
    return _with_aux_k(side, params, made, batch, ctx, squared, Losses({}, y_hat, fired, {}), grads)


def _dense(side, params, made, x, codes, g):
    """Gradients of W_enc and W_dec, and the sum over rows of that in the pre-activations, by matrix products."""
    dtype = made.W_dec.dtype
    low, g_low = dense(codes, side.n_features).astype(dtype), g.astype(dtype)
    h = jnp.where(low > 0, product_nt(g_low, made.W_dec, x.dtype), 0)
    x_h = product_tn(centred_input(made, x).astype(dtype), h.astype(dtype), x.dtype)
    return {"W_enc": x_h, "W_dec": transposed(product_tn(g_low, low, x.dtype))}, jnp.sum(h, axis=0)


def _sparse(side, params, made, x, codes, g):
    """The same by gathers and scatters."""
    n = side.n_features
    h = SparseCodes(jnp.where(codes.values > 0, value_gradient(codes, params["W_dec"], g), 0), codes.indices)
    x_h = row_gradient(h, centred_input(made, x), n).T
    return {"W_enc": x_h, "W_dec": row_gradient(codes, g, n)}, feature_sums(h, n)
