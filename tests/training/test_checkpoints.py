"""Checkpoints: every leaf comes back bit for bit, the newest whole one is found, and a resumed run is the same run."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1
from sparse_jax.errors import InputError
from sparse_jax.training import (
    Checkpoints,
    JsonLines,
    Schedule,
    adam,
    checkpoint_files,
    checkpoint_metadata,
    init_state,
    make_step,
    read_lines,
    settings_for,
)
from sparse_jax.training.checkpoint_lock import WriterLock
from sparse_jax.training.checkpoint_tree import digest, snapshot
from sparse_jax.training.ensemble import stack
from sparse_jax.training.mesh import MeshShape, make_mesh, place

D, TOTAL = 8, 12


@functools.cache
def step_of(n_features):
    dictionary, optimisation = L1(n_features=n_features, l1=0.3).sized(D), adam(1e-2)
    return dictionary, optimisation, make_step(dictionary, optimisation, Schedule(), TOTAL, dead_window=50)


def fresh(n_features=20, seed=3):
    dictionary, optimisation, step = step_of(n_features)
    normaliser = Normaliser(jnp.arange(D, dtype=jnp.float32), jnp.array(1.5))
    settings = settings_for(dictionary, optimisation, 4.0)
    return init_state(dictionary, optimisation.transform, normaliser, seed, settings), step


def advance(state, step, until):
    for number in range(int(state.step), until):
        x = jax.random.normal(jax.random.key(number), (32, D))
        state, _ = step(state, x, jnp.ones(32).at[0].set(0))
    return state


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path, stop_at):
    state, step = fresh()
    whole = advance(state, step, TOTAL)
    state, step = fresh()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(advance(state, step, stop_at))
    other, step = fresh()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == stop_at
        resumed = checkpoints.restore(other)
    assert int(resumed.opt_state[0].count) == stop_at
    assert_same(advance(resumed, step, TOTAL), whole)


def test_every_leaf_comes_back(tmp_path):
    state, step = fresh()
    state = advance(state, step, 3)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
        like = fresh()[0]
        nothing = jax.tree.map(jnp.zeros_like, like.settings)
        assert_same(checkpoints.restore(replace(like, settings=nothing)), state)


def test_what_other_libraries_lose_on_resume_is_kept(tmp_path):
    """Normaliser, controller, ages, the optimiser's count and moments, rows seen, the place in the data."""
    state, step = fresh()
    state = advance(state, step, 5)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
    start = fresh(seed=4)[0]
    blank = Normaliser(jnp.zeros(D), jnp.array(1.0))
    with Checkpoints(tmp_path / "c") as checkpoints:
        found = checkpoints.restore(replace(start, normaliser=blank))
    np.testing.assert_array_equal(found.normaliser.centre, np.arange(D))
    assert float(found.normaliser.scale) == 1.5
    assert int(found.step) == 5
    assert int(found.opt_state[0].count) == 5
    assert found.rows_seen.tolist() == [0, 5 * 31]
    for name in ("age", "control", "key"):
        assert_same(getattr(found, name), getattr(state, name))
        with pytest.raises(AssertionError):  # it had moved: a run that starts again is another
            assert_same(getattr(found, name), getattr(start, name))
    for name, moment in found.opt_state[0].mu.items():
        assert np.abs(moment).max() > 0, name
        np.testing.assert_array_equal(moment, state.opt_state[0].mu[name])


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_steps_that_are_taken_during_a_save_do_not_change_it(tmp_path):
    state, step = fresh(n_features=4000)
    state = advance(state, step, 3)
    due = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
        later = advance(state, step, 6)
        checkpoints.save(later)
        advance(later, step, 9)
        assert_same(checkpoints.restore(fresh(n_features=4000)[0], step=3), due)
        assert checkpoints.latest() == 6


def test_a_snapshot_shares_no_buffer_with_the_state():
    """On a CPU; NumPy arrays that Orbax makes there are views."""
    state = fresh()[0]
    ours = {
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(replace(state, key=jax.random.key_data(state.key)))
    }
    assert not ours & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(snapshot(state))}
    assert not state.params["W_dec"].is_deleted()


@pytest.fixture
def full_disk(monkeypatch):
    """The last file of a checkpoint cannot be written: in the background, while the folder has its temporary name."""

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_sizes", fail)


