"""The exact selections of topk.py where rows and features lie over devices: nothing of size `[rows, n]` is gathered.

Two ways; both give what one device would, ties to the lower row and then to the lower index:

    candidates   each device finds the k largest of its own features. Their values, `[rows, devices x k]`, are gathered
                 and the k largest of them found. Devices hold features in order, and `lax.top_k` puts the lower index
                 first among equals, so ties go where they would on one device. What a device has among the k largest
                 are the first of its own.
    counts       no value leaves its device. The smallest value that is kept is found digit by digit from how many
                 entries are at least as large; only these counts are added up over devices. Where that value stands
                 more often than it may be kept, the last row that may keep it, and that row's last feature, are found
                 in the same way.

A batch's selection goes by counts: up to all of its rows * k entries may lie on one device, which makes candidates as
large as the codes themselves. So does a row's where candidates would be nearly as wide as the row (AuxK's).

Used under a mesh whose axes "data" or "features" have more than one device (axes.py); `jit`'s partitioner would gather
all values for a `top_k`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sparse_jax.errors import InputError
from sparse_jax.numerics.axes import DATA, FEATURES, parts

# Candidates are gathered while all of them are at most this share of the features.
CANDIDATE_SHARE = 1 / 4
# Bits of a key that are settled in one round of counts: fewer rounds, more counts in each.
DIGIT = 2


def top_k_mask(x: jax.Array, k: int, k_now: jax.Array | None = None) -> jax.Array:
    """`topk.top_k_mask` over devices: `[rows, n]` bool, laid out as `x` is."""
    n = x.shape[1]
    if k >= n and k_now is None:
        return jnp.ones(x.shape, bool)
    k = min(k, n)
    local = _by_candidates if k * parts(FEATURES) <= CANDIDATE_SHARE * n or parts(FEATURES) == 1 else _by_counts
    return _over_devices(partial(local, k=k), x, jnp.asarray(k if k_now is None else k_now, jnp.int32))


def batch_top_k_mask(x: jax.Array, count: int, count_now: jax.Array) -> jax.Array:
    """`topk.batch_top_k_mask` over devices: `[rows, n]` bool, laid out as `x` is."""
    return _over_devices(_batch_by_counts, x, jnp.minimum(jnp.asarray(count_now, jnp.int32), count))


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` over devices: values and indices `[rows, k]`, whole on each device that has the rows."""
    rows, spec = _layout(x)

    def local(x):
        values, indices = lax.top_k(x, min(k, x.shape[1]))
        if parts(FEATURES) == 1:
            return values, indices
        values, places = lax.top_k(_gathered(values), k)
        indices = _gathered(indices + _first_feature(x))
        return values, jnp.take_along_axis(indices, places, axis=1)

    return jax.shard_map(local, in_specs=spec, out_specs=PartitionSpec(rows), check_vma=False)(x)


def _layout(x: jax.Array) -> tuple[str | None, PartitionSpec]:
    """(the mesh axis of the rows, how `x [rows, n]` lies).

    Raises:
        InputError: the mesh does not divide the features.
    """
    count, n = x.shape
    if n % parts(FEATURES):
        raise InputError(
            f"{n} features over {parts(FEATURES)} devices: give a multiple, or a mesh that divides the features"
        )
    # A number of rows that cannot be divided (the last ones of a text) is worked on by all.
    rows = DATA if parts(DATA) > 1 and count % parts(DATA) == 0 else None
    return rows, PartitionSpec(rows, FEATURES if parts(FEATURES) > 1 else None)


def _over_devices(local: Callable, x: jax.Array, count: jax.Array) -> jax.Array:
    """`local(x, count, rows=)` on each device's part of `x`; `rows` is the mesh axis of the rows, or None."""
    x = lax.stop_gradient(x)
    x = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    rows, spec = _layout(x)
    # Not checked for what is the same on all devices: a threshold that has been added up over them is.
    placed = jax.shard_map(partial(local, rows=rows), in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)
    return placed(x, count)


