"""Training over eight fake devices is training on one: every shape of mesh, each kind of selection, ensembles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.sharded_cost import collective_shapes
from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, BatchTopK, Matryoshka, MultiTopK, TopK
from sparse_jax.errors import InputError
from sparse_jax.training import (
    Member,
    Schedule,
    adam,
    group,
    init_ensemble,
    init_state,
    make_ensemble_step,
    make_resample,
    make_step,
    settings_for,
)
from sparse_jax.training.mesh import MeshShape, make_mesh, place
from tests.training.fifty_steps import (
    DEAD_WINDOW,
    KINDS,
    ROWS,
    STEPS,
    WEIGHT,
    D,
    N,
    batch,
    mesh_of,
    normaliser,
    start,
    trained,
)

SHAPES = ["data=8", "data=4,features=2", "data=2,features=4", "features=8"]
ENSEMBLES = ["data=2,features=2,ensemble=2", "ensemble=8"]
FEW = [
    ("l1", SHAPES[1]),
    ("topk", SHAPES[2]),
    ("batch-topk", SHAPES[2]),
    ("jump-relu", SHAPES[0]),
    ("fista", SHAPES[2]),
]


alone = functools.cache(trained)


def assert_same(ours, theirs, tolerance=1e-5):
    """Relative to the size of each array."""
    for name in theirs:
        error = np.linalg.norm(ours[name] - theirs[name])
        assert error <= tolerance * np.linalg.norm(theirs[name]), (name, error)


def check(kind, shape):
    (state, metrics, step), (one, by_one, _) = trained(kind, shape), alone(kind)
    for name in by_one[0]:
        ours, theirs = (np.array([row[name] for row in rows]) for rows in (metrics, by_one))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max(), err_msg=name)
    assert_same(state.params, one.params)
    np.testing.assert_array_equal(state.age, one.age)
    assert step.traced == 1
    if KINDS[kind].__class__ in (TopK, BatchTopK, Matryoshka, MultiTopK):
        assert by_one[-1]["aux_k"] > 0
        assert by_one[-1]["dead"] > 1 / N


@pytest.mark.parametrize(("kind", "shape"), FEW)
def test_fifty_steps_are_those_of_one_device(kind, shape):
    check(kind, shape)


@pytest.mark.matrix
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_of_every_kind_on_every_mesh(kind, shape):
    check(kind, shape)


def ensemble(kind, mesh, steps):
    """(states, metrics, step) of eight members that differ in their coefficients and seeds."""
    optimisation = adam(1e-3)
    field = "k" if hasattr(KINDS[kind], "k") else "l1"
    value = getattr(KINDS[kind], field)
    dictionaries = [dataclasses.replace(KINDS[kind], **{field: value + i % 3}).sized(D) for i in range(8)]
    members = [
        Member("resid_post.0", dictionary, settings_for(dictionary, optimisation), i, str(i))
        for i, dictionary in enumerate(dictionaries)
    ]
    (of,) = group(members)
    states = init_ensemble(of, optimisation.transform, normaliser(), "vmap", mesh)
    step = make_ensemble_step(of, optimisation, Schedule(), STEPS, DEAD_WINDOW, way="vmap", mesh=mesh)
    for i in range(steps):
        states, metrics = step(states, batch(i), WEIGHT)
    return jax.device_get(states), jax.device_get(metrics), step


members_alone = functools.cache(lambda kind, steps: ensemble(kind, None, steps))


def check_ensemble(kind, shape):
    states, metrics, step = ensemble(kind, mesh_of(shape), STEPS)
    one, by_one, _ = members_alone(kind, STEPS)
    np.testing.assert_allclose(metrics["loss"], by_one["loss"], rtol=1e-5)
    assert_same(states.params, one.params)
    np.testing.assert_array_equal(states.age, one.age)
    assert step.traced == 1


def test_members_over_devices_are_members_on_one():
    check_ensemble("topk", ENSEMBLES[0])


@pytest.mark.matrix
@pytest.mark.parametrize("shape", ENSEMBLES)
@pytest.mark.parametrize("kind", ["l1", "topk", "batch-topk"])
def test_members_of_every_kind_on_every_mesh(kind, shape):
    check_ensemble(kind, shape)


def test_a_loop_over_members_that_lie_over_devices():
    optimisation, dictionary = adam(1e-3), KINDS["l1"].sized(D)
    (of,) = group([Member("resid_post.0", dictionary, settings_for(dictionary, optimisation), 0, "a")])
    with pytest.raises(InputError, match="way loop with a mesh of ensemble=8: give vmap"):
        make_ensemble_step(of, optimisation, Schedule(), 9, 9, way="loop", mesh=mesh_of("ensemble=8"))


def test_the_state_is_consumed_and_comes_back_where_it_was():
    dictionary, mesh = KINDS["l1"].sized(D), mesh_of(SHAPES[1])
    step = make_step(dictionary, adam(1e-3), Schedule(), STEPS, DEAD_WINDOW, mesh=mesh)
    state = place(mesh, start(dictionary))
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    after, metrics = step(state, batch(0), WEIGHT)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.age)))
    moved = jax.tree.map(lambda leaf, was: leaf.sharding.is_equivalent_to(was, leaf.ndim), after, before)
    assert all(jax.tree.leaves(moved))
    assert all(value.sharding.is_fully_replicated for value in metrics.values())
    with pytest.raises(InputError, match="a batch of 63 tokens over data=4: give a batch that is a multiple"):
        step(after, batch(0)[:63], WEIGHT[:63])


def test_resampling_on_a_mesh_and_the_step_after_it_is_not_compiled_again():
    dictionary = KINDS["topk"].sized(D)
    results = []
    for mesh in (None, mesh_of(SHAPES[2])):
        step = make_step(dictionary, adam(1e-3), Schedule(), STEPS, DEAD_WINDOW, mesh=mesh)
        resample = make_resample(dictionary, DEAD_WINDOW, mesh=mesh)
        state = start(dictionary)
        state = place(mesh, state) if mesh else state
        for i in range(3):
            state, _ = step(state, batch(i), WEIGHT)
        state, count = resample(state, batch(9), WEIGHT)
        state, _ = step(state, batch(3), WEIGHT)
        results.append((jax.device_get(state), int(count)))
    assert step.traced == resample.traced == 1
    (one, by_one), (ours, count) = results
    assert count == by_one > 0
    assert_same(ours.params, one.params)


@pytest.mark.parametrize("kind", ["topk", "batch-topk", "matryoshka"])
def test_codes_of_the_same_parameters_are_the_same(kind):
    """Indices equal, values within 1e-6, for inference as for training."""
    dictionary, mesh = KINDS[kind].sized(D), mesh_of(SHAPES[2])
    params = dictionary.init(jax.random.key(3))
    x = normaliser().apply(batch(0))
    encode = jax.jit(dictionary.encode)
    thresholds = [{}] if kind == "topk" else [{}, {"threshold": jnp.float32(0.7)}]
    for more in thresholds:
        theirs = encode(params | more, x)
        state = place(mesh, dataclasses.replace(start(dictionary), params=params | more))
        with jax.set_mesh(mesh):
            ours = encode(state.params, x)
        np.testing.assert_array_equal(ours != 0, theirs != 0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_prefixes_that_chunks_of_a_device_do_not_fit():
    """Matryoshka with prefixes of odd sizes: each takes a product of its own, the sums are the same."""
    dictionary, mesh = dataclasses.replace(KINDS["matryoshka"], prefixes=(0.3, 0.77, 1.0)).sized(D), mesh_of(SHAPES[2])
    params = dictionary.init(jax.random.key(0))
    codes = np.abs(np.random.default_rng(0).normal(size=(ROWS, N))).astype(np.float32)
    assert dictionary.sizes == (19, 49, 64)
    with jax.set_mesh(mesh):
        ours = jax.jit(dictionary.prefix_reconstructions)(params, codes)
    for mine, theirs in zip(ours, dictionary.prefix_reconstructions(params, jnp.array(codes))):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def compiled_text(dictionary, mesh, rows):
    d = dictionary.d_in
    optimisation = adam(1e-3)
    at = Normaliser(jnp.zeros(d), jnp.ones(()))
    state = init_state(dictionary, optimisation.transform, at, 0, settings_for(dictionary, optimisation))
    step = make_step(dictionary, optimisation, Schedule(), STEPS, DEAD_WINDOW, mesh=mesh)
    shapes = jax.ShapeDtypeStruct((rows, d), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    return step.lower(place(mesh, state), *shapes).compile()


def test_shapes_are_read_from_long_tuples():
    text = (
        "%a = (f32[2,3]{1,0}, f32[], /*index=5*/s32[4]{0}) all-gather(%x, %y), id=1\n%b = f32[7] all-reduce-start(%z)"
    )
    assert collective_shapes(text, "all-gather") == [(2, 3), (), (4,)]
    assert collective_shapes(text, "all-gather|all-reduce") == [(2, 3), (), (4,), (7,)]


def test_no_step_gathers_codes_or_weights():
    """The program of a TopK step over 2 x 4 devices: candidates are all that is gathered."""
    rows, d, n = 128, 24, 512
    dictionary = TopK(n_features=n, k=4, aux_k=3).sized(d)
    text = compiled_text(dictionary, mesh_of(SHAPES[2]), rows).as_text()
    here, features = rows // 2, 4
    gathered = collective_shapes(text, "all-gather|all-to-all|collective-permute")
    assert set(gathered) <= {(here, features * 4), (here, features * 3)}
    assert (here, features * 4) in gathered
    # Sums over devices: no more than reconstructions, gradients of a device's own part, or what is smaller.
    summed = collective_shapes(text, "all-reduce")
    assert max(np.prod(shape) for shape in summed) == max(here * d, d * n // features)


def test_each_device_does_its_part():
    """Counted operations and bytes of L1's step fall with the devices, along either axis; see benchmarks."""
    counted = {}
    for shape in (MeshShape(1), MeshShape(4, 2)):
        mesh = make_mesh(shape, jax.devices()[: shape.size])
        compiled = compiled_text(L1(n_features=1024).sized(64), mesh, 512)
        counted[shape.size] = compiled.cost_analysis(), compiled.memory_analysis().argument_size_in_bytes
    (one, held), (eight, held_by_eight) = counted[1], counted[8]
    assert eight["flops"] * 8 == pytest.approx(one["flops"], rel=0.1)
    assert eight["bytes accessed"] * 8 < 2 * one["bytes accessed"]
    assert held_by_eight * 2 == pytest.approx(held, rel=0.1)  # of the state: over features alone
