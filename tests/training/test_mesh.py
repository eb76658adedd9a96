"""Meshes: what the flag may say, what does not fit, and how a state lies."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import DICTIONARIES, TopK
from sparse_jax.errors import InputError
from sparse_jax.numerics.axes import AXES, DATA, ENSEMBLE, FEATURES
from sparse_jax.training import adam, init_state, settings_for
from sparse_jax.training.mesh import (
    MeshShape,
    arranged,
    batch_sharding,
    check_fits,
    make_mesh,
    place,
    shape_of,
    state_shardings,
)

D, N = 8, 32


def state_of(dictionary, seed=0):
    optimisation = adam(1e-3)
    normaliser = Normaliser(jnp.zeros(dictionary.d_in), jnp.ones(()))
    return init_state(dictionary, optimisation.transform, normaliser, seed, settings_for(dictionary, optimisation))


def specs(tree):
    return {jax.tree_util.keystr(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=8,features=4", MeshShape(8, 4, 1)),
        (" features = 2 , ensemble=3 ", MeshShape(1, 2, 3)),
        ("", MeshShape()),
        ("data=1", MeshShape()),
    ],
)
def test_what_the_flag_says(text, shape):
    assert MeshShape.parse(text) == shape
    assert MeshShape.parse(str(shape)) == shape
    assert shape.size == shape.data * shape.features * shape.ensemble


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model=2", "mesh 'model=2': 'model=2' is not among data=N, features=N, ensemble=N"),
        ("data", "'data' is not among"),
        ("data=2,data=4", "data stands there twice; give it once"),
        ("data=two", "data='two' is not a number of devices"),
        ("data=-1", "data='-1' is not a number of devices"),
        ("features=0", "features=0: give at least 1"),
    ],
)
def test_what_it_may_not_say(text, shown):
    with pytest.raises(InputError, match=shown):
        MeshShape.parse(text)


def test_a_mesh_has_all_axes_and_takes_all_devices():
    mesh = make_mesh(MeshShape(2, 2, 2))
    assert mesh.axis_names == AXES
    assert shape_of(mesh) == MeshShape(2, 2, 2)
    assert set(mesh.devices.flat) == set(jax.devices())
    for shape, devices in ((MeshShape(16), None), (MeshShape(2), None), (MeshShape(4), jax.devices()[:2])):
        there = 8 if devices is None else 2
        with pytest.raises(InputError, match=f"asks for {shape.size} devices and there are {there}: give"):
            make_mesh(shape, devices)


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ({"batch": 65, "n_features": 32, "members": 2}, "data=2 does not divide the 65 tokens of a batch"),
        ({"batch": 64, "n_features": 30, "members": 2}, "features=4 does not divide the 30 features"),
        ({"batch": 64, "n_features": 32, "members": 3}, "ensemble=2 does not divide the 3 members of a group"),
    ],
)
def test_what_the_mesh_does_not_divide(sizes, shown):
    with pytest.raises(InputError, match=shown):
        check_fits(MeshShape(2, 4, 2), **sizes)
    check_fits(MeshShape(2, 4, 2), batch=64, n_features=32, members=2)


@pytest.mark.parametrize("kind", [kind for kind in DICTIONARIES if kind not in ("pca", "neurons", "random")])
def test_what_counts_features_is_divided_and_nothing_else(kind):
    """Every parameter of every architecture, and the moments of those that are trained."""
    dictionary = DICTIONARIES[kind](n_features=N).sized(D)
    state = jax.eval_shape(lambda: state_of(dictionary))
    mesh = make_mesh(MeshShape(2, 4))
    found = specs(state_shardings(mesh, state))
    for name, value in state.params.items():
        # N is no other width here, so an axis of that size counts features.
        due = PartitionSpec(*(FEATURES if size == N else None for size in value.shape))
        due = PartitionSpec() if FEATURES not in due else due
        assert found[f".params[{name!r}]"] == due, name
        for moment in ("mu", "nu") if name not in dictionary.frozen else ():
            assert found[f".opt_state[0].{moment}[{name!r}]"] == due, name
    assert found.pop(".age") == PartitionSpec(FEATURES)
    rest = {spec for name, spec in found.items() if not name.startswith((".params", ".opt_state"))}
    assert rest == {PartitionSpec()}
    assert found[".opt_state[0].count"] == PartitionSpec()


def test_a_square_dictionary_keeps_its_bias_whole():
    state = jax.eval_shape(lambda: state_of(TopK(n_features=D).sized(D)))
    found = specs(state_shardings(make_mesh(MeshShape(2, 4)), state))
    assert found[".params['b_dec']"] == PartitionSpec()
    assert found[".params['b_enc']"] == PartitionSpec(FEATURES)
    assert found[".params['W_enc']"] == PartitionSpec(None, FEATURES)
    assert found[".params['W_dec']"] == PartitionSpec(FEATURES, None)


def test_members_lie_over_their_own_axis():
    states = [state_of(TopK(n_features=N).sized(D), seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    mesh = make_mesh(MeshShape(2, 2, 2))
    found = specs(state_shardings(mesh, stacked, members=True))
    assert found[".params['W_enc']"] == PartitionSpec(ENSEMBLE, None, FEATURES)
    assert found[".opt_state[0].nu['W_dec']"] == PartitionSpec(ENSEMBLE, FEATURES, None)
    assert found[".age"] == PartitionSpec(ENSEMBLE, FEATURES)
    assert found[".key"] == found[".settings.learning_rate"] == PartitionSpec(ENSEMBLE)
    assert found[".step"] == found[".rows_seen"] == PartitionSpec()  # asked for by every process
    placed = place(mesh, stacked, members=True)
    assert {shard.data.shape for shard in placed.params["W_enc"].addressable_shards} == {(1, D, N // 2)}
    # A tuple of states, as a group that is stepped in a loop has them.
    assert len(state_shardings(mesh, tuple(states))) == 2


def test_a_placed_state_is_the_same_and_its_own():
    state = state_of(TopK(n_features=N).sized(D))
    mesh = make_mesh(MeshShape(2, 4))
    placed = place(mesh, state)
    numbers = lambda tree: jax.tree.map(lambda a: a, (tree.params, tree.opt_state, jax.random.key_data(tree.key)))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, numbers(placed), numbers(state))
    jax.tree.map(lambda leaf: leaf.delete(), placed)  # as a step that consumes it does
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    np.asarray(state.params["b_dec"])
    assert batch_sharding(mesh).spec == PartitionSpec(DATA)


@pytest.mark.parametrize(
    ("kind", "torus", "axes"),
    [("TPU v5", (4, 4, 4), (8, 8)), ("TPU v5", (4, 8, 8), (16, 16)), ("TPU v5 lite", (8, 8, 1), (4, 16))],
    ids=["v5p-128", "v5p-512", "v5litepod-64"],
)
def test_a_mesh_whose_axes_are_not_those_of_the_torus(kind, torus, axes):
    """Made-up TPU chips with their places in a torus; every one of them stands in the mesh once."""
    places = list(np.ndindex(torus))
    chips = [
        SimpleNamespace(id=i, platform="tpu", device_kind=kind, process_index=0, coords=place, core_on_chip=0)
        for i, place in enumerate(places)
    ]
    shape = MeshShape(*axes)
    placed = arranged(shape, chips)
    assert placed.shape == (*axes, 1)
    assert sorted(chip.id for chip in placed.flat) == list(range(shape.size))
