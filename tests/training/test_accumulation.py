"""Micro-batches and chunks of features give the step that the whole batch gives; moments on the host the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, BatchTopK, Gated, JumpReLU, Lp, TopK
from sparse_jax.dictionaries.protocol import Batch, Context
from sparse_jax.errors import InputError
from sparse_jax.training import Checkpoints, Schedule, adam, init_state, make_step, settings_for
from sparse_jax.training.accumulation import WHOLE, Chunks, gradient_of
from sparse_jax.training.mesh import MeshShape, make_mesh, place

D, N, ROWS = 8, 32, 48
FOREVER = 10**9


def batch(rows=ROWS, masked=True):
    x = jax.random.normal(jax.random.key(1), (rows, D))
    weight = (jax.random.uniform(jax.random.key(2), (rows,)) > 0.3).astype(jnp.float32) if masked else jnp.ones(rows)
    return Batch(x, x, weight)


def context(dictionary, step=3, age=0):
    coefficients = {name: jnp.array(value, jnp.float32) for name, value in dictionary.coefficients.items()}
    ages = jnp.full(dictionary.n_features, age, jnp.int32)
    return Context(coefficients, ages, jax.random.key(5), jnp.array(step, jnp.int32), jnp.array(100, jnp.int32))


def both(dictionary, chunks, of=None, age=0):
    params, of = dictionary.init(jax.random.key(0)), of or batch()
    calls = [jax.jit(gradient_of(dictionary, each)) for each in (WHOLE, chunks)]
    return [call(params, of, context(dictionary, age=age)) for call in calls]


def assert_same(whole, cut, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * 1e-1), whole, cut)


@pytest.mark.parametrize(
    ("dictionary", "parts"),
    [(L1(l1=0.5), 3), (L1(l1=0.5), 48), (JumpReLU(), 3), (Gated(), 4), (TopK(k=4), 8), (Lp(hold_strength=False), 2)],
    ids=["l1", "l1, single rows", "jump-relu", "gated", "topk", "lp"],
)
def test_micro_batches_are_the_batch(dictionary, parts):
    """Masked rows are not spread evenly over micro-batches: each counts by the rows it has."""
    assert_same(*both(dictionary.sized(D), Chunks(rows=parts)))


def test_a_micro_batch_without_rows_that_count_changes_nothing():
    of = batch(masked=False)
    weight = jnp.ones(ROWS).at[1::2].set(0)  # all of the second micro-batch
    assert_same(*both(L1(l1=0.5).sized(D), Chunks(rows=2), of._replace(weight=weight)))


def test_fired_counts_are_whole_numbers_of_the_whole_batch():
    (_, whole, _), (_, cut, _) = both(TopK(k=4).sized(D), Chunks(rows=4))
    assert cut.fired.dtype == jnp.int32
    assert int(cut.fired.sum()) > 0
    np.testing.assert_array_equal(whole.fired, cut.fired)


def test_batch_top_k_selects_in_micro_batches_and_its_threshold_is_their_mean():
    """By hand: micro-batch i has rows i, 2 + i, ...; rows * k largest of each; the mean of the smallest kept."""
    dictionary = BatchTopK(k=3, threshold_share=0.5).sized(D)
    params = {**dictionary.init(jax.random.key(0)), "threshold": jnp.array(0.2)}
    of, ctx = batch(masked=False), context(dictionary)
    _, losses, _ = jax.jit(gradient_of(dictionary, Chunks(rows=2)))(params, of, ctx)
    values = np.maximum(np.asarray(dictionary.preactivations(params, of.x)), 0)
    kept, smallest = 0, []
    for i in range(2):
        entries = np.sort(values[i::2].ravel())[::-1][: 3 * ROWS // 2]
        kept += int(np.sum(entries > 0))
        smallest.append(entries[entries > 0].min())
    assert int(losses.fired.sum()) == kept
    newest = 1 / (1 + 0.5 * 3)
    np.testing.assert_allclose(losses.frozen["threshold"], 0.2 + newest * (np.mean(smallest) - 0.2), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "chunks"),
    [
        ({}, Chunks(rows=2, features=2)),
        ({"tied": True, "activation": "softplus"}, Chunks(features=4)),
        ({"norm_weighted": True, "centring": False}, Chunks(features=N)),
        ({"decoder_bias": False}, Chunks(features=4)),
    ],
    ids=str,
)
def test_chunks_of_features_are_the_features(fields, chunks):
    assert_same(*both(L1(l1=0.5, expansion=4, **fields).sized(D), chunks))


def test_in_chunks_of_features_no_array_of_rows_by_features_exists():
    dictionary = L1(n_features=512).sized(D)
    params, of = dictionary.init(jax.random.key(0)), batch(64)
    sizes = {}
    for chunks in (WHOLE, Chunks(features=8)):
        lowered = jax.jit(gradient_of(dictionary, chunks)).lower(params, of, context(dictionary))
        sizes[chunks.features] = "64x512xf32" in lowered.as_text()
    assert sizes == {1: True, 8: False}


def mesh_of(**axes):
    shape = MeshShape(**axes)
    return make_mesh(shape, jax.devices()[: shape.size])


def state_of(dictionary):
    optimisation = adam(1e-2)
    normaliser = Normaliser(jnp.zeros(D), jnp.ones(()))
    return init_state(dictionary, optimisation.transform, normaliser, 0, settings_for(dictionary, optimisation))


def stepped(dictionary, chunks=WHOLE, mesh=None, offload=False, steps=4):
    state = state_of(dictionary)
    step = make_step(dictionary, adam(1e-2), Schedule(), 100, FOREVER, mesh=mesh, chunks=chunks, offload=offload)
    state = state if mesh is None else place(mesh, state)
    for i in range(steps):
        x = jax.random.normal(jax.random.key(i), (ROWS, D))
        state, metrics = step(state, x, jnp.ones(ROWS))
    return state, metrics, step


@pytest.mark.parametrize("dictionary", [L1(l1=0.5, expansion=4), TopK(k=4, expansion=4)], ids=["l1", "topk"])
def test_a_cut_step_on_a_mesh_is_the_step(dictionary):
    dictionary = dictionary.sized(D)
    chunks = Chunks(rows=4, features=2 if isinstance(dictionary, L1) else 1)
    whole, metrics, _ = stepped(dictionary)
    cut, metrics_cut, step = stepped(dictionary, chunks, mesh_of(data=2, features=2))
    assert step.traced == 1
    for name, value in whole.params.items():
        np.testing.assert_allclose(value, cut.params[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(whole.age, cut.age)
    np.testing.assert_allclose(metrics["loss"], metrics_cut["loss"], rtol=1e-5)


def test_micro_batches_on_a_mesh_move_no_rows():
    """Rows of a micro-batch lie where they lay: nothing is gathered or exchanged for it."""
    dictionary = L1(expansion=4).sized(D)
    state, _, step = stepped(dictionary, Chunks(rows=4), mesh_of(data=4), steps=1)
    text = step.lower(state, jnp.ones((ROWS, D)), jnp.ones(ROWS)).compile().as_text()
    for word in ("all-to-all", "collective-permute"):
        assert word not in text
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert not gathers, gathers


def test_moments_on_the_host_change_no_bit(tmp_path):
    """Nor do they where the run is saved, and goes on from what was saved."""
    dictionary, mesh = L1(expansion=4).sized(D), mesh_of(data=2, features=2)
    here, _, _ = stepped(dictionary, mesh=mesh)
    away, _, step = stepped(dictionary, mesh=mesh, offload=True)
    assert step.traced == 1
    jax.tree.map(np.testing.assert_array_equal, here.params, away.params)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.opt_state) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.params)} == {"device"}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(away, [])
        restored = checkpoints.restore(place(mesh, state_of(dictionary)))
    ends = [step(state, jnp.ones((ROWS, D)), jnp.ones(ROWS))[0] for state in (restored, away)]
    jax.tree.map(np.testing.assert_array_equal, *(end.params for end in ends))
    assert int(ends[0].step) == 5


def test_what_cannot_be_cut_is_said():
    dictionary = TopK(k=4).sized(D)
    with pytest.raises(InputError, match="--accumulate 5 does not divide the 24 tokens of a batch on each device"):
        Chunks(rows=5).check(dictionary, 48, data=2)
    with pytest.raises(InputError, match="topk has no step in chunks of features"):
        Chunks(features=2).check(dictionary, 48)
    with pytest.raises(InputError, match="lp has no step in chunks"):
        Chunks(features=2).check(Lp().sized(D), 48)
    with pytest.raises(InputError, match="--feature-chunks 3 does not divide the 32 features"):
        Chunks(features=3).check(L1(n_features=64).sized(D), 48, features=2)
    with pytest.raises(InputError, match="--accumulate 0"):
        Chunks(rows=0)
    with pytest.raises(InputError, match="--mesh data=1"):
        make_step(dictionary, adam(1e-3), Schedule(), 10, 10, offload=True)


def test_uncut_it_is_the_dictionarys_own():
    dictionary = L1().sized(D)
    assert gradient_of(dictionary) == dictionary.value_and_grad
