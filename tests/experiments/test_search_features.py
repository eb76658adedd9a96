"""Every kind of search from the command's flags to its files: planted features first, real runs, wrong flags."""

import csv
import dataclasses
import json
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import search_features
from experiments.data import Data
from experiments.prompt_files import read_prompts, read_task, read_text
from experiments.reading import Subject, open_subject
from experiments.search_features import Flags
from sparse_jax.activations import Normaliser, activations
from sparse_jax.dictionaries import Fista, Normalised, load, read_card
from sparse_jax.errors import InputError
from sparse_jax.formats import save_saelens
from tests.features import planted as p


@dataclass(frozen=True)
class PlantedData(Data):
    def identity(self):
        return {"site": str(self.site)}


@pytest.fixture
def planted(monkeypatch):
    """The experiment opens the planted model, dictionary and text whatever folder it is given."""
    made = p.planted()
    layout = SimpleNamespace(bos="none", skip_positions=1, model="planted")
    data = PlantedData(made.lm, made.tokenizer, p.SITE, made.rows, made.rows, layout)
    subject = Subject("planted", made.coder, data, np.arange(200), {})
    monkeypatch.setattr("experiments.search_features_run.open_subject", lambda *_, **__: subject)
    return subject


@pytest.fixture
def search(tmp_path):
    def run(**flags):
        out = tmp_path / "search"
        assert search_features.main(Flags("somewhere", out=out, overwrite=True, **flags)) == 0
        final = json.loads((out / "metrics.json").read_text())
        with (out / "features.csv").open(encoding="utf8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["feature"]) for row in rows[: len(final["features"])]] == [
            row["feature"] for row in final["features"]
        ]
        return final, rows

    return run


def lines(path, *texts):
    path.write_text("\n".join(texts) + "\n", encoding="utf8")
    return path


# Planted features


@pytest.mark.parametrize(
    ("feature", "flags"),
    [
        (p.TOKEN, {"tokens": (" king",)}),
        (p.TOKEN, {"regex": " king", "by": "correlation"}),
        (p.BIGRAM, {"regex": " New York", "ends": True}),
        (p.QUOTES, {"regex": " “[^”]*"}),
        (p.ANSWER, {"like_token": " tall"}),
        (p.TWIN, {"like_feature": p.ANSWER, "by": "encoder"}),
    ],
)
def test_the_planted_feature_is_first(planted, search, capsys, feature, flags):
    final, rows = search(**flags, count=3)
    assert final["features"][0]["feature"] == feature
    assert len(final["features"]) == 3
    assert len(rows) == p.N_FEATURES - ("like_feature" in flags)
    by = flags.get("by", "f1" if "tokens" in flags or "regex" in flags else "decoder")
    assert final["by"] == by
    assert final["features"][0][by] == pytest.approx(float(rows[0][by]))
    if by in ("f1", "correlation"):
        assert final["features"][0][by] > 0.9
        assert final["target_tokens"] > 50
    printed = capsys.readouterr().out
    assert f"80 features at resid_post.0, by {by}" in printed
    assert printed.split("fires most on\n")[1].split()[0] == str(feature)


def test_top_tokens(planted, search):
    final, _ = search(tokens=(" king", " is"), count=4)
    found = {row["feature"]: row["top_tokens"] for row in final["features"]}
    tokens = planted.data.evaluation[np.arange(200)]
    for feature, string in ((p.TOKEN, " king"), (p.WRONG, " is")):
        counted = int(((tokens.tokens == p.token(string)) & tokens.mask).sum())
        assert found[feature] == [[string, counted]]


def test_outlier_features_are_left_out(planted, search, monkeypatch):
    """With seven positions masked the position feature fires on the first token that counts, and on no other."""
    rows = dataclasses.replace(planted.data.evaluation, skip_positions=p.PLANTED_POSITION)
    subject = dataclasses.replace(planted, data=dataclasses.replace(planted.data, evaluation=rows))
    monkeypatch.setattr("experiments.search_features_run.open_subject", lambda *_, **__: subject)
    final, found = search(tokens=(" king",))
    assert final["features"][0]["feature"] == p.TOKEN
    assert str(p.POSITION) not in {row["feature"] for row in found}
    kept, all_of_them = search(tokens=(" king",), keep_outliers=True)
    left_out = {row["feature"] for row in all_of_them} - {row["feature"] for row in found}
    assert str(p.POSITION) in left_out
    assert len(left_out) == final["outlier_features_left_out"]
    assert "outlier_features_left_out" not in kept


