"""The whole experiment on a tiny model: classes and figures against the library called directly; refusals; going on."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import connecting, connecting_codes, linearity
from experiments.linearity import Flags
from sparse_jax.connectors.connector_files import load_connector
from sparse_jax.connectors.document_errors import document_errors
from sparse_jax.connectors.linearity import CLASSES
from sparse_jax.connectors.noise_threshold import noise_threshold
from sparse_jax.connectors.scaling import moments_of
from sparse_jax.errors import InputError
from tests.experiments.conftest import connected_sites

pytestmark = pytest.mark.slow
SITES = ("resid_pre.1", "mlp_out.1")


@pytest.fixture(scope="module")
def dictionaries(model, text, tmp_path_factory):
    return connected_sites(model, text, tmp_path_factory.mktemp("runs") / "sweep", SITES)


def given(dictionaries, out, **changes) -> Flags:
    fields = {
        "run": dictionaries, "layers": (1,), "tokens": 4096, "eval_tokens": 2048, "seeds": (0, 1), "widths": (8, 4),
        "batches": (256,), "ridges": (1e-3, 1e-1), "noise_tokens": 512, "min_documents": 2, "replicates": 50,
        "unexplained": 0.01, "fit_tokens": 16_384, "retrain": True, "out": out,
    }  # fmt: skip
    return Flags(**{**fields, **changes})


@pytest.fixture(scope="module")
def finished(dictionaries, tmp_path_factory):
    flags = given(dictionaries, tmp_path_factory.mktemp("runs") / "linearity")
    assert linearity.main(flags) == 0
    return flags


def read(path):
    return json.loads(path.read_text())


def test_figures_are_those_of_the_library(finished):
    figures = read(finished.out / "metrics.json")["layers"]["1"]
    rows = read(finished.out / "layers" / "1" / "targets.json")
    opened = connecting.open_dictionaries(finished)
    codes = connecting_codes.collect(dataclasses.replace(finished, codes=finished.out / "codes"), opened)
    sides = codes.sides(opened.ends[0], finished)
    folder = finished.out / "layers" / "1" / "connectors"
    fits = {name: load_connector(folder / name) for name in ("linear", "mlp-8-256-0", "mlp-8-256-1")}
    errors = document_errors(sides.held_out, fits).constant(moments_of(sides.fit.targets).mean)
    mlp = (errors.mse("mlp-8-256-0") + errors.mse("mlp-8-256-1")) / 2
    explained = 0
    for j, row in enumerate(rows):
        if row["variance"] > 0:
            assert row["g"] == pytest.approx((errors.mse("linear")[j] - mlp[j]) / errors.variance[j], abs=1e-6)
            assert row["r2_constant"] == pytest.approx(errors.r2("constant")[j], abs=1e-6)
            assert row["low"] <= row["g"] + 1e-6 or row["high"] >= row["g"] - 1e-6
            explained += row["class_0.01"] in ("linear", "nonlinear", "undecided")
    assert explained > 3
    text, numbers = opened.data.evaluation, codes.numbers[: 512 // 32]
    noise = noise_threshold(
        opened.data.lm, opened.coders["mlp_out.1"], "mlp_out.1", text, numbers, errors.variance, replicates=50
    )
    # A threshold that no noise reaches is infinite, which JSON has no number for.
    found = [np.inf if scale is None else scale for scale in figures["threshold"]["scales"]]
    np.testing.assert_allclose(found, noise.scales, rtol=1e-5)
    # The classes follow from the rows and the threshold.
    for level, scale in zip((0.003, 0.01, 0.03), noise.scales):
        for row in rows:
            name = row[f"class_{level:g}"]
            assert name in CLASSES
            if name == "linear":
                assert row["high"] < scale**2
            if name == "nonlinear":
                assert row["low"] > scale**2
            assert (name == "dead") == (row["fired"] == 0)
        counts = figures["classes"][f"{level:g}"]
        assert sum(counts.values()) == len(rows)
        assert counts["outlier"] == sum(bool(row["outlier"]) and row["fired"] > 0 for row in rows)
    losses = [(row["mse_linear"] - row["mse_mlp"]) < 0.001 for row in rows]
    assert figures["original"]["share"] == pytest.approx(np.mean(losses))


def test_sweeps_retraining_and_the_report(finished):
    figures = read(finished.out / "metrics.json")["layers"]["1"]
    assert [(row["width"], row["batch"]) for row in figures["sweep"]] == [(8, 256), (4, 256)]
    assert figures["sweep"][0]["r2"]["mlp"] != figures["sweep"][1]["r2"]["mlp"]
    rows = read(finished.out / "layers" / "1" / "targets.json")
    assert figures["retrained"]["targets"] == sum(row["class_0.01"] == "linear" for row in rows)
    page = (finished.out / "report.html").read_text()
    for words in ("Classes of targets", "original rule", "other MLPs", "the most nonlinear targets"):
        assert words in page
    lines = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
    assert {line["layer"] for line in lines} == {1}


def test_resuming_and_gradients(dictionaries, finished, tmp_path, capsys):
    stamp = (finished.out / "layers" / "1" / "figures.json").stat().st_mtime_ns
    before = read(finished.out / "metrics.json")["layers"]
    assert linearity.main(dataclasses.replace(finished, resume=True)) == 0
    assert (finished.out / "layers" / "1" / "figures.json").stat().st_mtime_ns == stamp
    assert read(finished.out / "metrics.json")["layers"] == before
    assert "MLPs" not in capsys.readouterr().out
    flags = given(dictionaries, tmp_path / "gradients", gradients=True, widths=(8,), codes=finished.out / "codes",
                  retrain=False, fit_tokens=131_072)  # fmt: skip
    assert linearity.main(flags) == 0
    figures = read(flags.out / "metrics.json")["layers"]["1"]
    assert figures["ridge"] is None
    assert figures["median_seed_spread"] is None or figures["median_seed_spread"] > 0
    assert (flags.out / "layers" / "1" / "connectors" / "linear-1").is_dir()
    # Trained on as many tokens as it needs, it is near the exact one.
    assert figures["r2"]["linear"] == pytest.approx(before["1"]["r2"]["linear"], abs=0.15)


def test_what_is_refused(dictionaries, tmp_path):
    flags = given(dictionaries, tmp_path / "out")
    for changes, words in (
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 1)}, "--seeds 1 1"),
        ({"widths": (0,)}, "--widths"),
        ({"level": 0.02}, "--level 0.02: give one of --levels"),
        ({"fit_tokens": -1}, "--fit-tokens"),
        ({"raw": ("mlp_out",)}, r"mlp_out\.1 without a dictionary"),
        ({"step0_run": tmp_path}, "no finished run"),
    ):
        with pytest.raises(InputError, match=words):
            linearity.main(dataclasses.replace(flags, **changes))
        assert not (tmp_path / "out").exists()
