"""Work on a batch in blocks of rows, so that what is made on the way fits a CPU's caches.

Where a function of `[rows, n]` passes over several arrays of that size, memory and page faults take as long as the
products: the gradient of L1 in blocks of 512 rows took 0.6 of the time of one over 4,096 rows at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.numerics.axes import divided

# Rows in a block, at most: large enough for the matrix units, small enough for the caches.
BLOCK = 512
# Below this a block has too few rows for the matrix units.
_SMALLEST = 64


def rows_in_block(rows: int) -> int:
    """How many rows to take at once: all of them on accelerators, on a mesh, and where no suitable number divides them.

    On a mesh a block would lie on one device, and the others would wait.
    """
    if jax.default_backend() != "cpu" or divided():
        return rows
    return next((size for size in range(BLOCK, _SMALLEST - 1, -1) if rows % size == 0), rows)


def sum_over_blocks(part: Callable, rows: Any, block: int) -> tuple[Any, Any]:
    """(sums, made): `part(rows) -> (sums, made)` taken block by block, its sums added up, the rest put together.

    Args:
        part: of a pytree of arrays `[block, ...]`; `sums` is any pytree, `made` one of arrays `[block, ...]`.
        rows: a pytree of arrays `[rows, ...]`.
        block: rows in a block; divides their number.
    """
    total = jax.tree.leaves(rows)[0].shape[0]
    if block == total:
        return part(rows)
    blocks = jax.tree.map(lambda a: a.reshape(total // block, block, *a.shape[1:]), rows)
    shapes, _ = jax.eval_shape(part, jax.tree.map(lambda a: a[0], blocks))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def add(sums, one):
        more, made = part(one)
        return jax.tree.map(jnp.add, sums, more), made

    sums, made = lax.scan(add, zeros, blocks)
    return sums, jax.tree.map(lambda a: a.reshape(total, *a.shape[2:]), made)
