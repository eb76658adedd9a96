"""Blocks of rows: the same sums and the same rows, whatever the block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.numerics import row_blocks
from sparse_jax.numerics.row_blocks import rows_in_block, sum_over_blocks


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_sums_and_rows_do_not_depend_on_the_block(block):
    x, weight = jnp.arange(12.0).reshape(6, 2), jnp.arange(6, dtype=jnp.int32)

    def part(rows):
        x, weight, nothing = rows
        assert nothing is None
        return (jnp.sum(x, axis=0), jnp.sum(weight)), {"twice": 2 * x, "weight": weight}

    sums, made = jax.jit(lambda *rows: sum_over_blocks(part, rows, block))(x, weight, None)
    jax.tree.map(np.testing.assert_array_equal, sums, ([30, 36], 15))
    jax.tree.map(np.testing.assert_array_equal, made, {"twice": 2 * x, "weight": weight})


@pytest.mark.parametrize(("rows", "block"), [(4096, 512), (512, 512), (40, 40), (1000, 500), (1021, 1021), (526, 263)])
def test_a_block_divides_the_rows(rows, block):
    assert rows_in_block(rows) == block


def test_accelerators_take_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(row_blocks.jax, "default_backend", lambda: "tpu")
    assert rows_in_block(4096) == 4096
