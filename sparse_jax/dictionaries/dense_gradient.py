"""The gradient, written by hand, of an autoencoder with one hidden layer; what L1, TopK and BatchTopK share.

    z = (x - b_dec) W_enc + b_enc      c = f(z)      y = c W_dec + b_dec      R = sum of the rows' weights w
    loss = sum over rows of w (||y - t||^2 + sum_i p_i c_i) / R                p: the penalty of a unit of each code

    g   = 2 w (y - t) / R                                  the gradient in y
    h   = f'(z) (g W_dec^T + w p / R)                      in z
    in W_dec: c^T g      in W_enc: (x - b_dec)^T h      in b_enc: sum h      in b_dec: sum g - W_enc sum h

Why by hand, where autodiff knows all this:
- The gradient in x is not made, which is one product of six: all that b_dec needs of it is its sum over rows,
  `W_enc sum h`, a matrix times a vector.
- c^T g is made as (g^T c)^T: what is transposed in memory is then `[rows, d]` (and the answer), not `[rows, n]`.
- f' is taken from the rounded codes, so z is not kept.
- The centre is subtracted from x before x is rounded, as in the formula. Folded into the bias (b_enc - b_dec W_enc)
  it would save a pass over x, but x would be rounded with its mean still in it: with a mean of 20 standard deviations,
  bfloat16 then loses 7 % of the gradient.
- In blocks of rows nothing of size `[batch, n]` is ever in memory: see numerics/row_blocks.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import Batch, Params
from sparse_jax.numerics.matmul import product, product_nt, product_tn, transposed
from sparse_jax.numerics.row_blocks import rows_in_block, sum_over_blocks


class Layers(NamedTuple):
    """Both layers as the products take them.

    Attributes:
        W_enc: `[d_in, n]` in the compute dtype; None: the transpose of W_dec.
        W_dec: `[n, d_out]` in the compute dtype.
        b_enc: `[n]`.
        centre: `[d_in]` what is subtracted from x; None: nothing.
        b_dec: `[d_out]`, zeros where there is none.
    """

    W_enc: jax.Array | None
    W_dec: jax.Array
    b_enc: jax.Array
    centre: jax.Array | None
    b_dec: jax.Array


class Sums(NamedTuple):
    """What rows add up to.

    Attributes:
        squared: the weighted squared error.
        codes: `[n]` weighted codes.
        fired: `[n]` int32, the rows that count on which each feature was active.
        g: `[d_out]`, h: `[n]`: gradients in y and in z.
        x_h: `[d_in, n]` (of the centred x), g_c: `[d_out, n]`: the products of two transposed factors.
    """

    squared: jax.Array
    codes: jax.Array
    fired: jax.Array
    g: jax.Array
    h: jax.Array
    x_h: jax.Array
    g_c: jax.Array


def layers(params: Params, centred: bool, compute_dtype: str) -> Layers:
    """The layers of parameters in which W_enc and b_dec may be missing: tied, and without a decoder bias."""
    dtype, W_dec = jnp.dtype(compute_dtype), params["W_dec"]
    b_dec = params.get("b_dec", jnp.zeros(W_dec.shape[1], W_dec.dtype))
    W_enc = params["W_enc"].astype(dtype) if "W_enc" in params else None
    return Layers(W_enc, W_dec.astype(dtype), params["b_enc"], b_dec if centred else None, b_dec)


def centred_input(made: Layers, x: jax.Array) -> jax.Array:
    """`[rows, d_in]` what the encoder multiplies: x less the centre, in x's precision."""
    return x if made.centre is None else x - made.centre


def preactivations(made: Layers, x: jax.Array) -> jax.Array:
    """`[rows, n]` z of `x [rows, d_in]`."""
    x_low = centred_input(made, x).astype(made.W_dec.dtype)
    if made.W_enc is None:
        return product_nt(x_low, made.W_dec, x.dtype) + made.b_enc
    return product(x_low, made.W_enc, x.dtype) + made.b_enc


def row_count(batch: Batch) -> jax.Array:
    """R, the sum of the rows' weights, at least 1."""
    return jnp.maximum(jnp.sum(batch.weight), 1)


def dense_sums(
    made: Layers,
    batch: Batch,
    codes_of: Callable[[jax.Array, Any], jax.Array],
    slope: Callable[[jax.Array], jax.Array],
    active: Callable[[jax.Array], jax.Array],
    penalty: jax.Array | None = None,
    extra: Any = None,
) -> tuple[Sums, jax.Array]:
    """(sums over the batch, y `[rows, d_out]`).

    Args:
        made: the layers.
        batch: x, target and weight are read.
        codes_of: `(x [rows, d_in], extra) -> c [rows, n]`.
        slope: f' as a function of the codes rounded to the compute dtype; a bool where it is 0 or 1.
        active: bool, which codes count as active.
        penalty: `[n]`, p above; None for none.
        extra: a pytree of arrays `[batch, ...]` of which `codes_of` gets the rows.
    """
    count, dtype = row_count(batch), made.W_dec.dtype

    def part(rows):
        x, target, weight, more = rows
        column = weight[:, None]
        codes = codes_of(x, more)
        low = codes.astype(dtype)
        y = product(low, made.W_dec, x.dtype) + made.b_dec
        error = y - target
        g = (2 / count) * column * error
        g_low = g.astype(dtype)
        h = product_nt(g_low, made.W_dec, x.dtype)
        if penalty is not None:
            h = h + column * (penalty / count)
        factor = slope(low.astype(x.dtype))
        h = jnp.where(factor, h, 0) if factor.dtype == bool else factor * h
        sums = Sums(
            squared=jnp.sum(jnp.sum(error**2, axis=-1) * weight),
            codes=jnp.sum(low.astype(x.dtype) * column, axis=0),
            fired=jnp.sum(active(codes) & (column > 0), axis=0, dtype=jnp.int32),
            g=jnp.sum(g, axis=0),
            h=jnp.sum(h, axis=0),
            x_h=product_tn(centred_input(made, x).astype(dtype), h.astype(dtype), x.dtype),
            g_c=product_tn(g_low, low, x.dtype),
        )
        return sums, y

    return sum_over_blocks(part, (batch.x, batch.target, batch.weight, extra), rows_in_block(batch.x.shape[0]))


def gradients(params: Params, sums: Sums, centred: bool) -> Params:
    """Gradients of the parameters, of the sums of the whole batch; a penalty's own in W_dec is not among them."""
    grads = {"b_enc": sums.h}
    if "W_enc" in params:
        grads |= {"W_enc": sums.x_h, "W_dec": transposed(sums.g_c)}
    else:
        grads["W_dec"] = transposed(sums.x_h + sums.g_c)
    if "b_dec" in params:
        grads["b_dec"] = sums.g - decoded(params, sums.h) if centred else sums.g
    return grads


def decoded(params: Params, vector: jax.Array) -> jax.Array:
    """`[d_in]` W_enc vector, in the parameters' own precision."""
    return params["W_enc"] @ vector if "W_enc" in params else vector @ params["W_dec"]
