"""How a block's tokens lie over a mesh, and how they get there after the shuffle.

A block is a row of batches. Each device along the axis "data" holds an equal part of every batch, the parts one after
the other; so a batch is taken without any exchange between devices, and holds the same tokens in the same order as
without a mesh. Where activations are computed on the mesh each device has those of its own rows of text, and the
shuffle sends each token once, to the device that holds its place (the partitioner would gather the whole block).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sparse_jax.errors import InputError


@dataclass(frozen=True)
class Spread:
    """The layout.

    Attributes:
        sharding: of arrays whose leading axis is tokens (or rows of text), over one axis of the mesh.
        batch: tokens in a step.

    Raises:
        InputError: the mesh does not divide the batch.
    """

    sharding: NamedSharding
    batch: int

    def __post_init__(self):
        if self.batch < 1 or self.batch % self.parts:
            raise InputError(
                f"{self.axis}={self.parts} of the mesh does not divide the batch of {self.batch} tokens; change it"
            )

    @property
    def axis(self) -> str:
        """The mesh's axis."""
        return self.sharding.spec[0]

    @property
    def parts(self) -> int:
        """Devices along it."""
        return self.sharding.mesh.shape[self.axis]

    def check(self, rows: int, context: int) -> None:
        """Raises InputError unless blocks of so many rows of text can be spread."""
        if rows % self.parts:
            raise InputError(f"{self.axis}={self.parts} of the mesh does not divide a block of {rows} rows of text")
        if rows * context % self.batch:
            raise InputError(f"a block of {rows * context} tokens holds no whole number of batches of {self.batch}")

    def arranged(self, values: np.ndarray) -> np.ndarray:
        """A block's `[tokens, ...]` in order -> as they lie: device by device, each with its parts of all batches."""
        split = values.reshape(-1, self.parts, self.batch // self.parts, *values.shape[1:])
        return np.swapaxes(split, 0, 1).reshape(values.shape)

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `arranged`."""
        split = values.reshape(self.parts, -1, self.batch // self.parts, *values.shape[1:])
        return np.swapaxes(split, 0, 1).reshape(values.shape)

    def batch_at(self, values: Any, number: int) -> Any:
        """Batch `number` of arrays that lie so, `[batch, ...]`, spread over the same devices."""
        return _batch_at(values, np.int32(number), self)

    def leading(self, values: jax.Array, rows: int) -> jax.Array:
        """The first rows (at most all) of such an array `[tokens, ...]`, in order, whole on all devices.

        A number that the mesh does not divide is made smaller.
        """
        rows = min(rows, len(values))
        return _leading(values, rows - rows % self.parts, self)

    def array(self, shape: tuple[int, ...], dtype: np.dtype, part: Callable[[int, int], np.ndarray]) -> jax.Array:
        """An array of which this process makes only the parts for its own devices.

        Args:
            shape: of the whole.
            dtype: of its entries.
            part: (start, stop) -> what stands there of the leading axis; asked once for each part.
        """
        made: dict[tuple[int, int], np.ndarray] = {}

        def of(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            if (start, stop) not in made:
                made[start, stop] = np.ascontiguousarray(part(start, stop), dtype)
            return made[start, stop]

        return jax.make_array_from_callback(shape, self.sharding, of)

    def own_parts(self, count: int) -> list[tuple[int, int]]:
        """(start, stop) of the parts of an axis of `count` that this process's devices hold, ascending."""
        places = self.sharding.addressable_devices_indices_map((count,)).values()
        return sorted({tuple(index[0].indices(count)[:2]) for index in places})


@partial(jax.jit, static_argnames="spread")
def _batch_at(values: Any, number: jax.Array, spread: Spread) -> Any:
    def one(each: jax.Array) -> jax.Array:
        split = each.reshape(spread.parts, -1, spread.batch // spread.parts, *each.shape[1:])
        taken = lax.dynamic_index_in_dim(split, number, axis=1, keepdims=False)
        return lax.with_sharding_constraint(taken.reshape(spread.batch, *each.shape[1:]), spread.sharding)

    return jax.tree.map(one, values)


@partial(jax.jit, static_argnames=("rows", "spread"))
def _leading(values: jax.Array, rows: int, spread: Spread) -> jax.Array:
    split = values.reshape(spread.parts, -1, spread.batch // spread.parts, *values.shape[1:])
    batches = jnp.swapaxes(split[:, : -(-rows // spread.batch)], 0, 1)
    whole = NamedSharding(spread.sharding.mesh, PartitionSpec())
    return lax.with_sharding_constraint(batches.reshape(-1, *values.shape[1:])[:rows], whole)


class Routes(NamedTuple):
    """Which token goes from which device to which, for one block.

    Attributes:
        send: `[part, part, slots]` int32; of each device, for each other one, the places of the tokens that it sends,
            among its own; slots that are not needed hold 0.
        receive: `[tokens]` int32; for each place on a device, where what stands there is among all it has received.
    """

    send: np.ndarray
    receive: np.ndarray


# The number of slots is a shape of the compiled exchange: in steps of this share of the mean it seldom changes.
_STEP = 1 / 8


def routes(sources: np.ndarray, parts: int) -> Routes:
    """The routes of a block.

    Args:
        sources: `[tokens]` for each place as the block lies in the end, the token that belongs there, numbered as they
            lie at first: each of the `parts` devices has an equal run of them.
        parts: devices.
    """
    own = len(sources) // parts
    sender, receiver = sources // own, np.arange(len(sources)) // own
    pair = sender * parts + receiver
    counts = np.bincount(pair, minlength=parts * parts)
    step = max(1, round(_STEP * own / parts))
    slots = -(-int(counts.max()) // step) * step
    by_pair = np.argsort(pair, kind="stable")
    rank = np.empty(len(sources), np.int64)
    rank[by_pair] = np.arange(len(sources)) - np.repeat(np.cumsum(counts) - counts, counts)
    send = np.zeros((parts, parts, slots), np.int32)
    send[sender, receiver, rank] = sources % own
    return Routes(send, (sender * slots + rank).astype(np.int32))


def exchanged(values: Any, send: jax.Array, receive: jax.Array, axis: str) -> Any:
    """Inside `shard_map` over `axis`: this device's arrays `[own, ...]` after the exchange that the routes describe.

    Args:
        values: arrays, a leading axis of this device's tokens.
        send: `[1, part, slots]` this device's part of `Routes.send`.
        receive: `[own]` its part of `Routes.receive`.
        axis: of the mesh.
    """

    def one(each: jax.Array) -> jax.Array:
        got = lax.all_to_all(each[send[0]], axis, split_axis=0, concat_axis=0)
        return got.reshape(-1, *each.shape[1:])[receive]

    return jax.tree.map(one, values)
