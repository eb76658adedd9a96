"""The benchmark of solvers runs, on sizes that say nothing about speed, and its solvers solve the same problem."""

import json
import warnings

import numpy as np
import pytest

from benchmarks import sparse_coding_data, sparse_coding_peers
from benchmarks.sparse_coding import ACTIVE, Flags, in_turns, main, with_l0
from benchmarks.sparse_coding_peers import MAKERS, TOLERANCE, Contestant
from sparse_jax.errors import InputError

WIDTH, N, ROWS, L0 = 16, 64, 32, 4.0


def _problem():
    x, W = sparse_coding_data.gaussian(WIDTH, N)
    return with_l0(np.ascontiguousarray(x[:ROWS]), W, L0)


def _flags(folder, **changed):
    sizes = {"data": ("gaussian",), "widths": (WIDTH,), "features": (N,), "l0s": (L0,), "rows": ROWS}
    return Flags(**sizes, repeats=2, slow_repeats=1, results=folder / "results.json", **changed)


def test_a_cell_of_our_solvers(tmp_path, capsys):
    flags = _flags(tmp_path, solvers=("fista",))
    main(flags)
    main(flags)
    cells = json.loads(flags.results.read_text())["cells"]
    assert len(cells) == 1, "a cell that is run again takes the place of the earlier one"
    solvers = cells[0]["solvers"]
    assert set(solvers) == {"sparse_jax lasso", "sparse_jax lasso, median", "sparse_jax fista_until"}
    assert all(each["gap_median"] <= TOLERANCE for each in solvers.values())
    assert solvers["sparse_jax lasso"]["gap_worst"] <= 1.01 * TOLERANCE
    assert solvers["sparse_jax fista_until"]["gap_worst"] <= 1.01 * TOLERANCE
    assert abs(solvers["sparse_jax lasso"]["l0"] - L0) < 0.2
    assert {name: len(each["seconds"]) for name, each in solvers.items()}["sparse_jax lasso"] == 2
    assert solvers["sparse_jax lasso"]["ratio"] == 1
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.strip().startswith("sparse_jax")]) == 6


def test_a_peer_that_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MAKERS, "spams", lambda *_: __import__("no_such_library"))
    main(_flags(tmp_path, solvers=("spams",)))
    assert "left out: spams (No module named 'no_such_library')" in capsys.readouterr().out


def test_gaps_are_those_of_float64():
    problem = _problem()
    codes = np.zeros((ROWS, N), np.float32)
    # Of codes 0 the residual is x, and the best multiple of it is as long as the most similar atom allows.
    x, W = problem.x.astype(np.float64), problem.W.astype(np.float64)
    s = np.minimum(1, problem.penalty / (2 * np.maximum((x @ W.T).max(1), 1e-300)))
    np.testing.assert_allclose(problem.gaps(codes), 1 - (2 * s - s * s), rtol=1e-12, atol=1e-15)


def test_lambda_is_for_the_wished_l0():
    problem = _problem()
    assert abs(problem.l0 - L0) < 0.2
    contestant = sparse_coding_peers.ours(problem, 1, ROWS)["sparse_jax lasso"]
    codes = contestant.codes(contestant.run(contestant.prepare()))
    assert np.mean(np.sum(codes > ACTIVE, axis=1)) == pytest.approx(problem.l0)
    with pytest.raises(InputError, match="at the least lambda"):
        with_l0(problem.x, problem.W, 60.0)


def test_slow_ones_are_scaled_up_and_take_part_less_often():
    order = []

    def contestant(name, **options):
        return Contestant(lambda _: order.append(name), prepare=lambda: order.append(f"before {name}"), **options)

    times = in_turns({"a": contestant("a"), "b": contestant("b", rows=1, slow=True)}, 10**6, 2, 1)
    assert order == ["before a", "a", "before b", "b", "before a", "a"]
    assert len(times["a"]) == 2
    assert len(times["b"]) == 1
    assert times["b"][0] > 100 * max(times["a"])


@pytest.mark.slow
def test_real_rows_are_made_once_and_read_again(tmp_path, monkeypatch):
    recipe = sparse_coding_data.Recipe(block_rows=8, steps=2, batch=512)
    x, W = sparse_coding_data.real(512, 1024, tmp_path, recipe)
    np.testing.assert_allclose(np.linalg.norm(W, axis=1), 1, rtol=1e-5)
    # Both sites have the same power, and it is d.
    for half in (x[:, :256], x[:, 256:]):
        assert np.mean(np.sum(half**2, axis=1)) == pytest.approx(256, rel=0.2)
    monkeypatch.setattr(sparse_coding_data, "activations", None)
    again = sparse_coding_data.real(512, 1024, tmp_path, recipe)
    np.testing.assert_array_equal(again[0], x)
    np.testing.assert_array_equal(again[1], W)
    with pytest.raises(TypeError):  # of another recipe: made anew
        sparse_coding_data.real(512, 1024, tmp_path, sparse_coding_data.Recipe(block_rows=8, steps=3, batch=512))
    with pytest.raises(InputError, match="--widths 16"):
        sparse_coding_data.real(16, 1024, tmp_path)


@pytest.mark.torch
def test_all_solvers_find_the_same_objective():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say while they are imported is their own affair
        for name in ("torch", "sklearn.decomposition", "spams"):
            pytest.importorskip(name)
    problem = _problem()
    contestants = {}
    for make in MAKERS.values():
        contestants |= make(problem, 1, ROWS)
    objectives = {}
    for name, contestant in contestants.items():
        codes = np.asarray(contestant.codes(contestant.run(contestant.prepare()))).astype(np.float64)
        assert codes.shape == (ROWS, N)
        if contestant.solves:
            assert codes.min() > -1e-6, name
            left = problem.x - codes @ problem.W
            objectives[name] = np.sum(left**2, axis=1) + problem.penalty * codes.sum(1)
            assert np.median(problem.gaps(codes)) <= TOLERANCE, name
    assert set(contestants) - set(objectives) == {"scikit-learn omp"}
    exact = objectives["scikit-learn lasso_cd"]
    for name, found in objectives.items():
        assert np.median(found / exact - 1) == pytest.approx(0, abs=TOLERANCE), name
        if name not in ("sparse_jax lasso, median", "PyTorch FISTA"):  # those promise the median alone
            np.testing.assert_allclose(found, exact, rtol=TOLERANCE, err_msg=name)
