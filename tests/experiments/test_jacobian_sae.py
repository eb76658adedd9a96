"""The Jacobian experiment on a tiny model: what it refuses, what it leaves behind, that resuming changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import command, jacobian_sae
from experiments.jacobian_sae import Flags
from experiments.reading import open_subject
from sparse_jax.errors import InputError
from sparse_jax.training import read_lines
from tests.experiments.conftest import write_model

COMMON = {
    "layer": 1, "coefficients": (0.0, 20.0), "n_features": 24, "k": 3, "every": 1, "tokens": 2048, "eval_tokens": 1024,
    "context": 32, "batch": 128, "block_rows": 16, "statistics_tokens": 1024, "holdout": 0.2, "functions": 24,
    "compute_dtype": "float32", "log_every": 4, "checkpoint_every": 5, "reuse_memory": False, "dead_window": 400,
}  # fmt: skip


def flags(model, text, out, **changes) -> Flags:
    return Flags(**{"model": str(model), "text": str(text), "out": Path(out), **COMMON, **changes})


@pytest.fixture(scope="module")
def step0(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "step0", seed=7)


@pytest.fixture(scope="module")
def finished(model, step0, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "jacobian"
    assert jacobian_sae.main(flags(model, text, out, step0=str(step0))) == 0
    return out


def test_the_figures_stand_beside_the_control(finished):
    final = json.loads((finished / "metrics.json").read_text())
    assert final["control"] == "step0"
    for name in ("trained", "step0"):
        plain, sparse = final["models"][name]["members"]
        assert (plain["coefficient"], sparse["coefficient"]) == (0, 20)
        assert sparse["mean_absolute"] < plain["mean_absolute"]
        assert 0 < plain["fvu_in"] < 1
        assert plain["l0_in"] <= 3
        assert set(plain["ce_increase"]) == {"input", "output", "both"}
        assert sum(plain["functions"].values()) == pytest.approx(1)
        shares = list(plain["share_above_relative"].values())
        assert 1 >= shares[0] >= shares[-1] > 0
        assert plain["connections"]["holding"] >= 1
        assert plain["tokens_evaluated"] == 31 * 32
    page = (finished / "report.html").read_text()
    assert "step0, 20" in page
    assert "Dashed: the same on random weights" in page
    logged = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in logged if line["coefficient"] == 20] == [1, 4, 8, 12, 16]
    assert logged[-1]["jacobian"] > 0 == logged[-2]["jacobian"]


def test_each_side_is_read_as_any_dictionary(finished):
    subject = open_subject(finished / "dictionaries/step0/mlp_out.1/jacobian-20", eval_tokens=256)
    assert str(subject.data.site) == "mlp_out.1"
    assert subject.provenance["partner"] == "step0/mlp_in.1/jacobian-20"
    assert subject.coder.dictionary.k == 3


def test_a_resumed_run_ends_where_one_that_was_not_stopped_does(model, text, finished, tmp_path, monkeypatch):
    out, asked = tmp_path / "stopped", []
    monkeypatch.setattr(command.StopRequest, "__call__", lambda self: (asked.append(1), len(asked) > 7)[1])
    assert jacobian_sae.main(flags(model, text, out)) == command.EXIT_INTERRUPTED
    assert not (out / "metrics.json").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match="seed: 0 there, 1 now"):
        jacobian_sae.main(flags(model, text, out, resume=True, seed=1))
    assert jacobian_sae.main(flags(model, text, out, resume=True)) == 0
    for site in ("mlp_in.1", "mlp_out.1"):
        ours, due = (
            load_file(run / "dictionaries/trained" / site / "jacobian-20/params.safetensors") for run in (out, finished)
        )
        for name, value in due.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert "No control" in (out / "report.html").read_text()


BAD = {
    "no coefficient": ({"coefficients": ()}, "give one or more numbers"),
    "a negative one": ({"coefficients": (-1.0,)}, "give one or more numbers of at least 0"),
    "one twice": ({"coefficients": (2.0, 2.0)}, "each once"),
    "k too large": ({"k": 25}, "--k 25 exceeds --n-features 24"),
    "a layer that is not there": ({"layer": 2}, "the model has layers 0 to 1"),
    "no rows penalised": ({"every": 129}, "--every 129 exceeds --batch 128"),
    "a revision of nothing": ({"step0_revision": "step0"}, "give --step0 too"),
    "no threshold": ({"thresholds": ()}, "--thresholds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_before_anything_is_written(case, model, text, tmp_path):
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        jacobian_sae.main(flags(model, text, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_model_is_not_its_own_control(model, text, tmp_path):
    with pytest.raises(InputError, match="is --model itself"):
        jacobian_sae.main(flags(model, text, tmp_path / "run", step0=str(model)))
