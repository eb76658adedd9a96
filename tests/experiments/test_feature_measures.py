"""Judge-free measures of a dictionary beside its controls: against plain counting, planted features, wrong flags."""

import csv
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import feature_measures, train_sae
from experiments.feature_measures import Flags
from experiments.feature_measures_run import SHOWN, mean_and_error, split_rows
from experiments.reading import Subject, open_subject
from sparse_jax.activations import activations
from sparse_jax.dictionaries import load, read_card
from sparse_jax.errors import InputError
from sparse_jax.formats import save_saelens
from tests.experiments.conftest import write_model
from tests.experiments.test_search_features import PlantedData
from tests.experiments.test_train_sae import flags as autoencoder_flags
from tests.features import planted as p

SMALL = {"eval_tokens": 4096, "sample": 12, "min_firings": 5, "draws": 10, "levels": 5}


@pytest.fixture(scope="module")
def runs(model, text, tmp_path_factory):
    """A dictionary, and one of another random model on the same text."""
    folder = tmp_path_factory.mktemp("runs")
    other = write_model(folder / "step0-model", seed=1)
    for name, lm in (("trained", model), ("step0", other)):
        assert train_sae.main(autoencoder_flags(lm, text, folder / name, tokens=4096)) == 0
    return folder


def measured(dictionary, out, **changes):
    assert feature_measures.main(Flags(dictionary, out=out, overwrite=True, **SMALL | changes)) == 0
    with (out / "features.csv").open(encoding="utf8", newline="") as file:
        return json.loads((out / "metrics.json").read_text()), list(csv.DictReader(file))


@pytest.fixture(scope="module")
def beside(runs, tmp_path_factory):
    return measured(runs / "trained", tmp_path_factory.mktemp("out") / "measures", step0_run=runs / "step0")


def test_every_basis_is_measured(beside):
    final, rows = beside
    assert list(final["bases"]) == ["dictionary", "neurons", "pca", "random", "step0"]
    for name, basis in final["bases"].items():
        own = [row for row in rows if row["basis"] == name]
        assert len(own) == basis["sample"] == min(12, basis["firing_often"])
        assert basis["firing_often"] <= basis["features"]
        assert SHOWN.keys() <= basis["figures"].keys()
        for key, figure in basis["figures"].items():
            values = np.array([float(row[key]) for row in own])
            assert figure["mean"] == pytest.approx(values.mean())
            assert figure["error"] == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
        assert all(int(row["fired"]) >= 10 for row in own)
        assert all(row["rule"].startswith(("the token: ", "the token before: ")) for row in own)
        # Over 10 firings there are at most 10 tokens.
        assert 0 < basis["figures"]["token_entropy"]["mean"] <= np.log(10) + 1e-9
        assert 0.2 <= basis["figures"]["commonest_token"]["mean"] <= 1
    assert final["bases"]["neurons"]["features"] == 16


def test_measures_against_plain_counting(runs, beside):
    """Precision and recall of a rule that is a token, on the second half of the text; the share and the density."""
    final, rows = beside
    subject = open_subject(runs / "trained", eval_tokens=4096)
    first, second = split_rows(subject.numbers)
    assert len(first) % 8 == len(second) % 8 == 0
    codes, ids = [], []
    for half in (first, second):
        tokens, _, mask, _ = subject.data.evaluation[half]
        x = activations(subject.data.lm, jnp.array(tokens), subject.data.site)
        codes.append(np.asarray(subject.coder.encode(x[jnp.array(mask)])))
        ids.append(tokens[mask])
    assert final["tokens"] == len(ids[0]) + len(ids[1])
    assert final["k_of_controls"] == round(float(np.mean(np.concatenate(codes) > 0) * codes[0].shape[1]))
    strings, checked = subject.data.tokenizer.token_strings(range(4096)), 0
    own = [row for row in rows if row["basis"] == "dictionary"]
    for row in own:
        feature = int(row["feature"])
        assert int(row["fired"]) == sum((c[:, feature] > 0).sum() for c in codes)
        if row["rule"].startswith("the token: '"):
            token = strings.index(eval(row["rule"].removeprefix("the token: ")))
            fires, holds = codes[1][:, feature] > 0, ids[1] == token
            assert float(row["rule_precision"]) == pytest.approx(holds[fires].mean())
            assert float(row["rule_recall"]) == pytest.approx(fires[holds].mean())
            due = np.corrcoef(codes[1][:, feature], holds)[0, 1]
            assert float(row["rule_correlation"]) == pytest.approx(due, abs=1e-4)
            checked += 1
    assert checked > 2
    assert final["bases"]["dictionary"]["density"] == pytest.approx(
        np.mean([int(row["fired"]) for row in own]) / final["tokens"]
    )


