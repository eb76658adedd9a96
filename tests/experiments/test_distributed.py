"""The same training by several devices and several processes: the same numbers, one writer, a stop that all obey."""

import dataclasses
import json
import re
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import harvest, scale, sweep, train_sae
from sparse_jax.dictionaries import TopK
from sparse_jax.errors import InputError
from sparse_jax.training import processes
from sparse_jax.training.watchdog import EXIT_OTHER
from tests.experiments.test_harvest import flags as harvest_flags
from tests.experiments.test_harvest import from_store
from tests.experiments.test_sweep import flags as sweep_flags
from tests.experiments.test_train_sae import as_arguments, flags, params
from tests.loopback import free_address, group

# Of a process that only waits for a busy machine none must think that it is gone: that takes a third of this.
PATIENT, TIMEOUT = 90.0, 30.0
# 16 steps of 4 blocks.
SHORT = {"tokens": 2048, "eval_tokens": 256, "statistics_tokens": 1024, "report_features": 0, "log_every": 1,
         "checkpoint_every": 1000}  # fmt: skip


def several(folder, given, n, devices=1, changes=(), timeout=PATIENT, module="train_sae", dictionary=()):
    """The run by `n` processes; `changes`: process -> other flags of its own."""
    address, commands = free_address(), []
    for i in range(n):
        own = dict(changes).get(i, {})
        each = dataclasses.replace(
            given, distributed=True, coordinator=address, processes=n, process_id=i, timeout=timeout, **own
        )
        commands.append([f"experiments.{module}", *as_arguments(each, *dictionary)])
    return group(folder, commands, devices)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_same_run(out, due):
    """Losses and parameters within 1e-5 of a run's, relative to the largest of each."""
    ours, theirs = lines(out), lines(due)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line.get("resampled") for line in ours] == [line.get("resampled") for line in theirs]
    ours, theirs = ([line for line in each if "loss" in line] for each in (ours, theirs))
    for name in ("loss", "reconstruction", "fvu", "l0", "tokens"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-5)
    ours, theirs = params(out), params(due)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


