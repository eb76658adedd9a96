"""Products of codes with matrices, where few of many codes are active: the first layer of a connector.

    x W         a sum of gathered rows of W, a few slots at a time
    x^T g       the same sum of gathered rows of g, with the active entries listed feature by feature (`TwoWayCodes`)

The second is the gradient in W. XLA scatters one row after another, so entries are sorted by feature on the host, cut
into chunks of 16 of one feature, the rows of g of each chunk are summed by gathers, and only the sums are scattered.
CPU time for 32 active of 2,048 features and 512 columns, per token of a batch of 1,024 (an AVX2 machine): x W 2 us
(as a dense product 32, as `sparse_codes.decode` 4); x^T g 4 us (dense 36, `sparse_codes.row_gradient` 10), and 1 us to
sort and cut. On accelerators gathers are slow: products are dense there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.numerics.axes import divided
from sparse_jax.numerics.sparse_codes import SparseCodes, value_gradient
from sparse_jax.numerics.sparse_codes import dense as dense_codes

# Entries of one feature that are summed before anything is scattered.
CHUNK = 16
# Slots gathered in one pass over the answer: 4 took a third longer, 16 a tenth.
_AT_ONCE = 8
# Features per slot from which gathers win on a CPU: with 64 per slot they took an eighth to a fifteenth of the time.
_FEATURES_PER_SLOT = 8


class Chunks(NamedTuple):
    """Active entries of a batch, listed feature by feature in chunks of one feature.

    Attributes:
        values: `[chunks, CHUNK]`; 0 is an empty place.
        rows: `[chunks, CHUNK]` int32, in which row of the batch each entry stands; any valid one in an empty place.
        feature: `[chunks]` int32, ascending; of a chunk that is not used the number of features.
    """

    values: jax.Array
    rows: jax.Array
    feature: jax.Array


class TwoWayCodes(NamedTuple):
    """Codes of a batch by row and by feature.

    Attributes:
        codes: by row.
        chunks: the same entries by feature.
    """

    codes: SparseCodes
    chunks: Chunks


# Codes of a batch, `[rows, n]` with their zeros or in a form that lists the active ones.
Codes = jax.Array | SparseCodes | TwoWayCodes


def two_way(codes: SparseCodes, n_features: int) -> TwoWayCodes:
    """Codes, on the host (NumPy), with their entries sorted by feature too; the shapes depend on those of the codes."""
    rows, slots = codes.indices.shape
    small = np.uint16 if n_features <= 2**16 else np.int64  # NumPy sorts 16 bits by radix
    order = np.argsort(codes.indices.reshape(-1).astype(small), kind="stable")
    features = codes.indices.reshape(-1)[order]
    entries = np.bincount(features, minlength=n_features)
    used = -(-entries // CHUNK)
    chunks = rows * slots // CHUNK + n_features
    # Where each entry goes: its feature's first chunk, and its rank among the entries of that feature.
    shift = (np.cumsum(used) - used) * CHUNK - (np.cumsum(entries) - entries)
    place = shift[features] + np.arange(len(order))
    values, row = np.zeros(chunks * CHUNK, codes.values.dtype), np.zeros(chunks * CHUNK, np.int32)
    values[place], row[place] = codes.values.reshape(-1)[order], order // slots
    feature = np.full(chunks, n_features, np.int32)
    feature[: used.sum()] = np.repeat(np.arange(n_features, dtype=np.int32), used)
    return TwoWayCodes(codes, Chunks(values.reshape(chunks, CHUNK), row.reshape(chunks, CHUNK), feature))


def gather_is_faster(n_features: int, slots: int) -> bool:
    """Whether gathers beat dense products here: a static choice, by backend and sizes; never on a mesh."""
    return jax.default_backend() == "cpu" and not divided() and n_features >= _FEATURES_PER_SLOT * slots


def active(codes: Codes) -> SparseCodes | None:
    """The active codes by row; None of dense ones."""
    return codes.codes if isinstance(codes, TwoWayCodes) else codes if isinstance(codes, SparseCodes) else None


def as_dense(codes: Codes, n: int) -> jax.Array:
    """`[rows, n]` of codes in any form."""
    return codes if active(codes) is None else dense_codes(active(codes), n)


def times(x: Codes, W: jax.Array) -> jax.Array:
    """`x W [rows, n]`, for `x [rows, m]` in any form and `W [m, n]`. Differentiable in W, in x but for two-way codes.

    `TwoWayCodes` are always gathered, `SparseCodes` where that is faster.
    """
    if isinstance(x, TwoWayCodes):
        return _times_two_way(x, W)
    if isinstance(x, SparseCodes):
        return _times_sparse(x, W) if gather_is_faster(W.shape[0], x.values.shape[1]) else as_dense(x, W.shape[0]) @ W
    return x @ W


def transposed_times(x: Codes, g: jax.Array, n_features: int) -> jax.Array:
    """`x^T g [n_features, d]`, for `x [rows, n_features]` in any form and `g [rows, d]`."""
    if not isinstance(x, TwoWayCodes):
        return as_dense(x, n_features).T @ g
    sums = gathered_sum(x.chunks.values, x.chunks.rows, g)
    zeros = jnp.zeros((n_features, g.shape[1]), g.dtype)
    return zeros.at[x.chunks.feature].add(sums, mode="drop", indices_are_sorted=True)


def gathered_sum(values: jax.Array, indices: jax.Array, W: jax.Array) -> jax.Array:
    """`[rows, d]`: sum over slots of `values x W[indices]`, for `values, indices [rows, slots]` and `W [n, d]`."""
    rows, slots = values.shape
    at_once = min(_AT_ONCE, max(slots, 1))
    spare = -slots % at_once
    cut = [jnp.pad(a, ((0, 0), (0, spare))).T.reshape(-1, at_once, rows) for a in (values, indices)]

    def add(y, slot):
        for value, index in zip(*slot):
            y = y + value[:, None] * W[index]
        return y, None

    return lax.scan(add, jnp.zeros((rows, W.shape[1]), W.dtype), tuple(cut))[0]


@jax.custom_vjp
def _times_two_way(x: TwoWayCodes, W: jax.Array) -> jax.Array:
    return gathered_sum(*x.codes, W)


def _two_way_backward(saved, g):
    x, n_features = saved
    return _no_gradient(x), transposed_times(x, g, n_features)


@jax.custom_vjp
def _times_sparse(x: SparseCodes, W: jax.Array) -> jax.Array:
    return gathered_sum(*x, W)


def _sparse_backward(saved, g):
    x, W = saved
    no_gradient = np.zeros(x.indices.shape, jax.dtypes.float0)
    return SparseCodes(value_gradient(x, W, g), no_gradient), transposed_times(x, g, W.shape[0])


def _no_gradient(tree):
    """Zeros as autodiff wants them: of integers float0."""
    return jax.tree.map(
        lambda a: jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0),
        tree,
    )


_times_two_way.defvjp(lambda x, W: (_times_two_way(x, W), (x, W.shape[0])), _two_way_backward)
_times_sparse.defvjp(lambda x, W: (_times_sparse(x, W), (x, W)), _sparse_backward)