@pytest.mark.slow
def test_planted_features_beat_their_controls(monkeypatch, tmp_path):
    """Features of tokens, of tokens before and of positions against random directions, on the same text."""
    made = p.planted()
    layout = SimpleNamespace(bos="none", skip_positions=1, model="planted", block_rows=32)
    data = PlantedData(made.lm, made.tokenizer, p.SITE, made.rows, made.rows, layout)
    subject = Subject(tmp_path, made.coder, data, np.arange(200), {})
    monkeypatch.setattr("experiments.feature_measures_run.open_subject", lambda *_, **__: subject)
    final, rows = measured(tmp_path, tmp_path / "out", sample=80)
    figures = {name: basis["figures"] for name, basis in final["bases"].items()}
    for name in ("neurons", "pca", "random"):
        for key in ("rule_correlation", "rule_f1"):
            assert figures["dictionary"][key]["mean"] > figures[name][key]["mean"] + 0.1
    rules = {int(row["feature"]): row for row in rows if row["basis"] == "dictionary"}
    assert rules[p.TOKEN]["rule"] == "the token: ' king'"
    assert float(rules[p.TOKEN]["commonest_token"]) == float(rules[p.TOKEN]["rule_f1"]) == 1
    assert float(rules[p.TOKEN]["token_entropy"]) == 0


@pytest.mark.slow
def test_saelens_format_gives_the_same(runs, tmp_path):
    provenance = read_card(runs / "trained")["provenance"]
    save_saelens(tmp_path / "theirs", load(runs / "trained"), provenance)
    ours, _ = measured(runs / "trained", tmp_path / "ours", controls=False)
    options = {"model": provenance["model"], "text": provenance["text"], "controls": False}
    theirs, _ = measured(tmp_path / "theirs", tmp_path / "out", **options)
    for key in ("rule_f1", "commonest_token", "token_entropy_all"):
        a, b = (final["bases"]["dictionary"]["figures"][key]["mean"] for final in (ours, theirs))
        assert a == pytest.approx(b, rel=0.05)
    assert list(theirs["bases"]) == ["dictionary"]


def test_the_text_is_cut_once():
    first, second = split_rows(np.array([7, 3, 9, 1, 5]))
    np.testing.assert_array_equal(first, [1, 3])
    np.testing.assert_array_equal(second, [5, 7, 9])
    with pytest.raises(InputError, match="single row"):
        split_rows(np.array([4]))


def test_mean_and_error_by_hand():
    assert mean_and_error(np.array([1.0, 3.0])) == {"mean": 2.0, "error": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"sample": 1}, "--sample 1: a standard error"),
        ({"draws": 50, "min_firings": 20}, "--draws 50 with --min-firings 20"),
        ({"levels": 41, "draws": 5, "min_firings": 20}, "--levels 41"),
        ({"min_firings": 0}, "--min-firings 0"),
        ({"max_norm": 0.0}, "--max-norm 0"),
    ],
)
def test_flags_that_cannot_be(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        feature_measures.main(Flags(tmp_path / "nothing", out=tmp_path / "measures", **flags))
    assert not (tmp_path / "measures").exists()


def test_too_few_firings(runs, tmp_path):
    with pytest.raises(InputError, match="features of the dictionary fire 100000 times"):
        feature_measures.main(Flags(runs / "trained", out=tmp_path / "m", eval_tokens=2048, min_firings=100_000))
    assert not (tmp_path / "m").exists()