@pytest.mark.parametrize("when", ["at the next save", "at the end", "when asked for the latest", "at once"])
def test_what_fails_in_the_background_is_raised(tmp_path, full_disk, when):
    state, step = fresh()
    checkpoints = Checkpoints(tmp_path / "c", background=when != "at once")
    if when != "at once":
        checkpoints.save(state)
    then = {
        "at the next save": lambda: checkpoints.save(advance(state, step, 1)),
        "at the end": lambda: checkpoints.__exit__(None, None, None),
        "when asked for the latest": checkpoints.latest,
        "at once": lambda: checkpoints.save(state),
    }
    with pytest.raises(InputError, match=r"checkpoint 0 could not be written \(OSError: .*No space left on device"):
        then[when]()
    if when != "at the end":
        assert checkpoints.latest() is None
    checkpoints.__exit__(None, None, None)
    assert steps_in(tmp_path / "c") == []


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        shutil.rmtree(tmp_path / "c")
        (tmp_path / "c").write_text("no folder")
        with pytest.raises(InputError, match="checkpoint 0 could not be written"):
            checkpoints.save(fresh()[0])


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, full_disk):
    said = []

    def run():
        with Checkpoints(tmp_path / "c", say=said.append) as checkpoints:
            checkpoints.save(fresh()[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    (line,) = said
    assert line.startswith("also: checkpoint 0 could not be written")


@pytest.mark.parametrize(
    ("best", "kept"), [("fvu", [2, 4, 5]), ("fvu:lowest", [2, 4, 5]), ("fvu:highest", [3, 4, 5]), (None, [4, 5])]
)
def test_the_best_stays_beside_the_newest(tmp_path, best, kept):
    """The figure of step 1 is no number; step 2 has the lowest, step 3 the highest; of two members the mean counts."""
    figures = {1: (np.nan, np.nan), 2: (0.5, 0.1), 3: (0.4, 0.8), 4: (0.5, 0.2), 5: (0.4, 0.4)}
    state, step = fresh()
    for until, pair in figures.items():
        # Opened anew each time: what the best was is on disk.
        with Checkpoints(tmp_path / "c", keep=2, best=best) as checkpoints:
            state = advance(state, step, until)
            checkpoints.save(state, [{"loss": 1.0, "fvu": value} for value in pair])
    assert steps_in(tmp_path / "c") == kept
    with Checkpoints(tmp_path / "c", best=best) as checkpoints:
        assert checkpoints.best() == (kept[0] if best else None)
        assert checkpoints.latest() == 5
        if best:
            assert int(checkpoints.restore(fresh()[0], step=checkpoints.best()).step) == kept[0]


def test_a_metric_that_is_not_there_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c", best="fuv") as checkpoints, pytest.raises(InputError, match=r"'fuv'.*fvu, loss"):
        checkpoints.save(fresh()[0], [{"loss": 1.0, "fvu": 0.5}])
    for best in ("fvu:least", "", ":highest"):
        with pytest.raises(InputError, match="NAME:highest"):
            Checkpoints(tmp_path / "d", best=best)
    with pytest.raises(InputError, match="at least 1"):
        Checkpoints(tmp_path / "d", keep=0)
    assert not (tmp_path / "d").exists()


def test_only_the_latest_are_kept(tmp_path):
    state, step = fresh()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for until in (1, 2, 3, 4):
            state = advance(state, step, until)
            checkpoints.save(state)
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == ["3", "4"]


def test_a_checkpoint_that_a_kill_left_unfinished_is_passed_over(tmp_path):
    state, step = fresh()
    state = advance(state, step, 2)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
    # What Orbax has on disk in the middle of a save: the temporary folder, not yet renamed.
    shutil.copytree(tmp_path / "c" / "2", tmp_path / "c" / "7.orbax-checkpoint-tmp-1")
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 2
        assert_same(checkpoints.restore(fresh()[0]), state)


def largest(checkpoint):
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def emptied(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGE = {
    "an array file cut short": (lambda c: cut(largest(c)), "bytes of"),
    "an array file gone": (lambda c: largest(c).unlink(), "is missing"),
    "a flipped bit on disk": (lambda c: flip(largest(c)), "is not what was saved|Error"),
    "a file cut short, no sizes": (lambda c: (cut(largest(c)), (c / "sizes.json").unlink()), "Error"),
    "sizes cut short": (lambda c: cut(c / "sizes.json"), "sizes.json is damaged"),
    "metadata gone": (lambda c: (c / "_CHECKPOINT_METADATA").unlink(), "metadata are missing or damaged"),
    "metadata cut short": (lambda c: cut(c / "_CHECKPOINT_METADATA"), "metadata are missing or damaged"),
    "nothing but a folder": (emptied, "Error"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, case, caplog):
    harm, words = DAMAGE[case]
    folder, said = tmp_path / "c", []
    state, step = fresh()
    with Checkpoints(folder) as checkpoints:
        state = advance(state, step, 2)
        due = jax.tree.map(jnp.copy, state)
        checkpoints.save(state)
        whole = advance(state, step, 4)
        checkpoints.save(whole)
    harm(folder / "4")
    with Checkpoints(folder, keep=1, say=said.append) as checkpoints:
        assert checkpoints.latest() == 4
        found = checkpoints.restore(fresh()[0])
        assert_same(found, due)
        assert checkpoints.latest() == 2
        # The run comes to that step again, and saves it.
        checkpoints.save(advance(found, step, 4))
    (line,) = said
    assert line.startswith("checkpoint 4 is damaged (")
    assert line.endswith("): set aside as 4.damaged, going on from 2")
    assert any(word in line for word in words.split("|")), line
    assert steps_in(folder) == [4]
    with Checkpoints(folder, say=said.append) as checkpoints:
        assert_same(checkpoints.restore(fresh()[0]), whole)
    assert len(said) == 1


def test_a_bit_that_flipped_unnoticed_is_found_by_the_digest(tmp_path, monkeypatch):
    """Orbax returns such an array without a word."""
    said = []
    state, step = fresh()
    with Checkpoints(tmp_path / "c", say=said.append) as checkpoints:
        state = advance(state, step, 2)
        due = jax.tree.map(jnp.copy, state)
        checkpoints.save(state)
        checkpoints.save(advance(state, step, 4))
        checkpoints.wait()
        load = checkpoints._checkpointer.load

        def flipped(step, wanted):
            stored = load(step, wanted)
            if step == 4:
                params = stored["arrays"]["params"]
                values = np.array(params["W_dec"])
                values.view(np.uint32)[3, 5] ^= 1
                params["W_dec"] = jnp.array(values)
            return stored

        monkeypatch.setattr(type(checkpoints._checkpointer), "load", lambda self, *given: flipped(*given))
        assert_same(checkpoints.restore(fresh()[0]), due)
    assert said == [
        "checkpoint 4 is damaged (params/W_dec is not what was saved): set aside as 4.damaged, going on from 2"
    ]


def test_where_every_checkpoint_is_damaged_the_run_does_not_begin_anew_unasked(tmp_path):
    state, step = fresh()
    with Checkpoints(tmp_path / "c") as checkpoints:
        for until in (1, 2):
            state = advance(state, step, until)
            checkpoints.save(state)
    for number in ("1", "2"):
        cut(largest(tmp_path / "c" / number))
    words = r"no whole checkpoint in .*2: .*bytes of.*1: .*bytes of.*begin anew"
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(InputError, match=words):
        checkpoints.restore(fresh()[0])
    assert steps_in(tmp_path / "c") == [1, 2]


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    words = rf"is being written by process {os.getpid()} on .*another folder"
    with Checkpoints(tmp_path / "c"), pytest.raises(InputError, match=words):
        Checkpoints(tmp_path / "c")
    with Checkpoints(tmp_path / "c"):  # let go of
        pass
    assert not list((tmp_path / "c").iterdir())


HOLDER = """
import sys, time
from pathlib import Path
from sparse_jax.training.checkpoint_lock import WriterLock
lock = WriterLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_writer_locks_nobody_out(tmp_path, number):
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path / "c")]
    process = subprocess.Popen(arguments, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"is being written by process {process.pid} on "):
            WriterLock(tmp_path / "c")
    finally:
        process.send_signal(number)
        process.communicate(timeout=60)
    assert (tmp_path / "c" / "writer.lock").exists()
    with WriterLock(tmp_path / "c"):
        assert f"process {os.getpid()} on " in (tmp_path / "c" / "writer.lock").read_text()


ABOUT = {"config": {"batch": 32, "out": Path("a")}, "identity": {"text": "a.txt", "site": {"weights_sha256": "0" * 64}}}


def test_what_lies_beside_the_state_and_is_compared(tmp_path, monkeypatch):
    said = []
    state, step = fresh()
    with Checkpoints(tmp_path / "c", **ABOUT) as checkpoints:
        checkpoints.save(advance(state, step, 3))
    saved = checkpoints._checkpointer.metadata(3).custom_metadata
    assert saved["config"] == {"batch": 32, "out": "a"}
    assert saved["identity"] == ABOUT["identity"]
    assert (saved["step"], saved["mesh"], saved["processes"]) == (3, None, 1)
    assert {"jax", "numpy", "orbax-checkpoint", "sparse_jax"} <= set(saved["versions"])
    other = {"text": "b.txt", "site": {"weights_sha256": "1" * 64}}
    words = r"another model or text \(text: 'a.txt' there, 'b.txt' here; site.weights"
    with Checkpoints(tmp_path / "c", identity=other) as checkpoints, pytest.raises(InputError, match=words):
        checkpoints.restore(fresh()[0])
    monkeypatch.setattr(checkpoint_metadata, "versions", lambda: {**saved["versions"], "numpy": "9.9"})
    with Checkpoints(tmp_path / "c", **ABOUT, say=said.append) as checkpoints:
        checkpoints.restore(fresh()[0])
    assert len(said) == 1
    assert f"numpy {np.__version__} there, 9.9 here" in said[0]
    monkeypatch.setattr(checkpoint_metadata, "FORMAT", 2)
    with (
        Checkpoints(tmp_path / "c", **ABOUT) as checkpoints,
        pytest.raises(InputError, match=r"has format 1.* reads 2"),
    ):
        checkpoints.restore(fresh()[0])


def mesh_of(**axes):
    shape = MeshShape(**axes)
    return make_mesh(shape, jax.devices()[: shape.size])


FOUR, TWO, BOTH = {"data": 4}, {"features": 2}, {"data": 2, "features": 2}


@pytest.mark.parametrize(
    ("there", "here"), [({}, BOTH), (BOTH, {}), (FOUR, {"features": 4}), (BOTH, TWO), (TWO, BOTH), (BOTH, BOTH)]
)
def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path, there, here):
    """Bit for bit, laid out like the state that is given; {} is one device without a mesh."""
    state, step = fresh()
    state = advance(state, step, 3)
    due = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(place(mesh_of(**there), state) if there else state)
    like = place(mesh_of(**here), fresh()[0]) if here else fresh()[0]
    with Checkpoints(tmp_path / "c") as checkpoints:
        found = checkpoints.restore(like)
        saved = checkpoints._checkpointer.metadata(3).custom_metadata["mesh"]
    assert saved == ({"data": 1, "features": 1, "ensemble": 1} | there if there else None)
    assert_same(found, due)
    for ours, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert ours.sharding == leaf.sharding
    parts = here.get("features", 1)
    assert found.params["W_enc"].addressable_shards[0].data.shape == (D, 20 // parts)


def test_members_over_a_mesh_are_those_of_a_loop(tmp_path):
    mesh = mesh_of(ensemble=2, features=2)
    members = tuple(advance(*fresh(seed=seed), 3) for seed in (1, 2))
    loop = tuple(fresh(seed=seed)[0] for seed in (5, 6))
    stacked = place(mesh, stack(members), members=True)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save((stacked,))
        assert_same(checkpoints.restore((loop,)), (members,))
        found = checkpoints.restore((place(mesh, stack(loop), members=True),))
    assert_same(found, (stacked,))
    assert found[0].params["W_dec"].addressable_shards[0].data.shape == (1, 10, D)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_digest_tells_values_and_their_places_and_is_the_same_on_every_mesh(dtype):
    x = jnp.array(np.random.default_rng(0).integers(0, 2, (4, 6)).astype(np.float32)).astype(dtype)
    of = jax.jit(digest)
    due = int(of(x))
    changed = x.at[2, 3].set((x[2, 3] == jnp.zeros((), dtype)).astype(dtype))
    turned = jnp.roll(x, 1, axis=1)
    assert bool((turned != x).any())
    assert len({due, int(of(changed)), int(of(turned)), int(of(x.T)), int(of(jnp.zeros_like(x)))}) == 5
    for axes in ({"data": 4}, {"data": 2, "features": 2}):
        spec = jax.sharding.PartitionSpec("data", "features")
        assert int(of(jax.device_put(x, jax.sharding.NamedSharding(mesh_of(**axes), spec)))) == due


def test_a_digest_of_64_bits_a_value(x64):
    x = jnp.arange(5, dtype=jnp.float64)
    assert int(digest(x)) != int(digest(x.at[2].add(1e-14)))


def test_another_size_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(fresh()[0])
        with pytest.raises(InputError, match=r"does not fit.*age.*\(20,\) there, \(24,\) here"):
            checkpoints.restore(fresh(n_features=24)[0])


def test_nothing_to_resume_is_said(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(InputError, match="no checkpoint"):
        checkpoints.restore(fresh()[0])


def test_log_lines_of_steps_that_are_taken_again_are_dropped(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    for step in (10, 20, 30):
        lines.write({"step": step, "loss": float("nan") if step == 20 else 1.0})
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    lines.truncate_after(20)
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": None}]
