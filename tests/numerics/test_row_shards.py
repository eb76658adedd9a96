"""Work on rows by themselves, over all devices: the same rows out, nothing said between devices meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.sharded_cost import collective_shapes
from sparse_jax.numerics.axes import DATA, FEATURES
from sparse_jax.numerics.row_shards import over_rows
from sparse_jax.training.mesh import MeshShape, make_mesh


def product(x, W):
    return jnp.tanh(x @ W)


# 16 rows: all devices; 6: those of "data" alone; 5: every device does all.
@pytest.mark.parametrize("rows", [16, 6, 5])
def test_rows_are_those_of_one_device(rows):
    mesh, rng = make_mesh(MeshShape(2, 4)), np.random.default_rng(0)
    x, W = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, 6), (6, 16)))
    W_spread = jax.device_put(W, NamedSharding(mesh, PartitionSpec(None, FEATURES)))
    with jax.set_mesh(mesh):
        ours = jax.jit(lambda x, W: over_rows(product, x, W))(x, W_spread)
    np.testing.assert_allclose(ours, product(x, W), rtol=1e-6)
    assert ours.sharding.spec == PartitionSpec(DATA if rows % 2 == 0 else None, FEATURES)


def test_no_batch_of_codes_is_gathered():
    mesh = make_mesh(MeshShape(2, 4))
    x, W = jax.ShapeDtypeStruct((64, 6), jnp.float32), jax.ShapeDtypeStruct((6, 256), jnp.float32)
    rows, columns = (NamedSharding(mesh, spec) for spec in (PartitionSpec(DATA), PartitionSpec(None, FEATURES)))
    with jax.set_mesh(mesh):
        text = jax.jit(lambda x, W: over_rows(product, x, W), in_shardings=(rows, columns)).lower(x, W).compile()
    gathered = collective_shapes(text.as_text(), "all-gather|all-to-all|collective-permute")
    assert (6, 256) in gathered  # W, whole for a while
    assert not {(64, 256), (32, 256)} & set(gathered)
