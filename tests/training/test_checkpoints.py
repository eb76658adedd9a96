"""Checkpoints: every leaf comes back bit for bit, the newest whole one is found, and a resumed run is the same run."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1
from sparse_jax.errors import InputError
from sparse_jax.training import Checkpoints, JsonLines, Schedule, adam, init_state, make_step, read_lines, settings_for

D, TOTAL = 8, 12


def fresh(n_features=20):
    dictionary = L1(n_features=n_features, l1=0.3).sized(D)
    optimisation = adam(1e-2)
    normaliser = Normaliser(jnp.arange(D, dtype=jnp.float32), jnp.array(1.5))
    state = init_state(dictionary, optimisation.transform, normaliser, 3, settings_for(dictionary, optimisation, 4.0))
    return state, make_step(dictionary, optimisation, Schedule(), TOTAL, dead_window=50)


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
