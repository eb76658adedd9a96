"""L1's objective and gradient in chunks of features: nothing of size `[rows, n]` is ever in memory.

    y = b_dec + sum over chunks C of f((x - b_dec) W_enc_C + b_enc_C) W_dec_C          first, for the error
    then for each chunk its codes once more, and of them and the error the gradients of its own parameters

Six products where dense_gradient.py has five. Blocks of rows (numerics/row_blocks.py, training/accumulation.py) bound
the same arrays without the sixth, but go through all weights and gradients once for each block: on an accelerator, with
many features and few rows to a block, that is what takes the time. Here both passes go through them once.

On a mesh a chunk is made of an equal part of each device's features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.dictionaries.dense_gradient import Layers, centred_input, gradients, layers, preactivations, row_count
from sparse_jax.dictionaries.dense_gradient import Sums as DenseSums
from sparse_jax.dictionaries.protocol import Batch, Context, Losses, Params
from sparse_jax.numerics import safe_norm, unit_rows
from sparse_jax.numerics.axes import FEATURES, parts
from sparse_jax.numerics.matmul import product, product_nt, product_tn

if TYPE_CHECKING:
    from sparse_jax.dictionaries.l1 import L1


def chunked_value_and_grad(
    dictionary: L1, params: Params, batch: Batch, ctx: Context, chunks: int
) -> tuple[jax.Array, Losses, Params]:
    """(objective, losses, gradients), as `L1.value_and_grad` gives them; `chunks` divides each device's features."""
    centred = dictionary.decoder_bias and dictionary.centring
    made = layers(params, centred, dictionary.compute_dtype)
    norms = safe_norm(params["W_dec"]) if dictionary.norm_weighted else jnp.ones_like(params["b_enc"])
    coefficient, count, dtype = ctx.coefficients["l1"], row_count(batch), made.W_dec.dtype
    column = batch.weight[:, None]
    W_enc = None if made.W_enc is None else _cut(made.W_enc, chunks, 1)
    cut = W_enc, _cut(made.W_dec, chunks, 0), _cut(made.b_enc, chunks, 0), _cut(norms, chunks, 0)

    def codes_of(chunk):
        W_enc, W_dec, b_enc, _ = chunk
        return dictionary.activated(preactivations(Layers(W_enc, W_dec, b_enc, made.centre, made.b_dec), batch.x))

    def decode(y, chunk):
        return y + product(codes_of(chunk).astype(dtype), chunk[1], batch.x.dtype), None

    y, _ = lax.scan(decode, jnp.zeros_like(batch.target), cut)
    y = y + made.b_dec
    error = y - batch.target
    g = (2 / count) * column * error
    g_low, x_low = g.astype(dtype), centred_input(made, batch.x).astype(dtype)

    def gradient(_, chunk):
        codes = codes_of(chunk)
        low = codes.astype(dtype)
        exact = low.astype(batch.x.dtype)
        h = product_nt(g_low, chunk[1], batch.x.dtype) + column * (coefficient * chunk[3] / count)
        h = jnp.where(exact > 0, h, 0) if dictionary.activation == "relu" else -jnp.expm1(-exact) * h
        fired = jnp.sum((dictionary.silenced(codes) != 0) & (column > 0), axis=0, dtype=jnp.int32)
        of_matrices = product_tn(x_low, h.astype(dtype), h.dtype), product_tn(g_low, low, h.dtype)
        return None, (of_matrices, (jnp.sum(exact * column, axis=0), fired, jnp.sum(h, axis=0)))

    _, ((x_h, g_c), vectors) = lax.scan(gradient, None, cut)
    codes, fired, h = (_joined(each, 0) for each in vectors)
    squared = jnp.sum(jnp.sum(error**2, axis=-1) * batch.weight)
    sums = DenseSums(squared, codes, fired, jnp.sum(g, axis=0), h, _joined(x_h, 1), _joined(g_c, 1))
    grads = gradients(params, sums, centred)
    if dictionary.norm_weighted:
        grads["W_dec"] += (coefficient / count * codes)[:, None] * unit_rows(params["W_dec"])
    terms = {"reconstruction": squared / count, "l1": coefficient * jnp.sum(codes * norms) / count}
    return sum(terms.values()), Losses(terms, y, fired, {}), grads


def _cut(values: jax.Array, chunks: int, axis: int) -> jax.Array:
    """Chunks in front, each with an equal part of every device's run of the axis, in order."""
    devices = parts(FEATURES)
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    split = jnp.moveaxis(values.reshape(*before, devices, chunks, -1, *after), axis + 1, 0)
    return split.reshape(chunks, *before, -1, *after)


def _joined(values: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_cut`."""
    devices, chunks = parts(FEATURES), len(values)
    before, after = values.shape[1 : axis + 1], values.shape[axis + 2 :]
    split = values.reshape(chunks, *before, devices, -1, *after)
    return jnp.moveaxis(split, 0, axis + 1).reshape(*before, -1, *after)
