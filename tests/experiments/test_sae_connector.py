"""The whole experiment on a tiny model: what it leaves behind against plain NumPy; refusals; going on."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import connecting, connecting_codes, sae_connector
from experiments.sae_connector import Flags
from sparse_jax.connectors.connector_files import load_connector
from sparse_jax.errors import InputError
from tests.experiments.conftest import connected_sites

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dictionaries(model, text, tmp_path_factory):
    return connected_sites(model, text, tmp_path_factory.mktemp("runs") / "sweep", ("resid_pre.1", "mlp_out.1"))


def given(dictionaries, out, **changes) -> Flags:
    fields = {
        "run": dictionaries, "layers": (1,), "tokens": 4096, "eval_tokens": 2048, "width": 12, "batch": 256,
        "hidden_l1": (1.0, 0.1), "alpha": 0.1, "fit_tokens": 8192, "pages": 4, "cluster_tokens": 60, "out": out,
    }  # fmt: skip
    return Flags(**{**fields, **changes})


@pytest.fixture(scope="module")
def finished(dictionaries, tmp_path_factory):
    flags = given(dictionaries, tmp_path_factory.mktemp("runs") / "sae")
    assert sae_connector.main(flags) == 0
    return flags


def read(path):
    return json.loads(path.read_text())


def test_figures_by_plain_numpy(finished):
    figures = read(finished.out / "metrics.json")["layers"]["1"]
    assert list(figures["connectors"]) == ["mlp", "hidden-l1-1", "hidden-l1-0.1"]
    opened = connecting.open_dictionaries(finished)
    codes = connecting_codes.collect(dataclasses.replace(finished, codes=finished.out / "codes"), opened)
    held = codes.sides(opened.ends[0], finished).held_out
    x, y = (side.dense(slice(None)).astype(np.float64) for side in (held.inputs, held.targets))
    alive = (y > 0).sum(axis=0) >= 10
    assert figures["alive"] == alive.sum()
    for name, found in figures["connectors"].items():
        trained = load_connector(finished.out / "layers" / "1" / "connectors" / name)
        p = {key: np.asarray(value, np.float64) for key, value in trained.params.items()}
        h = np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
        r2 = 1 - ((y - h @ p["W_dec"] - p["b_dec"]) ** 2).mean(axis=0) / np.where(alive, y.var(axis=0), 1)
        assert found["r2"] == pytest.approx(r2[alive].mean(), abs=1e-4)
        assert found["hidden_l0"] == pytest.approx((h > 0).sum() / len(x), rel=1e-3)
        for matrix in ("W_enc", "W_dec"):
            counts = found["weights"][matrix]
            assert counts["own"] == {"positive": (p[matrix] > 0.1).sum(), "negative": (p[matrix] < -0.1).sum()}
            assert counts["nonzero"] == np.count_nonzero(p[matrix])
        if name == figures["read"] == "hidden-l1-1":
            rows = read(finished.out / "layers" / "1" / "units.json")
            np.testing.assert_allclose([row["fired"] for row in rows], (h > 0).sum(axis=0), atol=1)
            assert [row["inputs_negative"] for row in rows] == (p["W_enc"] < -0.1).sum(axis=0).tolist()
            scale = np.linalg.norm(p["W_dec"] / p["target_scale"], axis=1)
            np.testing.assert_allclose([row["strength"] for row in rows], h.mean(axis=0) * scale, rtol=1e-3, atol=1e-6)
    connectors = figures["connectors"]
    assert connectors["hidden-l1-1"]["hidden_l0"] < connectors["hidden-l1-0.1"]["hidden_l0"] + 1
    assert connectors["mlp"]["weights"]["W_enc"]["nonzero"] == 32 * 12
    assert connectors["hidden-l1-1"]["weights"]["W_enc"]["nonzero"] < 32 * 12


def test_pages_are_of_the_strongest_units(finished):
    folder = finished.out / "layers" / "1"
    rows = read(folder / "units.json")
    due = sorted(row["unit"] for row in sorted(rows, key=lambda row: -row["strength"])[:4] if row["strength"] > 0)
    index = (folder / "pages" / "index.html").read_text()
    shown = "".join(path.read_text() for path in (folder / "pages").rglob("*") if path.is_file())
    assert "hidden units from resid_pre.1 to mlp_out.1" in index
    for unit in due:
        assert f"hidden {unit} =" in shown
    page = (finished.out / "report.html").read_text()
    for words in ("hidden L0", "the strongest hidden units of hidden-l1-1"):
        assert words in page


def test_resuming_and_reading_the_mlp(dictionaries, finished, tmp_path, capsys):
    before = read(finished.out / "metrics.json")["layers"]
    assert sae_connector.main(dataclasses.replace(finished, resume=True)) == 0
    assert read(finished.out / "metrics.json")["layers"] == before
    assert "connectors," not in capsys.readouterr().out
    flags = given(dictionaries, tmp_path / "mlp", read=0, hidden_l1=(1.0,), pages=2, codes=finished.out / "codes")
    assert sae_connector.main(flags) == 0
    figures = read(flags.out / "metrics.json")["layers"]["1"]
    assert figures["read"] == "mlp"
    # The same seed and text: a connector does not depend on which others are trained beside it.
    assert figures["connectors"]["hidden-l1-1"] == before["1"]["connectors"]["hidden-l1-1"]


def test_what_is_refused(dictionaries, tmp_path):
    flags = given(dictionaries, tmp_path / "out")
    for changes, words in (
        ({"hidden_l1": ()}, "--hidden-l1"),
        ({"hidden_l1": (0.1, 0.1)}, "each once"),
        ({"hidden_l1": (0.0,)}, "--hidden-l1"),
        ({"read": 0.5}, "--read 0.5"),
        ({"alpha": -1.0}, "--alpha"),
        ({"width": 0}, "--width"),
    ):
        with pytest.raises(InputError, match=words):
            sae_connector.main(dataclasses.replace(flags, **changes))
        assert not (tmp_path / "out").exists()
