"""Several processes on loopback: they agree, stop together, and none waits for one that failed or died."""

import functools
import re
import signal
import socket
import time

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.training import processes
from sparse_jax.training.processes import Processes
from sparse_jax.training.watchdog import EXIT_OTHER
from tests.loopback import free_address, group
from tests.training.steps_worker import results

FIFTY = ("l1", "topk", "batch-topk", "jump-relu", "fista")
# Seconds in which the others must end: a third of it is what a busy machine may keep a process from running.
TIMEOUT = 20


def counting(folder, n, scenario="", timeout=TIMEOUT, started=None, devices=1):
    address = free_address()
    commands = [
        ["tests.training.process_worker", address, str(n), str(i), str(timeout), scenario] for i in range(started or n)
    ]
    return group(folder, commands, devices)


def wait_until_counting(run):
    for i in range(len(run.processes)):
        run.wait_for("counting", i)


def steps(said):
    return int(re.search(r"stopped after (\d+)", said)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_after_the_same_step(number, tmp_path):
    with counting(tmp_path, 2, devices=2) as run:
        wait_until_counting(run)
        run.processes[1].send_signal(number)
        assert run.codes() == [0, 0], [run.said(i) for i in range(2)]
        said = [run.said(i) for i in range(2)]
        assert steps(said[0]) == steps(said[1]) > 0
        assert [f"made {what}" in each for what, each in zip(("made by the first", "None"), said)] == [True, True]
        assert ["said aloud" in each for each in said] == [True, False]  # process 0 alone prints


def test_a_process_that_is_killed_ends_the_others_which_name_it(tmp_path):
    with counting(tmp_path, 4) as run:
        wait_until_counting(run)
        run.processes[2].kill()
        killed = time.monotonic()
        codes = run.codes()
        assert time.monotonic() - killed < TIMEOUT
        assert codes == [EXIT_OTHER, EXIT_OTHER, -signal.SIGKILL, EXIT_OTHER], [run.said(i) for i in range(4)]
        for i in (0, 1, 3):
            assert "error: process 2 is gone" in run.said(i), run.said(i)
            assert "--resume" in run.said(i)


def test_when_the_first_process_is_killed_the_others_end_too(tmp_path):
    with counting(tmp_path, 3) as run:
        wait_until_counting(run)
        run.processes[0].kill()
        killed = time.monotonic()
        assert run.codes() == [-signal.SIGKILL, EXIT_OTHER, EXIT_OTHER], [run.said(i) for i in range(3)]
        assert time.monotonic() - killed < TIMEOUT
        for i in (1, 2):
            assert "error: process 0 is gone" in run.said(i), run.said(i)


@pytest.mark.parametrize(
    ("scenario", "failed", "code", "shown"),
    [("input", 1, 2, "five is too many"), ("bug", 0, 1, "TypeError: five is no number")],
)
def test_a_process_that_fails_ends_the_others_with_its_message(scenario, failed, code, shown, tmp_path):
    with counting(tmp_path, 2, scenario) as run:
        codes = run.codes(TIMEOUT + 60)
        other = 1 - failed
        assert (codes[failed], codes[other]) == (code, EXIT_OTHER), [run.said(i) for i in range(2)]
        assert f"error: {shown}" in run.said(failed)
        assert ("Traceback" in run.said(failed)) == (scenario == "bug")
        assert re.search(f"error: process {failed} failed, .*: {shown}", run.said(other)), run.said(other)


def test_processes_that_were_given_other_values_say_which(tmp_path):
    with counting(tmp_path, 3, "disagree") as run:
        codes = run.codes()
        assert 0 not in codes
        assert 2 in codes
        assert any("(batch: 64 in process 0, 128 in process 1)" in run.said(i) for i in range(3))


def test_processes_that_do_not_come_are_not_waited_for(tmp_path):
    with counting(tmp_path, 2, timeout=5, started=1) as run:
        assert run.codes(60) == [2], run.said(0)
        assert "could not be joined within --timeout 5 s" in run.said(0), run.said(0)
        assert "are all 2 started" in run.said(0)


@pytest.mark.parametrize("address", ["taken", "192.0.2.1:4000"])
def test_an_address_that_process_0_cannot_listen_at(address):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        if address == "taken":
            address = f"127.0.0.1:{holder.getsockname()[1]}"
        with pytest.raises(InputError, match=f"--coordinator {address}: process 0 cannot listen there"):
            processes.initialise(Processes(True, address, 2, 0))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"coordinator": "127.0.0.1:1"}, "--coordinator without --distributed"),
        ({"process_id": 0}, "--process-id without --distributed"),
        ({"distributed": True, "processes": 2}, "--processes without --coordinator, --process-id: give all three"),
        ({"distributed": True, "timeout": 1.0}, "--timeout 1: give at least 5 seconds"),
        ({"distributed": True, "coordinator": "here", "processes": 2, "process_id": 0}, "here: give host:port"),
        ({"distributed": True, "coordinator": "0.0.0.0:80", "processes": 2, "process_id": 0}, "every address"),
        ({"distributed": True, "coordinator": "[::]:80", "processes": 2, "process_id": 0}, "every address"),
        ({"distributed": True, "coordinator": "a:80", "processes": 2, "process_id": 2}, "give 0 to 1"),
        ({"distributed": True, "coordinator": "a:80", "processes": 0, "process_id": 0}, "--processes 0"),
    ],
)
def test_flags_that_do_not_fit_each_other(given, shown):
    with pytest.raises(InputError, match=re.escape(shown)):
        Processes(**given)


def test_one_process_is_the_first_and_waits_for_nobody():
    processes.initialise(Processes())
    assert not processes.several()
    assert processes.is_first()
    processes.agree({"batch": 1}, 1)
    processes.wait_for_all("nobody")
    assert processes.first_alone(lambda: 7) == 7


@functools.cache
def by_one_device(kinds):
    return results(None, kinds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "devices", "mesh", "kinds"),
    [
        pytest.param(2, 2, "data=2,features=2", FIFTY, marks=pytest.mark.matrix),
        pytest.param(2, 4, "data=4,features=2", FIFTY, marks=pytest.mark.matrix),
        pytest.param(4, 1, "features=4", FIFTY, marks=pytest.mark.matrix),
        pytest.param(4, 1, "data=2,features=2", FIFTY, marks=pytest.mark.matrix),
        (4, 1, "data=2,features=2", ("topk",)),
    ],
)
def test_fifty_steps_by_processes_are_those_of_one_device(n, devices, mesh, kinds, tmp_path):
    address, out = free_address(), tmp_path / "made.npz"
    commands = [["tests.training.steps_worker", address, str(n), str(i), mesh, str(out), *kinds] for i in range(n)]
    with group(tmp_path / "said", commands, devices) as run:
        assert run.codes() == [0] * n, [run.said(i) for i in range(n)]
    ours, theirs = np.load(out), by_one_device(kinds)
    assert set(ours) == set(theirs)
    np.testing.assert_array_equal(ours["codes"] != 0, theirs["codes"] != 0)
    np.testing.assert_allclose(ours["codes"], theirs["codes"], rtol=1e-6, atol=1e-6)
    for name, value in theirs.items():
        error = np.linalg.norm(ours[name] - value)
        assert error <= 1e-5 * np.linalg.norm(value), (name, error)
