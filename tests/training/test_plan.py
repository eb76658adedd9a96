"""The plan: by hand, and beside what JAX lays out and compiles for eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, BatchTopK, Fista, JumpReLU, Matryoshka, TopK
from sparse_jax.errors import InputError
from sparse_jax.lm.families.llama import LlamaConfig
from sparse_jax.lm.load import random_model
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for
from sparse_jax.training.chips import CHIPS, Chip, chip_of
from sparse_jax.training.mesh import MeshShape, make_mesh, place
from sparse_jax.training.plan import Work, advice, plan
from sparse_jax.training.plan_bytes import gradient_bytes, model_bytes, state_bytes, step_bytes
from sparse_jax.training.plan_traffic import collectives, selected_entries, step_flops

CONFIG = LlamaConfig(3, 16, 48, 4, 2, 4, 64, 32)
SLOW = Chip("slow", 1e6, 1e6, 1e6, 1e6, 1e3)


def state_of(dictionary):
    optimisation = adam(1e-3)
    normaliser = Normaliser(jnp.zeros(dictionary.d_in), jnp.ones(()))
    return init_state(dictionary, optimisation.transform, normaliser, 0, settings_for(dictionary, optimisation))


def test_bytes_by_hand():
    """d 4, n 16, features=2: 8 features on a device."""
    work = Work(L1(n_features=16).sized(4), MeshShape(data=2, features=2), batch=64, block_rows=16, context=8)
    parameters = 4 * (2 * 4 * 8 + 8 + 4)  # two matrices, b_enc, b_dec (whole)
    found = state_bytes(work)
    assert found["params"] == parameters
    assert found["opt_state"] == 2 * parameters + 4  # two moments and a count
    assert gradient_bytes(work) == parameters
    # 32 rows, 8 features: 3 arrays and a set of gradients; the reconstruction, its error, its gradient.
    assert step_bytes(work) == 3 * 4 * 32 * 8 + parameters + 3 * 4 * 32 * 4
    made = plan(work, SLOW)
    assert made.of("batch") == 4 * 32 * 5
    assert made.of("block of activations") == 2 * 4 * (16 * 8 // 2) * 4
    assert made.of("parameters") == parameters
    assert made.bytes == sum(part.bytes for part in made.memory)


def test_operations_and_what_is_sent_by_hand():
    """d 4, n 64, 16 rows and 32 features on a device."""
    mesh = MeshShape(data=4, features=2)
    product = 2 * 16 * 4 * 32
    work = Work(L1(n_features=64).sized(4), mesh, batch=64)
    assert step_flops(work) == (5 * product, 5 * product)
    assert step_flops(dataclasses.replace(work, feature_chunks=2)) == (6 * product, 6 * product)
    of_topk = Work(TopK(n_features=64, k=2).sized(4), mesh, batch=64)
    assert step_flops(of_topk) == (5 * product, 10 * product)
    assert step_flops(Work(Fista(n_features=64).sized(4), mesh, batch=64)) is None
    gradients = 4 * (2 * 4 * 32 + 32 + 4)
    sent = {each.what: (each.kind, each.axis, each.sent) for each in collectives(of_topk)}
    assert sent["gradients"] == ("all-reduce", "data", 2 * 3 / 4 * gradients)
    assert sent["partial reconstructions"] == ("all-reduce", "features", 2 * 1 / 2 * 4 * 16 * 4)
    assert sent["candidates"] == ("all-gather", "features", 1 / 2 * 4 * 16 * 2 * 2)  # two devices' two largest
    assert "a block's shuffle" not in sent  # there is no model: activations come from a store
    assert not collectives(Work(of_topk.dictionary, batch=64))
    # Too many candidates: the threshold is found by counts.
    wide = {each.what for each in collectives(Work(TopK(n_features=64, k=20).sized(4), mesh, batch=64))}
    assert "candidates" not in wide
    assert "counts of the selection" in wide
    accumulated = {each.what: each.sent for each in collectives(dataclasses.replace(of_topk, accumulate=4))}
    assert accumulated["gradients"] == 4 * sent["gradients"][2]


def test_seconds_are_a_roofline_by_hand():
    work = Work(L1(n_features=64).sized(4), MeshShape(data=2), batch=2048)
    made = plan(work, dataclasses.replace(SLOW, bandwidth=1e30, link=1e30))
    assert made.seconds == pytest.approx(5 * 2 * 1024 * 4 * 64 / 1e6)
    assert made.tokens_per_second == pytest.approx(2048 / made.seconds)
    bound = plan(work, dataclasses.replace(SLOW, flops=1e30, flops_float32=1e30, link=1e30))
    gradients, arrays = gradient_bytes(work), 4 * 1024 * 64
    assert bound.seconds == pytest.approx((1.5 * gradients + 8 * gradients + 2 * 3 * arrays) / 1e6)
    sending = plan(work, dataclasses.replace(SLOW, flops=1e30, flops_float32=1e30, bandwidth=1e30))
    assert sending.seconds == pytest.approx((gradients + 8 * 64) / 1e3)
    half = dataclasses.replace(SLOW, flops_float32=5e5, bandwidth=1e30, link=1e30)
    assert plan(work, half).seconds == pytest.approx(2 * made.seconds)
    assert SLOW.shared(4).flops == SLOW.flops / 4


def test_a_language_model_takes_what_it_has():
    """Parameters to the byte; twice the devices take half of what is divided."""
    model = jax.eval_shape(lambda: random_model(CONFIG, jax.random.key(0)))
    work = Work(L1(n_features=64).sized(16), config=CONFIG, site_layer=1, block_rows=8, context=16)
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(model.params))
    assert model_bytes(work) == whole
    halved = model_bytes(dataclasses.replace(work, mesh=MeshShape(features=2)))
    norms = 4 * 16 * (2 * CONFIG.n_layers + 1)  # the only parameters that are not divided
    assert halved == (whole - norms) / 2 + norms
    deeper = dataclasses.replace(work, site_layer=2)
    assert plan(deeper, SLOW).model_seconds > plan(work, SLOW).model_seconds
    stored = plan(dataclasses.replace(work, stored=True), SLOW)
    assert (stored.model_seconds, stored.of("language model")) == (0, whole)


@pytest.mark.parametrize("kind", [L1, BatchTopK, JumpReLU, Matryoshka], ids=lambda kind: kind.kind)
def test_the_state_has_the_planned_bytes_on_every_device(kind):
    dictionary, shape = kind(n_features=64).sized(8), MeshShape(data=2, features=4)
    state = place(make_mesh(shape, jax.devices()[:8]), state_of(dictionary))
    planned = state_bytes(Work(dictionary, shape, batch=64))
    for device in jax.devices()[:8]:
        for name in ("params", "opt_state"):
            shards = [
                shard.data.nbytes
                for leaf in jax.tree.leaves(getattr(state, name))
                for shard in leaf.addressable_shards
                if shard.device == device
            ]
            assert sum(shards) == planned[name]


@pytest.mark.parametrize(
    ("dictionary", "shape"),
    [
        (L1(n_features=4096).sized(128), "data=2,features=4"),
        (TopK(n_features=2048, k=8).sized(64), "data=4,features=2"),
    ],
    ids=["l1", "topk"],
)
def test_compiled_steps_are_near_the_plan(dictionary, shape):
    """Operations within a tenth (XLA counts AuxK's branch, and what is no product too), memory within a third."""
    shape, batch = MeshShape.parse(shape), 1024
    work = Work(dictionary, shape, batch=batch)
    step = make_step(dictionary, adam(1e-3), Schedule(), 100, 10**6, mesh=make_mesh(shape, jax.devices()[:8]))
    rows = jax.ShapeDtypeStruct((batch, dictionary.d_in), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.float32)
    compiled = step.lower(jax.eval_shape(lambda: state_of(dictionary)), *rows).compile()
    _, flops = step_flops(work)
    assert flops <= compiled.cost_analysis()["flops"] <= 1.1 * flops
    memory, made = compiled.memory_analysis(), plan(work, CHIPS["v5e"])
    arguments = sum(made.of(name) for name in ("parameters", "learner state", "other state", "batch"))
    assert memory.argument_size_in_bytes == pytest.approx(arguments, rel=1e-3)
    assert 3 / 4 <= made.of("while it steps") / memory.temp_size_in_bytes <= 4 / 3


def test_what_does_not_fit_is_told_what_would():
    work = Work(L1(n_features=2**14).sized(256), MeshShape(data=8), batch=2**14, block_rows=64, context=256)
    made = plan(work, Chip("small", 1e12, 1e12, 0.5e9, 1e9, 1e9))
    assert not made.fits
    found = dict(advice(made))
    assert "more devices: 16 as data=8,features=2" in found
    assert "--accumulate 4" in found
    assert all(each.fits for each in found.values())
    # The least change of its kind.
    assert not plan(dataclasses.replace(work, accumulate=2), made.chip).fits
    assert plan(work, CHIPS["v5e"]).fits
    hopeless = plan(dataclasses.replace(work, mesh=MeshShape()), Chip("none", 1e12, 1e12, 1e3, 1e9, 1e9))
    assert advice(hopeless) == []


def test_moments_on_the_host_leave_the_device():
    work = Work(L1(n_features=2**12).sized(64), batch=2**12)
    here, away = plan(work, CHIPS["v5e"]), plan(dataclasses.replace(work, offload=True), CHIPS["v5e"])
    assert away.host == here.of("learner state")
    assert away.bytes == here.bytes - here.of("learner state")  # codes are larger than moments and gradients


def test_selections_are_counted_where_they_are_made():
    alone = Work(TopK(n_features=64, k=2).sized(4), batch=64)
    assert selected_entries(alone) == 64 * 64
    assert selected_entries(Work(BatchTopK(n_features=64, k=2).sized(4), MeshShape(features=2), batch=64)) == 0
    assert selected_entries(Work(L1(n_features=64).sized(4), batch=64)) == 0


def test_bad_input():
    dictionary = L1(n_features=64).sized(4)
    with pytest.raises(InputError, match="features=3 does not divide the 64 features"):
        Work(dictionary, MeshShape(features=3), batch=64)
    with pytest.raises(InputError, match="accumulate 3"):
        Work(dictionary, MeshShape(data=2), batch=64, accumulate=3)
    with pytest.raises(InputError, match="feature chunks 5"):
        Work(dictionary, batch=64, feature_chunks=5)
    with pytest.raises(InputError, match="without a size"):
        Work(L1())
    with pytest.raises(InputError, match="v5e"):
        chip_of("v9")


def test_the_table_of_chips_is_in_units_of_one():
    assert CHIPS["v5e"].link == 1e11  # 400 GB/s both ways, 200 one way, over two axes
    assert CHIPS["v5p"].link == 2e11
    assert all(1e14 < chip.flops < 1e15 for chip in CHIPS.values())
    assert all(10e9 < chip.memory < 100e9 for chip in CHIPS.values())
    np.testing.assert_array_less([chip.link for chip in CHIPS.values()], [chip.bandwidth for chip in CHIPS.values()])
