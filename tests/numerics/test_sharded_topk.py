"""Selections over devices are those of one device, ties included, and no row is ever put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.sharded_cost import collective_shapes
from sparse_jax.errors import InputError
from sparse_jax.numerics import keep_top_k
from sparse_jax.numerics.axes import DATA, ENSEMBLE, FEATURES, divided, parts
from sparse_jax.numerics.sparse_codes import top_k_codes
from sparse_jax.numerics.topk import batch_top_k_mask, top_k_mask
from sparse_jax.training.mesh import MeshShape, make_mesh

ROWS, N = 16, 32
SPREAD = PartitionSpec(DATA, FEATURES)
SHAPES = ["data=8", "data=4,features=2", "data=2,features=4", "features=8", "data=2,features=2,ensemble=2"]


def mesh_of(text):
    shape = MeshShape.parse(text)
    return make_mesh(shape, jax.devices()[: shape.size])


def over(mesh, function, x, *rest, spec=SPREAD):
    """`function(x, *rest)` under the mesh, with x laid out by `spec`."""
    with jax.set_mesh(mesh):
        return jax.jit(lambda x: function(x, *rest))(jax.device_put(x, NamedSharding(mesh, spec)))


def few_values(seed=0, rows=ROWS, n=N):
    """Numbers among which ties are common, -0 and infinities too."""
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([-np.inf, -2, -1, -0.0, 0.0, 0.5, 1, 2, np.inf], np.float32), (rows, n))


BOUNDS = (1, 4, 9, 20, 32)  # 1 and 4 go by candidates where 2 devices share the features, larger ones by counts


# Every selection of every size: masks by k_now of at most k, by count_now of the batch, and values and indices.
SELECTIONS = {
    **{f"k {k}": lambda x, k_now, _, k=k: top_k_mask(x, k, jnp.minimum(k_now, k)) for k in BOUNDS},
    "no k_now": lambda x, *_: top_k_mask(x, 3),
    "kept": lambda x, *_: keep_top_k(x, 5),
    "codes": lambda x, *_: tuple(top_k_codes(x, 9)),
    "batch": lambda x, _, count_now: batch_top_k_mask(x, ROWS * 9, count_now),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_selected_as_on_one_device(shape):
    """A program for each: one with so many independent collectives hangs now and then on fewer cores than devices."""
    mesh = mesh_of(shape)
    spread = NamedSharding(mesh, PartitionSpec(DATA, FEATURES))
    normal = np.random.default_rng(1).normal(size=(ROWS, N)).astype(np.float32)
    for name, selection in SELECTIONS.items():
        here, there = jax.jit(selection), jax.jit(lambda *given, selection=selection: selection(*given))
        for i, (k_now, count_now) in enumerate([(1, 0), (3, 1), (0, 77), (9, ROWS * 9), (32, 40)]):
            x = few_values(i) if i else normal
            numbers = jnp.int32(k_now), jnp.int32(count_now)
            with jax.set_mesh(mesh):
                ours = jax.block_until_ready(there(jax.device_put(x, spread), *numbers))
            if name == "batch":
                assert np.sum(np.asarray(ours)) == count_now
            theirs = here(x, *numbers)
            jax.tree.map(lambda a, b, n=name: np.testing.assert_array_equal(a, b, n), ours, theirs)


def test_all_equal_goes_to_the_lower_row_and_index():
    """By hand: 1 everywhere, over 2 x 4 devices."""
    mesh, ones = mesh_of("data=2,features=4"), np.ones((4, 32), np.float32)

    def masks(x):
        return top_k_mask(x, 2), top_k_mask(x, 11), batch_top_k_mask(x, 99, jnp.int32(43))

    by_candidates, by_counts, batch = over(mesh, masks, ones)
    np.testing.assert_array_equal(by_candidates, np.arange(32) < np.full((4, 1), 2))
    np.testing.assert_array_equal(by_counts, np.arange(32) < np.full((4, 1), 11))
    np.testing.assert_array_equal(batch, np.arange(4 * 32).reshape(4, 32) < 43)


def test_bfloat16_and_float64_are_compared_as_they_are_on_one_device(x64):
    mesh, rng = mesh_of("data=2,features=4"), np.random.default_rng(2)
    # Numbers that float32 cannot tell apart.
    close = 1 + rng.permutation(ROWS * N).reshape(ROWS, N) * 1e-12

    def masks(x):
        return top_k_mask(x, 1), top_k_mask(x, 9), batch_top_k_mask(x, 64, jnp.int32(50))

    for x in (close, jnp.array(close + rng.normal(size=close.shape) * 1e-2, jnp.bfloat16)):
        for ours, theirs in zip(over(mesh, masks, x), masks(jnp.asarray(x))):
            np.testing.assert_array_equal(ours, theirs)


def test_rows_that_cannot_be_divided_and_features_that_cannot():
    mesh, x = mesh_of("data=2,features=4"), few_values(3, rows=5)
    ours = over(mesh, lambda x: (top_k_mask(x, 2), top_k_mask(x, 9)), x, spec=PartitionSpec(None, FEATURES))
    for mask, k in zip(ours, (2, 9)):
        np.testing.assert_array_equal(mask, top_k_mask(x, k))
    with pytest.raises(InputError, match="30 features over 4 devices: give a multiple"):
        over(mesh, top_k_mask, few_values(n=30), 2, spec=PartitionSpec(DATA))


def test_members_over_devices_select_each_for_itself():
    mesh, x = mesh_of("data=2,features=2,ensemble=2"), np.stack([few_values(i) for i in range(4)])
    k_now = jnp.array([0, 1, 2, 2], jnp.int32)

    def masks(x, k_now):
        few, many = top_k_mask(x, 2, k_now), top_k_mask(x, 20, 9 * k_now)
        return few, many, batch_top_k_mask(x, 64, 9 * k_now)

    def all_members(x):
        return jax.vmap(masks, spmd_axis_name=ENSEMBLE)(x, k_now)

    ours = over(mesh, all_members, x, spec=PartitionSpec(ENSEMBLE, DATA, FEATURES))
    for i in range(4):
        for mask, theirs in zip(ours, masks(x[i], k_now[i])):
            np.testing.assert_array_equal(mask[i], theirs)


def test_the_gradient_reaches_only_what_was_kept():
    mesh, x = mesh_of("data=2,features=4"), np.random.default_rng(4).normal(size=(ROWS, N)).astype(np.float32)
    slopes = np.arange(ROWS * N, dtype=np.float32).reshape(ROWS, N)

    def kept(x):
        return top_k_mask(x, 2), top_k_mask(x, 9), batch_top_k_mask(x, 99, jnp.int32(99))

    def total(x):
        return sum(jnp.sum(jnp.where(mask, x, 0) * slopes) for mask in kept(x))

    theirs = sum(np.where(mask, slopes, 0) for mask in kept(jnp.array(x)))
    np.testing.assert_array_equal(over(mesh, jax.grad(total), x), theirs)


def test_no_row_is_put_together():
    mesh, x = mesh_of("data=2,features=4"), jax.ShapeDtypeStruct((64, 512), jnp.float32)
    spread = NamedSharding(mesh, PartitionSpec(DATA, FEATURES))
    k, rows = 5, 64 // mesh.shape[DATA]

    def select(x):
        return top_k_mask(x, k), top_k_mask(x, 200), batch_top_k_mask(x, 999, jnp.int32(999))

    with jax.set_mesh(mesh):
        text = jax.jit(select, in_shardings=spread, out_shardings=spread).lower(x).compile().as_text()
    gathered = [int(np.prod(shape)) for shape in collective_shapes(text, "all-gather|all-to-all|collective-permute")]
    assert max(gathered) == rows * k * mesh.shape[FEATURES]  # the candidates


def test_parts_of_the_mesh_in_force():
    assert (parts(DATA), parts(FEATURES), divided()) == (1, 1, False)
    with jax.set_mesh(mesh_of("data=2,features=4")):
        assert (parts(DATA), parts(FEATURES), parts(ENSEMBLE), divided()) == (2, 4, 1, True)
    with jax.set_mesh(mesh_of("ensemble=8")):
        assert (parts(ENSEMBLE), divided()) == (8, False)
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert not divided()