@pytest.mark.parametrize("by", [None, "cross_entropy", "kl"])
def test_a_task(planted, search, tmp_path, by):
    task = [{"prompt": f" {w} deki Anna is", "right": " tall", "wrong": " short"} for w in ("bade", "kide", "lomu")]
    path = lines(tmp_path / "task.jsonl", *map(json.dumps, task))
    final, rows = search(task=path, by=by, verify=0)
    first = final["features"][0]
    assert first["feature"] == p.ANSWER
    assert first["active_in"] == final["prompts"] == 3
    assert first["logit_difference"] < -0.1
    assert first["logit_difference_estimated"] < -0.1
    assert first["kl"] > 0.01
    assert len(rows) == final["active_features"] == final["ablated_features"]
    assert search(task=path, by=by, verify=2, last_only=True)[0]["ablated_features"] == 2


@pytest.mark.parametrize("by", ["activation", "firing"])
def test_two_sets(planted, search, tmp_path, by):
    words = (" bade", " kide", " lomu", " mude", " muki")
    a = lines(tmp_path / "a.txt", *(f"{w} deki New York" for w in words))
    b = lines(tmp_path / "b.txt", *(f"{w} York New deki" for w in words))
    final, _ = search(prompts_a=a, prompts_b=b, by=by, permutations=200)
    assert final["prompts_a"] == final["prompts_b"] == 5
    row = next(row for row in final["features"] if row["feature"] == p.BIGRAM)
    assert row["p_family"] < 0.05
    assert row["mean_a"] > 0 == row["mean_b"]
    # It is constant in both sets: its effect is infinite, which JSON does not hold.
    assert row["effect"] is None
    final, _ = search(prompts_a=a, prompts_b=b, like_difference=True, by="encoder")
    assert final["search"] == "direction"


def test_a_pre_prompt(planted, search, tmp_path, capsys):
    pre = tmp_path / "pre.txt"
    pre.write_text(" bade “ deki", encoding="utf8")
    suffixes = lines(tmp_path / "suffixes.txt", " king kide lomu", " mude muki")
    final, _ = search(pre_prompt=pre, suffixes=suffixes, count=80)
    assert final["compared_tokens"] == 3
    row = next(row for row in final["features"] if row["feature"] == p.QUOTES)
    assert row["fired_behind"] == 1 > row["fired_alone"] == 0
    assert row["change"] == pytest.approx(4 / 3, rel=1e-3)
    assert len(row["places"]) == 3
    assert row["places"][0] in ("1:2 ' kide' 0.00 to 1.33", "1:3 ' lomu' 0.00 to 1.33", "2:2 ' muki' 0.00 to 1.33")
    assert "where (suffix:token)" in capsys.readouterr().out
    assert abs(final["features"][0]["change"]) >= abs(row["change"])


def test_outliers_do_not_count(planted, search, monkeypatch):
    """Above the norm of any place but those at which an answer is written, nothing is searched."""
    whole, _ = search(tokens=(" king",))
    bounded, _ = search(tokens=(" king",), max_norm=2.0)
    assert bounded["tokens"] < whole["tokens"]
    with pytest.raises(InputError, match="stands at none of the"):
        search(tokens=(" is",), max_norm=2.0)
    # As in training, where the dictionary says so.
    planted.provenance["max_norm"] = 2.0
    assert search(tokens=(" king",))[0]["tokens"] == bounded["tokens"]


# A trained dictionary


def run(dictionary, out, **changes):
    fields = {"eval_tokens": 2048, "out": out, "overwrite": True, **changes}
    assert search_features.main(Flags(dictionary, **fields)) == 0
    return json.loads((out / "metrics.json").read_text())


