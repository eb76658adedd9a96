"""Codes with few active features: their values and where they stand, and what a matrix of directions makes of them.

    y = sum over slots j of v_j W[i_j]              a value of 0 is an empty slot, wherever its index points

Every function is a loop over slots of gathered (or scattered) rows of W. On a CPU that was 4 times as fast as one
gather of all rows and a product, and faster than the dense product when few of many features are active; on
accelerators gathers are slow: see `sparse_is_faster`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.numerics import sharded_topk
from sparse_jax.numerics.axes import divided

# Features per slot from which the sparse forms win on a CPU: between 64, where dense products took two thirds of the
# time, and 512, where they took twice as long (the gradient of TopK with k 32, d 512, 4,096 rows).
_FEATURES_PER_SLOT = 256


class SparseCodes(NamedTuple):
    """Active features of each row.

    Attributes:
        values: `[rows, slots]`; 0 marks an empty slot.
        indices: `[rows, slots]` int32, which features; any valid number in an empty slot. A feature stands in at most
            one slot of a row that is not empty.
    """

    values: jax.Array
    indices: jax.Array


def sparse_is_faster(n_features: int, slots: int) -> bool:
    """Whether `decode` and its gradients beat dense products here: a static choice, by backend and sizes.

    Not where a mesh divides rows or features: a loop of scatters would be a loop of sums over devices.
    """
    if divided():
        return False
    return jax.default_backend() == "cpu" and n_features >= _FEATURES_PER_SLOT * slots


def top_k_codes(values: jax.Array, k: int, k_now: jax.Array | None = None) -> SparseCodes:
    """The `k` largest of each row of `values [rows, n]` (>= 0); ties go to the lower index.

    Args:
        values: `[rows, n]`, none negative: what is not active is 0.
        k: how many slots, static, at most n.
        k_now: a traced number of at most `k`: the slots from there on stay empty.
    """
    largest, indices = (sharded_topk if divided() else lax).top_k(values, k)
    if k_now is not None:
        largest = jnp.where(jnp.arange(k, dtype=jnp.int32) < k_now, largest, 0)
    return SparseCodes(largest, indices)


def dense(codes: SparseCodes, n_features: int) -> jax.Array:
    """`[rows, n_features]`: the codes with their zeros."""
    rows = jnp.arange(codes.values.shape[0], dtype=jnp.int32)[:, None]
    zeros = jnp.zeros((codes.values.shape[0], n_features), codes.values.dtype)
    # Adding, since an empty slot may point at a feature that another slot holds.
    return zeros.at[rows, codes.indices].add(codes.values)


@jax.custom_vjp
def decode(codes: SparseCodes, W: jax.Array) -> jax.Array:
    """`[rows, d]`: the sum of `values x W[indices]` of each row, for `W [n_features, d]`."""

    def add(slot, y):
        values, indices = _slot(codes, slot)
        return y + values[:, None] * W[indices]

    zeros = jnp.zeros((codes.values.shape[0], W.shape[1]), W.dtype)
    return lax.fori_loop(0, codes.values.shape[1], add, zeros)


def value_gradient(codes: SparseCodes, W: jax.Array, g: jax.Array) -> jax.Array:
    """`[rows, slots]`: the gradient of `decode` in the values, for the gradient `g [rows, d]` in its answer."""

    def put(slot, grads):
        _, indices = _slot(codes, slot)
        return grads.at[slot].set(jnp.sum(g * W[indices], axis=-1))

    rows, slots = codes.values.shape
    return lax.fori_loop(0, slots, put, jnp.zeros((slots, rows), g.dtype)).T


def row_gradient(codes: SparseCodes, g: jax.Array, n_features: int) -> jax.Array:
    """`[n_features, d]`: the sum over rows of `values x g`, added at their indices; `g [rows, d]`.

    The gradient of `decode` in W, for the gradient `g` in its answer.
    """

    def add(slot, W):
        values, indices = _slot(codes, slot)
        return W.at[indices].add(values[:, None] * g)

    return lax.fori_loop(0, codes.values.shape[1], add, jnp.zeros((n_features, g.shape[1]), g.dtype))


def feature_sums(codes: SparseCodes, n_features: int) -> jax.Array:
    """`[n_features]`: the sum of each feature's values over all rows."""
    return jnp.zeros(n_features, codes.values.dtype).at[codes.indices.reshape(-1)].add(codes.values.reshape(-1))


def _slot(codes, slot):
    """Values and indices `[rows]` of one slot."""
    take = lambda a: lax.dynamic_index_in_dim(a, slot, axis=1, keepdims=False)  # noqa: E731
    return take(codes.values), take(codes.indices)


def _decode_forward(codes, W):
    return decode(codes, W), (codes, W)


def _decode_backward(saved, g):
    codes, W = saved
    no_gradient = np.zeros(codes.indices.shape, jax.dtypes.float0)
    return SparseCodes(value_gradient(codes, W, g), no_gradient), row_gradient(codes, g, W.shape[0])


decode.defvjp(_decode_forward, _decode_backward)