@pytest.fixture(scope="module")
def alone(model, text, tmp_path_factory):
    """One device, one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert train_sae.main(flags(model, text, out, **SHORT)) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,features=4"])
def test_eight_devices_train_what_one_does(mesh, alone, model, text, tmp_path, capsys):
    assert train_sae.main(flags(model, text, tmp_path / "run", mesh=mesh, **SHORT)) == 0
    check_same_run(tmp_path / "run", alone)
    final = [json.loads((out / "metrics.json").read_text()) for out in (tmp_path / "run", alone)]
    assert final[0]["fvu"] == pytest.approx(final[1]["fvu"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "devices", "mesh"), [(2, 2, "data=2,features=2"), pytest.param(4, 1, None, marks=pytest.mark.matrix)]
)
def test_processes_train_what_one_does(n, devices, mesh, alone, model, text, tmp_path):
    out = tmp_path / "run"
    with several(tmp_path / "said", flags(model, text, out, mesh=mesh, **SHORT), n, devices) as run:
        assert run.codes() == [0] * n, [run.said(i) for i in range(n)]
        assert "report:" in run.said(0)
        assert not any("report:" in run.said(i) or "training:" in run.said(i) for i in range(1, n))
    check_same_run(out, alone)
    assert json.loads((out / "config.json").read_text())["flags"]["process_id"] == 0
    assert not list(out.rglob("*.tmp*"))


@pytest.mark.slow
def test_a_signal_to_one_of_two_saves_one_step_and_one_process_goes_on(model, text, alone, tmp_path):
    out = tmp_path / "run"
    given = flags(model, text, out, **SHORT)
    with several(tmp_path / "said", given, 2, 2) as run:
        while not (out / "config.json").exists():
            assert all(process.poll() is None for process in run.processes), [run.said(i) for i in range(2)]
            time.sleep(0.02)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.codes() == [0, 0], [run.said(i) for i in range(2)]
        (saved,) = [int(step) for step in re.findall(r"saved at step (\d+) of 16", run.said(0))]
    assert 0 < saved < 16
    assert [path.name for path in (out / "checkpoints").glob("[0-9]*")] == [str(saved)]
    assert train_sae.main(dataclasses.replace(given, resume=True)) == 0
    check_same_run(out, alone)


@pytest.mark.slow
def test_a_process_that_is_killed_while_training_ends_the_other(model, text, tmp_path):
    out = tmp_path / "run"
    with several(tmp_path / "said", flags(model, text, out, **{**SHORT, "tokens": 1 << 20}), 2, timeout=TIMEOUT) as run:
        while not (out / "metrics.jsonl").exists():
            assert all(process.poll() is None for process in run.processes), [run.said(i) for i in range(2)]
            time.sleep(0.05)
        run.processes[1].kill()
        killed = time.monotonic()
        assert run.codes()[0] == EXIT_OTHER, run.said(0)
        assert time.monotonic() - killed < TIMEOUT
        assert "error: process 1 is gone" in run.said(0)


def test_processes_with_other_flags_are_told_at_the_start(model, text, tmp_path):
    out = tmp_path / "run"
    with several(tmp_path / "said", flags(model, text, out), 2, changes=[(1, {"seed": 3})]) as run:
        codes = run.codes()
        assert 0 not in codes
        assert any("do not agree (seed: 0 in process 0, 3 in process 1)" in run.said(i) for i in range(2))
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"mesh": "data=3"}, "data=3 does not divide the 128 tokens of a batch"),
        ({"mesh": "data=2"}, "asks for 2 devices and there are"),
        ({"mesh": "data=4", "batch": 130, "context": 65, "block_rows": 8}, "data=4 does not divide the 130 tokens"),
        ({"mesh": "model=4"}, "'model=4' is not among data=N"),
        ({"processes": 2}, "--processes without --distributed"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(changes, shown, model, text, tmp_path):
    with pytest.raises(InputError, match=shown):
        train_sae.main(flags(model, text, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_features_that_the_mesh_does_not_divide(model, text, tmp_path):
    given = dataclasses.replace(
        flags(model, text, tmp_path / "run", mesh="data=2,features=4"), dictionary=TopK(n_features=30, k=4)
    )
    with pytest.raises(InputError, match="features=4 does not divide the 30 features"):
        train_sae.main(given)


def test_a_text_with_fewer_rows_than_processes(monkeypatch):
    class Few:
        n_rows = 3

    class Data:
        train = Few()

        def identity(self):
            return {}

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "agree", lambda *_: None)
    monkeypatch.setattr("jax.process_count", lambda: 4)
    with pytest.raises(InputError, match="3 rows to train on and there are 4 processes"):
        scale.check_same_data(train_sae.Flags(dictionary=TopK()), Data())


# What a sweep does besides steps: features started again, members measured on the way, a start of the bias from rows.
SWEEP = {"dead_window": 200, "resample_at": (0.5,), "measure_at": (0.5, 1.0), "seeds": (0, 1), "tokens": 2048,
         "decoder_bias_start": "mean"}  # fmt: skip


def check_same_sweep(out, due):
    """Every line of the log and every parameter of every member."""
    ours, theirs = lines(out), lines(due)
    assert [(line["step"], line.get("member")) for line in ours] == [
        (line["step"], line.get("member")) for line in theirs
    ]
    assert any(line.get("resampled") for line in theirs)
    for one, other in zip(ours, theirs):
        for name in ("loss", "fvu", "resampled", "ce_increase"):
            if name in other:
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (name, other)
    saved = list(due.rglob("params.safetensors"))
    assert saved
    for path in saved:
        found = load_file(out / path.relative_to(due))
        for name, value in load_file(path).items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4 * np.abs(value).max())


@pytest.mark.slow
def test_a_sweep_over_members_and_rows(model, text, tmp_path, capsys):
    """Members stacked along "ensemble", measured on the way, with features started again."""
    one_site = {**SWEEP, "sites": ("resid_post.1",), "sparsities": (2.0,)}
    for mesh in (None, "data=4,ensemble=2"):
        assert sweep.main(sweep_flags(model, text, tmp_path / str(mesh), mesh=mesh, **one_site)) == 0
    check_same_sweep(tmp_path / "data=4,ensemble=2", tmp_path / "None")


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,ensemble=2", "data=4"])
def test_a_sweep_by_two_processes(mesh, model, text, tmp_path, capsys):
    assert sweep.main(sweep_flags(model, text, tmp_path / "alone", **SWEEP)) == 0
    given = sweep_flags(model, text, tmp_path / "run", mesh=mesh, **SWEEP)
    with several(tmp_path / "said", given, 2, 2, module="sweep", dictionary=("topk", "--expansion", "2")) as run:
        assert run.codes() == [0, 0], [run.said(i) for i in range(2)]
    check_same_sweep(tmp_path / "run", tmp_path / "alone")


@pytest.mark.matrix
@pytest.mark.slow
def test_two_processes_read_a_store_start_features_again_and_go_on_as_four(model, text, tmp_path, capsys):
    """The saved state of two processes goes on in four, of which each reads its own part of the store."""
    assert harvest.main(harvest_flags(model, text, tmp_path / "store", sites=("resid_post.0",))) == 0
    # 64 steps of 16 blocks; features start again before the stop and after it.
    more = {**SHORT, "tokens": 8192, "dead_window": 400, "resample_at": (0.25, 0.75),
            "decoder_bias_start": "geometric-median", "checkpoint_every": 10}  # fmt: skip
    more["dictionary"] = TopK(n_features=64, k=2)
    given = from_store(flags(model, text, tmp_path / "alone", **more), tmp_path / "store")
    dictionary = ("topk", "--n-features", "64", "--k", "2")
    assert train_sae.main(given) == 0
    out = tmp_path / "run"
    given = dataclasses.replace(given, out=out)
    with several(tmp_path / "said", given, 2, 2, dictionary=dictionary) as run:
        while len(lines(out) if (out / "metrics.jsonl").exists() else ()) < 20:
            assert all(process.poll() is None for process in run.processes), [run.said(i) for i in range(2)]
            time.sleep(0.02)
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.codes() == [0, 0], [run.said(i) for i in range(2)]
        assert "saved at step" in run.said(0)
    with several(tmp_path / "said_again", dataclasses.replace(given, resume=True), 4, dictionary=dictionary) as run:
        assert run.codes() == [0] * 4, [run.said(i) for i in range(4)]
        assert "resumed at step" in run.said(0)
    check_same_run(out, tmp_path / "alone")
    assert any(line.get("resampled") for line in lines(out))
