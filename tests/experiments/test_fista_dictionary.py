"""Dictionaries by sparse coding on a tiny model: every learner, from scratch and from a run, killed and resumed."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from experiments import command, fista_dictionary
from experiments.fista_dictionary import Flags
from sparse_jax.dictionaries import Fista, load
from sparse_jax.errors import InputError
from tests.experiments.test_train_sae import flags as autoencoder_flags


def flags(model, text, out, **changes) -> Flags:
    plain = autoencoder_flags(model, text, out)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return Flags(**{**fields, "dictionary": Fista(expansion=2, l1=1.0), "tokens": 4096, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["quadratic", "online", "adam"])
def test_from_scratch(model, text, tmp_path, learner):
    given = flags(model, text, tmp_path / "run", learner=learner, learning_rate=1e-2, rate=0.5)
    assert fista_dictionary.main(given) == 0
    final = json.loads((tmp_path / "run" / "metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert final["dictionary"] == "fista"
    assert lines[-1]["loss"] < 0.98 * lines[0]["loss"]
    assert lines[-1]["step"] == 32
    np.testing.assert_allclose(np.linalg.norm(load(tmp_path / "run").params["W_dec"], axis=1), 1, atol=1e-5)
    assert (tmp_path / "run" / "report.html").is_file()


def test_codes_alone(model, text, tmp_path, autoencoder):
    """Atoms, bias and normaliser stay; the penalty moves to hold L0."""
    given = flags(model, text, tmp_path / "run", learner="frozen", from_run=autoencoder, target_l0=6.0, tokens=8192)
    assert fista_dictionary.main(given) == 0
    before, after = load(autoencoder), load(tmp_path / "run")
    np.testing.assert_allclose(after.params["W_dec"], before.params["W_dec"], atol=1e-6)
    np.testing.assert_array_equal(after.params["b_dec"], before.params["b_dec"])
    np.testing.assert_array_equal(after.normaliser.centre, before.normaliser.centre)
    assert after.params["penalty"] != np.float32(1.0)
    assert abs(json.loads((tmp_path / "run" / "metrics.json").read_text())["l0"] - 6) < 1.5


@pytest.mark.slow
def test_refined(model, text, tmp_path, autoencoder):
    given = flags(model, text, tmp_path / "run", from_run=autoencoder, dictionary=Fista(l1=1.0))
    assert fista_dictionary.main(given) == 0
    moved = load(tmp_path / "run").params["W_dec"] - load(autoencoder).params["W_dec"]
    assert 1e-3 < np.linalg.norm(moved) < 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(model, text, tmp_path, monkeypatch):
    whole, stopped = flags(model, text, tmp_path / "whole"), flags(model, text, tmp_path / "stopped")
    assert fista_dictionary.main(whole) == 0
    asked = itertools.count(1)
    monkeypatch.setattr(command.StopRequest, "__call__", lambda self: next(asked) >= 13)
    assert fista_dictionary.main(stopped) == command.EXIT_INTERRUPTED
    monkeypatch.undo()
    assert fista_dictionary.main(dataclasses.replace(stopped, resume=True)) == 0
    one, other = load(tmp_path / "whole"), load(tmp_path / "stopped")
    for name in one.params:
        np.testing.assert_array_equal(one.params[name], other.params[name])


def test_what_cannot_be(model, text, tmp_path, autoencoder):
    for changes, words in (
        ({"learner": "frozen"}, "give --from-run"),
        ({"rate": 0.0}, "--rate 0.0"),
        ({"resample_at": (0.5,)}, "--resample-at"),
        ({"decoder_bias_start": "mean"}, "--decoder-bias-start"),
        ({"from_run": autoencoder, "site": "resid_post.1"}, "give --site resid_post.0"),
        ({"from_run": autoencoder, "dictionary": Fista(n_features=7)}, "--dictionary.n-features 7"),
        ({"from_run": tmp_path / "nothing"}, "holds no dictionary"),
    ):
        with pytest.raises(InputError, match=words):
            fista_dictionary.main(flags(model, text, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()


def test_the_run_that_is_refined_is_not_overwritten(autoencoder, model, text, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(autoencoder, run)
    with pytest.raises(InputError, match="holds what is read"):
        fista_dictionary.main(flags(model, text, run, from_run=run, overwrite=True))
    assert (run / "dictionaries").is_dir()
