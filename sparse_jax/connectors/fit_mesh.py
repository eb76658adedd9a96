"""A connector's training over a mesh of devices: rows of a batch over "data", what it predicts over "features".

Each matrix is divided by its columns, so that each device predicts targets of its own from all inputs (which are few
active ones of each row, and known to all). Of hidden codes, far fewer than targets, each device makes some, and all are
then given to all. Products are dense: sums of gathered rows are a CPU's way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_jax.errors import InputError
from sparse_jax.numerics.axes import DATA, FEATURES, parts
from sparse_jax.numerics.sparse_codes import SparseCodes
from sparse_jax.training.mesh import batch_sharding, put


def check_batch(mesh: Mesh | None, batch: int) -> None:
    """Raises InputError where the mesh does not divide a batch of so many tokens."""
    if mesh is not None and batch % mesh.shape[DATA]:
        raise InputError(f"--batch {batch} over {DATA}={mesh.shape[DATA]} devices: give a batch that is a multiple")


def fit_shardings(mesh: Mesh, state: Any) -> Any:
    """How a connector's state in training lies: every last axis that can be divided over "features"."""

    def sharding(leaf):
        divides = leaf.ndim > 0 and leaf.shape[-1] % mesh.shape[FEATURES] == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), FEATURES) if divides else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, state)


def placed(mesh: Mesh, state: Any) -> Any:
    """A state in training laid out over the mesh."""
    return jax.tree.map(put, state, fit_shardings(mesh, state))


def placed_batch(mesh: Mesh, codes: Any) -> Any:
    """Codes of a batch with their rows over "data"."""
    return jax.tree.map(lambda leaf: put(leaf, batch_sharding(mesh)), codes)


def dense_over_devices(codes: SparseCodes, n: int, columns: bool) -> jax.Array:
    """`[rows, n]` of codes with their zeros, made where they are used: under a mesh, rows over "data".

    With `columns` (that can be divided) each device along "features" makes its own, else all of them.
    """
    rows = DATA if parts(DATA) > 1 and len(codes.values) % parts(DATA) == 0 else None
    devices = parts(FEATURES) if columns and n % parts(FEATURES) == 0 else 1
    width = n // devices

    def local(values, indices):
        if devices > 1:
            indices = indices - lax.axis_index(FEATURES).astype(indices.dtype) * width
            indices = jnp.where(indices < 0, width, indices)  # beyond the end, where what is not here is dropped
        row = jnp.arange(len(values), dtype=jnp.int32)[:, None]
        return jnp.zeros((len(values), width), values.dtype).at[row, indices].add(values, mode="drop")

    out = PartitionSpec(rows, FEATURES if devices > 1 else None)
    return jax.shard_map(local, in_specs=PartitionSpec(rows), out_specs=out, check_vma=False)(*codes)