def _by_candidates(x: jax.Array, k_now: jax.Array, *, k: int, rows: str | None) -> jax.Array:
    each = min(k, x.shape[1])
    values, indices = lax.top_k(x, each)
    kept = jnp.full((x.shape[0], 1), k_now)
    if parts(FEATURES) > 1:
        _, places = lax.top_k(_gathered(values), k)
        chosen = jnp.arange(k, dtype=jnp.int32) < k_now
        here = chosen & (places // each == lax.axis_index(FEATURES))
        kept = jnp.sum(here, axis=1, keepdims=True, dtype=jnp.int32)
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    first = jnp.arange(each, dtype=jnp.int32) < kept
    return jnp.zeros(x.shape, bool).at[row, indices].set(first, unique_indices=True)


def _gathered(a: jax.Array) -> jax.Array:
    """`[rows, devices x m]`: `a [rows, m]` of all devices that share the rows, in the order of their features."""
    return lax.all_gather(a, FEATURES, axis=1, tiled=True)


def _first_feature(x: jax.Array) -> jax.Array:
    return lax.axis_index(FEATURES).astype(jnp.int32) * x.shape[1]


def _by_counts(x: jax.Array, k_now: jax.Array, *, k: int, rows: str | None) -> jax.Array:
    def total(which):
        return lax.psum(jnp.sum(which, axis=-1, keepdims=True, dtype=jnp.int32), FEATURES)

    column, columns = _order(x, 1, FEATURES)
    count = jnp.full((x.shape[0], 1), jnp.minimum(k_now, k))
    return _first(((_key(x), _bits(x)), (column, columns)), count, total, _axes(rows))


def _batch_by_counts(x: jax.Array, count: jax.Array, *, rows: str | None) -> jax.Array:
    def total(which):
        here = jnp.sum(which, axis=(-2, -1), keepdims=True, dtype=jnp.int32)
        # More than is asked for is enough to know; all entries of a large batch would not fit an int32.
        return lax.psum(jnp.minimum(here, count), _axes(rows))

    levels = (_key(x), _bits(x)), _order(x, 0, rows), _order(x, 1, FEATURES)
    return _first(levels, jnp.full((1, 1), count), total, _axes(rows))


def _axes(rows: str | None) -> tuple[str, ...]:
    """Mesh axes over which counts are added up for a batch."""
    return tuple(axis for axis in (rows, FEATURES) if axis is not None and parts(axis) > 1)


def _first(levels: Sequence, count: jax.Array, total: Callable, axes: tuple[str, ...]) -> jax.Array:
    """Which entries are the `count` first, the largest by the first level, among equals by the next, and so on.

    Args:
        levels: (keys that broadcast against `[rows, n]`, unsigned; how many of their bits matter). No two entries are
            equal in all of them.
        count: broadcasts against rows, what is asked for.
        total: `[..., rows, n]` bool -> how many are True, of all devices, shaped like `count` behind leading axes.
        axes: over which devices take the same way.
    """
    (keys, bits), *rest = levels
    least = _threshold(keys, bits, count, total, True)
    chosen, tied = keys > least, keys == least
    missing = count - total(chosen)

    def by_next_levels(chosen, tied, missing):
        for keys, bits in rest:
            least = _threshold(keys, bits, missing, total, tied)
            above = tied & (keys > least)
            chosen, tied, missing = chosen | above, tied & (keys == least), missing - total(above)
        return chosen | (tied & (missing > 0))

    all_fit = jnp.all(total(tied) == missing)
    if axes:
        all_fit = lax.psum((~all_fit).astype(jnp.int32), axes) == 0
    return lax.cond(all_fit, lambda chosen, tied, _: chosen | tied, by_next_levels, chosen, tied, missing)


def _threshold(keys: jax.Array, bits: int, count: jax.Array, total: Callable, among) -> jax.Array:
    """The largest key t of `bits` bits for which `total(among & (keys >= t)) >= count`, or 0; shaped like `count`."""
    rounds = -(-bits // DIGIT)
    digits = jnp.arange(1, 2**DIGIT, dtype=keys.dtype).reshape(-1, 1, 1)

    def settle(i, least):
        shift = (DIGIT * (rounds - 1 - i)).astype(keys.dtype)
        enough = total(among & (keys >= least + (digits << shift))) >= count
        return least + (jnp.sum(enough, axis=0, dtype=keys.dtype) << shift)

    return lax.fori_loop(0, rounds, settle, jnp.zeros(count.shape, keys.dtype))


def _key(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order in which `lax.top_k` has floating-point numbers: -0 is below 0."""
    word = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    top = jnp.array(1, word) << (_bits(x) - 1)
    bits = lax.bitcast_convert_type(x, word)
    return jnp.where(bits < top, bits | top, ~bits)


def _bits(x: jax.Array) -> int:
    return 8 * x.dtype.itemsize


def _order(x: jax.Array, dimension: int, axis: str | None) -> tuple[jax.Array, int]:
    """(keys along a dimension of `x`, larger for what comes first in the whole array; their bits)."""
    size, devices = x.shape[dimension], parts(axis) if axis is not None else 1
    index = lax.broadcasted_iota(jnp.uint32, [size if i == dimension else 1 for i in (0, 1)], dimension)
    if devices > 1:
        index = index + lax.axis_index(axis).astype(jnp.uint32) * size
    last = size * devices
    return last - index, last.bit_length()
