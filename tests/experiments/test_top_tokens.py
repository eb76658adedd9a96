"""Top-token tables on a tiny model: of trained dictionaries, of the whole pipeline on prompts, what is refused."""

import csv
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import top_tokens
from experiments.reading import controls, open_subject
from experiments.top_tokens import Flags
from experiments.top_tokens_run import labels
from sparse_jax.activations import activations
from sparse_jax.dictionaries import load
from sparse_jax.errors import InputError


def run(out, **changes):
    fields = {"read_tokens": 1024, "tokens_shown": 4, "least": 2, "order": "feature", "out": out, "overwrite": True}
    assert top_tokens.main(Flags(**{**fields, **changes})) == 0
    return json.loads((out / "metrics.json").read_text())["tables"]


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def plain_table(subject, coder, count, least):
    """(feature, density, [(token, mean)]) by plain counting."""
    tokens, _, mask, _ = subject.data.evaluation[subject.numbers]
    pad = np.full((-len(tokens) % 8, tokens.shape[1]), 1, np.int32)  # activations come in rows of eight
    x = activations(subject.data.lm, jnp.array(np.concatenate([tokens, pad])), subject.data.site)[: len(tokens)]
    codes = np.maximum(np.asarray(coder.encode(x.reshape(-1, x.shape[-1]))), 0)[mask.reshape(-1)]
    tokens = tokens[mask]
    rows = []
    for feature in np.flatnonzero(codes.any(axis=0)):
        c = codes[:, feature]
        means = {t: c[tokens == t].mean() for t in np.unique(tokens[c > 0]) if (tokens == t).sum() >= least}
        best = sorted(means, key=lambda t: -means[t])[:count]
        rows.append((feature, (c > 0).mean(), [(t, means[t]) for t in best]))
    return rows


def test_tables_of_a_run(autoencoder, tmp_path):
    (figures,) = run(tmp_path / "tables", runs=(autoencoder,))
    subject = open_subject(autoencoder, eval_tokens=1024)
    coders = {"dictionary": subject.coder, "neurons": controls(subject, figures["neurons"]["k"])["neurons"]}
    site = str(subject.data.site)
    for name, coder in coders.items():
        expected = plain_table(subject, coder, 4, 2)
        found = read_table(tmp_path / "tables" / "tables" / f"{site}{'' if name == 'dictionary' else '-neurons'}.csv")
        assert [int(line[0]) for line in found] == [feature for feature, _, _ in expected]
        np.testing.assert_allclose(
            [float(line[1]) for line in found], [density for _, density, _ in expected], rtol=1e-3
        )
        for line, (_, _, best) in zip(found, expected):
            np.testing.assert_allclose([float(m) for m in line[3::3] if m], [m for _, m in best], rtol=1e-3)
            assert line[2] in subject.data.tokenizer.token_strings([best[0][0]]) if best else line[2:] == []
        own = figures if name == "dictionary" else figures["neurons"]
        assert own["alive"] == len(expected)
        assert own["n_features"] == coder.dictionary.n_features
        np.testing.assert_allclose(own["l0"], sum(density for _, density, _ in expected), rtol=1e-3)
    assert figures["neurons"]["k"] == max(1, round(figures["l0"]))
    assert figures["tokens"] == subject.data.evaluation[subject.numbers].mask.sum()
    page = (tmp_path / "tables" / "report.html").read_text()
    assert f"{site}, dictionary" in page
    assert f"{site}, neurons" in page
    assert json.loads((tmp_path / "tables" / "config.json").read_text())["flags"]["runs"] == [str(autoencoder)]


def test_training_text_and_the_same_site_twice(autoencoder, tmp_path):
    held, twice = run(tmp_path / "a", runs=(autoencoder, autoencoder))
    assert held == {**twice, "label": held["label"]}
    site = held["site"]
    names = {f"{site}-{i}{kind}.csv" for i in (1, 2) for kind in ("", "-neurons")}
    assert {path.name for path in (tmp_path / "a" / "tables").iterdir()} == names
    (trained,) = run(tmp_path / "a", runs=(autoencoder,), side="training", over="firings")
    assert trained["l0"] != held["l0"]
    # What --overwrite removes: the tables of the run before are gone.
    assert {path.name for path in (tmp_path / "a" / "tables").iterdir()} == {f"{site}.csv", f"{site}-neurons.csv"}


@pytest.mark.slow
def test_the_pipeline_on_prompts(model, tmp_path, capsys):
    made = run(
        tmp_path / "run", prompts="truthfulqa-six-shot", model=str(model), layers=(1, 0), train_tokens=16_384,
        target_l0=8.0, context=64, holdout=0.2, least=5,
    )  # fmt: skip
    assert [each["site"] for each in made] == ["resid_post.1", "resid_post.0"]
    for each in made:
        trained = load(Path(each["run"]))
        assert trained.dictionary.kind == "l1"
        assert trained.dictionary.n_features == each["n_features"] == 64
        assert 2 < each["l0"] < 32  # the target, after few steps
        assert 0 < each["commonest_token_share"] <= 1
        found = read_table(tmp_path / "run" / "tables" / f"{each['site']}.csv")
        assert len(found) == each["alive"] > 5
        # Prompts are what is read: their layout is among the tokens.
        assert any(":" in cell for line in found for cell in line[2::3])
    assert (tmp_path / "run" / "training" / "report.html").exists()
    assert "training prompts" in capsys.readouterr().out


def test_names_of_tables(autoencoder):
    subject = open_subject(autoencoder, eval_tokens=64)
    site = str(subject.data.site)
    assert labels([subject]) == [site]
    assert labels([subject] * 3) == [f"{site}-1", f"{site}-2", f"{site}-3"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give run folders, or --prompts"),
        ({"runs": (Path("a"),), "prompts": "truthfulqa-six-shot"}, "one of the two"),
        ({"prompts": "truthfulqa-six-shot", "text": "austen"}, "--text austen with --prompts"),
        ({"runs": (Path("a"),), "layers": (1,)}, "--layers"),
        ({"runs": (Path("a"),), "least": 0}, "--least 0"),
        ({"prompts": "truthfulqa-six-shot", "layers": (7,)}, "7"),
        ({"prompts": "truthfulqa-six-shot", "train_tokens": 10}, "--tokens 10"),
    ],
)
def test_flags_that_cannot_be(model, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        top_tokens.main(Flags(**{"model": str(model), "out": tmp_path / "run", **changes}))
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_kept(autoencoder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="already holds a run"):
        top_tokens.main(Flags(runs=(autoencoder,), out=tmp_path))
