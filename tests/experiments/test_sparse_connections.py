"""The whole experiment on a tiny model: what it leaves behind, against its own parts; what it refuses; going on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments import connecting, connecting_codes, sparse_connections
from experiments.sparse_connections import Flags
from experiments.sparse_connections_pages import chosen_targets
from sparse_jax.connectors.connector_files import load_connector
from sparse_jax.dictionaries import read_card
from sparse_jax.errors import InputError
from tests.experiments.conftest import connected_sites, write_model

pytestmark = pytest.mark.slow
SITES = tuple(f"{name}.{layer}" for layer in (0, 1) for name in ("resid_pre", "mlp_out"))


@pytest.fixture(scope="module")
def dictionaries(model, text, tmp_path_factory):
    return connected_sites(model, text, tmp_path_factory.mktemp("runs") / "sweep", SITES)


def given(dictionaries, out, **changes) -> Flags:
    fields = {
        "run": dictionaries, "layers": (1,), "tokens": 4096, "eval_tokens": 2048, "points": 4, "mlp_width": 8,
        "mlp_batch": 256, "splice_tokens": 512, "checks": 40, "pages": 3, "ridges": (1e-3, 1e-1), "sample": 5,
        "out": out,
    }  # fmt: skip
    return Flags(**{**fields, **changes})


@pytest.fixture(scope="module")
def finished(dictionaries, tmp_path_factory):
    flags = given(
        dictionaries,
        tmp_path_factory.mktemp("runs") / "connections",
        all_layers=True,
        layers=(),
        jacobian_support=True,
        jacobian_tokens=512,
    )
    assert sparse_connections.main(flags) == 0
    return flags


def read(path):
    return json.loads(path.read_text())


def test_what_a_run_leaves(finished):
    final = read(finished.out / "metrics.json")
    assert set(final["layers"]) == {"0", "1"}
    for layer, figures in final["layers"].items():
        assert figures["inputs"] == [f"resid_pre.{layer}"]
        rows = read(finished.out / "layers" / layer / "targets.json")
        assert len(rows) == figures["targets"] == 32
        alive = [row for row in rows if row["alive"]]
        assert len(alive) == figures["alive"] > 5
        assert sum(each["targets"] for each in figures["labels"].values()) == len(alive)
        for kind in ("dense", "sparse", "mlp"):
            mean = np.mean([row[f"r2_{kind}"] for row in alive])
            np.testing.assert_allclose(figures["r2"][kind]["mean"], mean)
        assert figures["nonzeros_at_90"]["sampled"] == 5
        assert figures["nonzeros_at_90"]["refit"]["alive"] == 5
        assert set(figures["spliced"]["rows"]) == {"zero", "mean", "reconstruction", "dense", "sparse", "mlp"}
        path = figures["spliced"]["path"]
        assert 1 < len(path) <= 3
        assert [each["alpha"] for each in path] == sorted({each["alpha"] for each in path}, reverse=True)
        assert path[0]["nonzeros"]["mean"] < path[-1]["nonzeros"]["mean"]
        chosen = [each for each in path if each["alpha"] == figures["alpha"]]
        for each in chosen:  # the same connector, spliced twice
            assert each["figures"]["ce_increase"] == figures["spliced"]["rows"]["sparse"]["ce_increase"]
        chosen = figures["spliced"]["jacobian"]  # other inputs, no more of them
        assert [each["point"] for each in chosen] == [each["point"] for each in path]
        for ours, theirs in zip(chosen, path):
            assert 0 < ours["nonzeros"]["mean"] <= theirs["nonzeros"]["mean"]
            assert ours["figures"]["fvu"] != theirs["figures"]["fvu"]
        assert chosen[-1]["r2"] > 0
        assert figures["causal"]["live"]["all"]["connections"]["connections"] == figures["causal"]["sampled"] > 10
        assert len(figures["weights"]) == 5
        assert (finished.out / "layers" / layer / "pages" / "index.html").is_file()
    page = (finished.out / "report.html").read_text()
    for words in ("resid_pre.0 to mlp_out.0", "resid_pre.1 to mlp_out.1: formulas", "inputs changed one at a time"):
        assert words in page
    assert (finished.out / "metrics.jsonl").is_file()


def test_figures_are_those_of_the_library(finished):
    """R^2 of the saved connectors by plain NumPy, on the held-out text alone; the fit saw none of its documents."""
    opened = connecting.open_dictionaries(finished)
    codes = connecting_codes.collect(dataclasses.replace(finished, codes=finished.out / "codes"), opened)
    ends = opened.ends[1]
    sides = codes.sides(ends, finished)
    documents = [set(pair.tokens.document.tolist()) for pair in (sides.fit, sides.validation)]
    assert not documents[0] & documents[1]
    names = [
        {rows.documents[i] for i in np.unique(pair.tokens.document)}
        for rows, pair in ((opened.data.train, sides.fit), (opened.data.evaluation, sides.held_out))
    ]
    assert not names[0] & names[1]
    x, y = (side.dense(slice(None)).astype(np.float64) for side in (sides.held_out.inputs, sides.held_out.targets))
    rows = read(finished.out / "layers" / "1" / "targets.json")
    assert [row["fired"] for row in rows] == (y > 0).sum(axis=0).tolist()
    for name in ("dense", "sparse"):
        trained = load_connector(finished.out / "layers" / "1" / "connectors" / name)
        W, b = (np.asarray(each, np.float64) for each in (trained.weights(), trained.bias()))
        error, variance = ((y - x @ W - b) ** 2).mean(axis=0), y.var(axis=0)
        for row in rows:
            if row["alive"]:
                j = row["target"]
                assert row[f"r2_{name}"] == pytest.approx(1 - error[j] / variance[j], abs=2e-4)
        if name == "sparse":
            assert [row["nonzeros"] for row in rows] == (W != 0).sum(axis=0).tolist()
            xf, yf = (side.dense(slice(None)).astype(np.float64) for side in (sides.fit.inputs, sides.fit.targets))
            j = int(np.argmax((W != 0).sum(axis=0)))
            S = np.flatnonzero(W[:, j])
            A = np.column_stack([xf[:, S], np.ones(len(xf))])
            best = np.linalg.lstsq(A, yf[:, j], rcond=None)[0]
            residual = ((yf[:, j] - A @ best) ** 2).mean()
            assert ((yf[:, j] - xf @ W[:, j] - b[j]) ** 2).mean() == pytest.approx(residual, rel=1e-3)


def test_resuming_does_not_do_a_finished_layer_again(finished, capsys):
    before = read(finished.out / "metrics.json")["layers"]
    shutil.rmtree(finished.out / "layers" / "1")
    stamp = (finished.out / "layers" / "0" / "figures.json").stat().st_mtime_ns
    assert sparse_connections.main(dataclasses.replace(finished, resume=True)) == 0
    assert (finished.out / "layers" / "0" / "figures.json").stat().st_mtime_ns == stamp
    said = capsys.readouterr().out
    assert "resid_pre.1 to mlp_out.1: path" in said
    assert "resid_pre.0 to mlp_out.0: path" not in said
    after = read(finished.out / "metrics.json")["layers"]
    for layer in before:
        assert before[layer] | {"seconds": 0} == after[layer] | {"seconds": 0}
    with pytest.raises(InputError, match="points"):
        sparse_connections.main(dataclasses.replace(finished, resume=True, points=5))


def test_the_codes_of_an_earlier_run_are_used_again(dictionaries, finished, tmp_path):
    manifest = finished.out / "codes" / "train" / "manifest.json"
    stamp = manifest.stat().st_mtime_ns
    cheap = {"splice_tokens": 0, "checks": 0, "weights": False, "pages": 0}
    flags = given(dictionaries, tmp_path / "a", codes=finished.out / "codes", layers=(0, 1), alpha=0.05, **cheap)
    assert sparse_connections.main(flags) == 0
    assert manifest.stat().st_mtime_ns == stamp
    figures = read(tmp_path / "a" / "metrics.json")["layers"]["0"]
    assert figures["alpha"] == 0.05
    assert figures["elbow"] is None
    assert "spliced" not in figures
    with pytest.raises(InputError, match="codes of another"):
        sparse_connections.main(dataclasses.replace(flags, tokens=2048, out=tmp_path / "b"))
    # In the run's own folder they are made anew.
    own = given(dictionaries, tmp_path / "a", layers=(0, 1), alpha=0.05, overwrite=True, **cheap)
    for tokens in (4096, 2048):
        assert sparse_connections.main(dataclasses.replace(own, tokens=tokens)) == 0
    total = read(tmp_path / "a" / "metrics.json")["layers"]["0"]["tokens"]
    assert total["fit"] + total["validation"] <= 2048


@pytest.mark.long
def test_dictionaries_that_are_missing_are_trained(model, text, dictionaries, finished, tmp_path):
    cheap = {"splice_tokens": 256, "checks": 10, "weights": True, "pages": 0}
    flags = given(
        dictionaries, tmp_path / "run", inputs=("resid_pre",), target="attn_out", train_missing=True, dictionary_k=4,
        dictionary_expansion=2, dictionary_tokens=4096, **cheap,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"no dictionaries of attn_out\.1"):
        sparse_connections.main(dataclasses.replace(flags, train_missing=False))
    assert sparse_connections.main(flags) == 0
    trained = connecting.find_member(flags.out / "trained", "attn_out.1", None)
    assert read_card(trained)["provenance"]["context"] == 32
    stamp = (trained / "params.safetensors").stat().st_mtime_ns
    assert sparse_connections.main(dataclasses.replace(flags, overwrite=True)) == 0
    assert (trained / "params.safetensors").stat().st_mtime_ns == stamp
    weights = read(flags.out / "metrics.json")["layers"]["1"]["weights"]
    assert list(weights) == ["virtual weights, all heads at their own place"]


def test_single_dictionaries_and_a_control(model, text, dictionaries, tmp_path):
    other = write_model(tmp_path / "random", seed=7)
    runs = {"own": dictionaries, "step0": connected_sites(other, text, tmp_path / "sweep0", SITES[:2])}
    paths = {name: [connecting.find_member(run, site, None) for site in SITES[:2]] for name, run in runs.items()}
    cheap = {"splice_tokens": 0, "checks": 0, "weights": False, "pages": 0, "run": None, "layers": ()}
    flags = {name: given(None, tmp_path / name, before=(a,), after=b, **cheap) for name, (a, b) in paths.items()}
    assert sparse_connections.main(flags["step0"]) == 0
    own = dataclasses.replace(flags["own"], step0_run=tmp_path / "step0", out=tmp_path / "own")
    with pytest.raises(InputError, match="no finished run"):
        sparse_connections.main(dataclasses.replace(own, step0_run=tmp_path / "nowhere"))
    shutil.copytree(flags["step0"].out, tmp_path / "control", dirs_exist_ok=True)
    assert sparse_connections.main(dataclasses.replace(own, step0_run=tmp_path / "control")) == 0
    final = read(own.out / "metrics.json")
    assert final["control"] == read(tmp_path / "control" / "metrics.json")["layers"]
    assert "step0" in (own.out / "report.html").read_text()
    with pytest.raises(InputError, match="same weights"):
        sparse_connections.main(dataclasses.replace(own, step0_run=own.out, out=tmp_path / "other"))
    (a, _), (_, b) = paths["own"], paths["step0"]
    with pytest.raises(InputError, match="another model each"):
        sparse_connections.main(dataclasses.replace(own, before=(a,), after=b, overwrite=True))


def test_what_is_refused(dictionaries, tmp_path):
    flags = given(dictionaries, tmp_path / "out")
    for changes, words in (
        ({"layers": ()}, "--layers or --all-layers"),
        ({"all_layers": True}, "--layers or --all-layers"),
        ({"run": None}, "no dictionaries: give"),
        ({"run": tmp_path}, "holds no dictionaries/"),
        ({"before": (tmp_path,)}, "give both"),
        ({"before": (tmp_path,), "after": tmp_path}, "give no run folder"),
        ({"inputs": ("mlp_out",)}, "different sites"),
        ({"raw": ("attn_z",)}, "--raw attn_z"),
        ({"raw": ("resid_pre", "mlp_out")}, "at least one with a dictionary"),
        ({"layers": (5,)}, "no dictionaries of resid_pre.5, mlp_out.5"),
        ({"member": "k-9"}, "as --member"),
        ({"validation": 1.0}, "--validation"),
        ({"points": 2}, "three points"),
        ({"alpha": -1.0}, "--alpha"),
        ({"ridges": ()}, "--ridges"),
        ({"checks": -1}, "--checks"),
        ({"jacobian_tokens": 0}, "--jacobian-tokens"),
        ({"jacobian_support": True, "splice_tokens": 0}, "--jacobian-support is of what is spliced"),
        (
            {"target": "attn_out", "raw": ("attn_out",), "jacobian_support": True},
            "--jacobian-support and resid_pre.1 to attn_out.1: mean Jacobians are those of an MLP",
        ),
        ({"eval_tokens": 32}, "held-out text has fewer than two documents"),
        ({"out": dictionaries}, "holds what is read"),
    ):
        with pytest.raises(InputError, match=words):
            sparse_connections.main(dataclasses.replace(flags, **changes))


def test_pages_are_of_each_label_in_turns():
    class Made:
        def __init__(self, target, label, r2, nonzeros=1):
            self.target, self.label, self.r2 = target, label, r2
            self.formula = type("Formula", (), {"nonzeros": nonzeros})

    made = [Made(0, "OR", 0.1), Made(1, "OR", 0.9), Made(2, "AND", None), Made(3, "weighted sum", 0.5),
            Made(4, "OR", 0.8), Made(5, "OR", 0.99, 0), Made(6, "AND", 0.7)]  # fmt: skip
    alive = np.array([True] * 6 + [False])
    assert chosen_targets(made, alive, 4) == [1, 2, 3, 4]
    assert chosen_targets(made, alive, 99) == [0, 1, 2, 3, 4]


def test_rows_that_are_looked_at_closer_are_of_the_whole_text():
    numbers = np.arange(10, 20)
    np.testing.assert_array_equal(connecting_codes.spread_rows(numbers, 4), [10, 12, 15, 17])
    np.testing.assert_array_equal(connecting_codes.spread_rows(numbers, 99), numbers)
    np.testing.assert_array_equal(connecting_codes.spread_rows(numbers, 0), [10])
