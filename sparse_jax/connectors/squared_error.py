"""The squared error of predicted target codes, and a form of it that never makes the predictions.

    error = mean over rows of sum_j (y_hat_j - y_j)^2 / s_j^2,      y_hat = h W + b

With few of the n targets active, and h far narrower than n, neither y_hat nor y is needed with its zeros. With
V = W / s, c = b / s, t = y / s and sums over the N rows that count:

    N error = <h^T h, V V^T> + 2 <sum h, V c> + N c.c - 2 <h^T t, V> - 2 <sum t, c> + sum t^2
    gradients / (2 / N):   in h   h (V V^T) + V c - t V^T
                           in V   (h^T h) V + (sum h) c^T - h^T t
                           in c   (sum h) V + N c - sum t

Two products of [rows, width, width] and two of [width, width, n] take the place of three of [rows, width, n], and t V^T
and h^T t are gathers. All is float32: the sum of squares is what remains of a difference, to some 1e-6 of sum t^2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.connectors.sparse_product import Codes, TwoWayCodes, as_dense, gathered_sum, transposed_times
from sparse_jax.dictionaries.protocol import weighted_mean


def squared_error(y_hat: jax.Array, y: Codes, scale: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over targets of ((y_hat - y) / scale)^2, mean over the rows that count.

    Args:
        y_hat: `[rows, n]`.
        y: `[rows, n]` in any form.
        scale: `[n]`.
        weight: `[rows]`.
    """
    error = (y_hat - as_dense(y, y_hat.shape[1])) / scale
    return weighted_mean(jnp.sum(error**2, axis=-1), weight)


def readout_error(
    h: jax.Array, W: jax.Array, b: jax.Array | None, y: Codes, scale: jax.Array, weight: jax.Array
) -> jax.Array:
    """`squared_error` of `h W + b`, for `h [rows, width]`, `W [width, n]`, `b [n]` or None (no bias).

    Differentiable in h, W and b. Of `TwoWayCodes` of few targets in the form that never makes the predictions.
    """
    if isinstance(y, TwoWayCodes) and moments_are_faster(len(h), *W.shape):
        return _by_moments(h, W, jnp.zeros(W.shape[1], W.dtype) if b is None else b, y, scale, weight)
    y_hat = h @ W
    return squared_error(y_hat if b is None else y_hat + b, y, scale, weight)


def moments_are_faster(rows: int, width: int, n: int) -> bool:
    """Whether the form without predictions takes fewer products: see the top of this file."""
    return 2 * width * (rows + n) < 3 * rows * n


@jax.custom_vjp
def _by_moments(h, W, b, y, scale, weight):
    return _value_and_gradients(h, W, b, y, scale, weight)[0]


def _value_and_gradients(h, W, b, y, scale, weight):
    """The error, and its gradients in h, W and b."""
    n = jnp.maximum(jnp.sum(weight), 1)
    V, c = W / scale, b / scale
    # Hold transposes, of which rows are gathered: targets are the columns of W.
    V_t = V.T
    inverse = 1 / scale
    values = y.codes.values * inverse[y.codes.indices]
    of_chunks = inverse.at[y.chunks.feature].get(mode="fill", fill_value=0)
    chunks = y.chunks._replace(values=y.chunks.values * of_chunks[:, None])
    h_counted = h * weight[:, None]
    h_h, h_sum = h_counted.T @ h, jnp.sum(h_counted, axis=0)
    t_h = transposed_times(y._replace(chunks=chunks), h_counted, len(b))  # [n, width]
    counted = values * weight[:, None]
    t_sum = jnp.zeros(len(b), b.dtype).at[y.codes.indices.reshape(-1)].add(counted.reshape(-1))
    h_h_V, V_c, h_V = h_h @ V, V @ c, h_sum @ V
    squares = jnp.sum(h_h_V * V) + 2 * jnp.sum(h_V * c) + n * jnp.sum(c * c) + jnp.sum(counted * values)
    value = (squares - 2 * jnp.sum(t_h * V_t) - 2 * jnp.sum(t_sum * c)) / n
    factor = 2 / n
    by_h = factor * weight[:, None] * (h @ (V @ V_t) + V_c - gathered_sum(values, y.codes.indices, V_t))
    by_W = factor * (h_h_V + h_sum[:, None] * c - t_h.T) * inverse
    by_b = factor * (h_V + n * c - t_sum) * inverse
    return value, (by_h, by_W, by_b)


def _forward(h, W, b, y, scale, weight):
    value, gradients = _value_and_gradients(h, W, b, y, scale, weight)
    return value, (gradients, y, scale, weight)


def _backward(saved, g):
    (by_h, by_W, by_b), y, scale, weight = saved
    none = jax.tree.map(
        lambda a: jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0),
        (y, scale, weight),
    )
    return g * by_h, g * by_W, g * by_b, *none


_by_moments.defvjp(_forward, _backward)