def test_a_run_against_plain_counting(autoencoder, tmp_path):
    final = run(autoencoder, tmp_path / "search", tokens=(" cat",), count=8)
    subject = open_subject(autoencoder, eval_tokens=2048)
    tokens, _, mask, _ = subject.data.evaluation[subject.numbers[: len(subject.numbers) // 8 * 8]]
    assert len(tokens) == len(subject.numbers)
    x = activations(subject.data.lm, jnp.array(tokens), subject.data.site)
    fires = np.asarray(subject.coder.encode(x[jnp.array(mask)])) > 0
    holds = tokens[mask] == subject.data.tokenizer.encode([" cat"])[0][0]
    assert final["target_tokens"] == holds.sum() > 20
    f1 = 2 * (fires & holds[:, None]).sum(axis=0) / (fires.sum(axis=0) + holds.sum())
    assert final["features"][0]["f1"] == pytest.approx(f1.max())
    for row in final["features"]:
        assert row["f1"] == pytest.approx(f1[row["feature"]])
    config = json.loads((tmp_path / "search" / "config.json").read_text())
    assert config["flags"]["tokens"] == [" cat"]
    assert config["resolved"]["search"] == "target"


def test_saelens_format(autoencoder, tmp_path):
    provenance = read_card(autoencoder)["provenance"]
    save_saelens(tmp_path / "theirs", load(autoencoder), provenance)
    ours = run(autoencoder, tmp_path / "ours", tokens=(" cat",))
    options = {"model": provenance["model"], "text": provenance["text"]}
    theirs = run(tmp_path / "theirs", tmp_path / "search", tokens=(" cat",), **options)
    assert [row["feature"] for row in theirs["features"]][:3] == [row["feature"] for row in ours["features"]][:3]
    np.testing.assert_allclose(theirs["features"][0]["f1"], ours["features"][0]["f1"])


# What cannot be


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "give one search: --tokens"),
        ({"tokens": (" a",), "regex": "b"}, "give one search"),
        ({"like_feature": 3, "like_token": " a"}, "give one search"),
        ({"tokens": (" a",), "task": "task.jsonl"}, "give one search"),
        ({"tokens": (" a",), "by": "kl"}, "--by kl: this search ranks by f1, precision"),
        ({"like_feature": 1, "by": "f1"}, "ranks by decoder, encoder"),
        ({"regex": "(a"}, "regular expression"),
        ({"tokens": (" a",), "count": 0}, "--count 0"),
        ({"tokens": (" a",), "verify": -1}, "--verify"),
        ({"tokens": (" a",), "max_norm": -1.0}, "--max-norm -1"),
    ],
)
def test_flags_that_cannot_be(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        search_features.main(Flags(tmp_path / "nothing", out=tmp_path / "search", **flags))
    assert not (tmp_path / "search").exists()


def test_files_that_cannot_be(tmp_path):
    a = lines(tmp_path / "a.txt", "one", "", "two")
    assert read_prompts(a, "--prompts-a") == ["one", "two"]
    assert read_prompts(lines(tmp_path / "a.jsonl", '{"text": "x\\ny"}', "", '{"text": "z"}'), "--a") == ["x\ny", "z"]
    for given, words in (
        ({"prompts_a": a}, "--prompts-a needs --prompts-b"),
        ({"prompts_b": a}, "--prompts-b needs --prompts-a"),
        ({"suffixes": a}, "--suffixes needs --pre-prompt"),
        ({"pre_prompt": a}, "--pre-prompt needs --suffixes"),
        ({"like_difference": True}, "--like-difference needs --prompts-a"),
        ({"pre_prompt": tmp_path / "none", "suffixes": a}, "--pre-prompt .*none cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            search_features.main(Flags(tmp_path, out=tmp_path / "search", **given))
    for text, words in (
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a", "right": "b"}', "line 1: give texts 'prompt', 'right', 'wrong'"),
        ("[1]", "line 1: give texts"),
        ('\n{"prompt": "a", "right": "b", "wrong": "b"}', "line 1: the right and the wrong"),
        ("  \n", "is empty"),
    ):
        with pytest.raises(InputError, match=words):
            read_task(lines(tmp_path / "task.jsonl", text))
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "none", "--pre-prompt")


def test_what_only_the_subject_tells(planted, search, tmp_path):
    for flags, words in (
        ({"tokens": (" king is",)}, r"--tokens ' king is' is 2 tokens \(' king', ' is'\)"),
        ({"tokens": ("\n",), "max_norm": 1e-3}, "the target stands at none"),
        ({"like_feature": 80}, "the dictionary has 0 to 79"),
        ({"like_token": " tall king"}, "--like-token ' tall king' is 2 tokens"),
    ):
        with pytest.raises(InputError, match=words):
            search(**flags)
    task = lines(tmp_path / "task.jsonl", json.dumps({"prompt": " bade is", "right": " tall is", "wrong": " old"}))
    with pytest.raises(InputError, match="answer ' tall is' is 2 tokens"):
        search(task=task)
    assert not (tmp_path / "search").exists()


def test_a_dictionary_without_encoder(planted, search):
    fista = Fista(n_features=80).sized(p.D)
    coder = Normalised(fista, fista.init(jax.random.key(0)), Normaliser(jnp.zeros(p.D), jnp.float32(1)))
    object.__setattr__(planted, "coder", coder)
    with pytest.raises(InputError, match="a fista dictionary has no encoder directions"):
        search(like_feature=3, by="encoder")
