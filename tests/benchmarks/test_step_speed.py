"""The benchmark of training steps runs, on sizes that say nothing about speed."""

import pytest

from benchmarks.step_speed import Flags, in_turns, main


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["l1", "topk"])
def test_our_steps_are_timed_and_peers_that_are_missing_named(architecture, capsys, monkeypatch):
    missing = {"a peer": lambda flags, x: __import__("no_such_library")}
    monkeypatch.setattr("benchmarks.step_speed.PEERS", {architecture: missing})
    main(Flags(architecture=architecture, width=16, features=64, batch=64, k=4, repeats=2))
    printed = capsys.readouterr().out
    assert "left out: a peer" in printed
    rows = [line for line in printed.splitlines() if line.strip().startswith("sparse_jax")]
    assert len(rows) == 2


def test_contestants_take_turns():
    order = []
    times = in_turns({name: (lambda i, name=name: order.append((name, i))) for name in "ab"}, 2)
    assert order == [("a", 2), ("b", 2), ("b", 3), ("a", 3)]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}
