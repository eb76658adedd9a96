"""A dictionary with its model and text: what is shared, what a flag overrides, what controls are fitted from."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments.feature_panels import best_rules, parts_of, valued
from experiments.reading import CONTROLS, check_features, controls, open_subject
from sparse_jax.activations import Statistics
from sparse_jax.errors import InputError

TOKENS = 1024


@pytest.fixture(scope="module")
def subject(autoencoder):
    return open_subject(autoencoder, eval_tokens=TOKENS)


def write_text(path, seed):
    """30 documents of random words, other ones for each seed."""
    rng = np.random.default_rng(seed)
    words = np.array("king queen castle river mountain winter summer letter carriage fortune".split())
    path.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(words, 400))}) for _ in range(30)))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return [write_text(folder / f"{seed}.jsonl", seed) for seed in (1, 2)]


def test_one_model_and_text_for_dictionaries_of_the_same(autoencoder, subject, texts):
    again = open_subject(autoencoder, eval_tokens=TOKENS, like=subject)
    assert again.data.lm is subject.data.lm
    assert again.data.evaluation is subject.data.evaluation
    elsewhere = open_subject(autoencoder, {"site": "resid_post.1"}, eval_tokens=TOKENS, like=subject)
    assert str(elsewhere.data.site) == "resid_post.1"
    assert elsewhere.data.lm is subject.data.lm
    other = open_subject(autoencoder, {"text": str(texts[0])}, eval_tokens=TOKENS, like=subject)
    assert other.data.evaluation is not subject.data.evaluation


def test_a_text_that_is_given_is_read(autoencoder, texts, tmp_path):
    """Also where training measured on another text."""
    trained_on, measured_on = map(str, texts)
    folder = tmp_path / "dictionary"
    shutil.copytree(next((autoencoder / "dictionaries").iterdir()), folder)
    (card,) = folder.glob("*.json")
    content = json.loads(card.read_text())
    content["provenance"]["eval_text"] = measured_on
    card.write_text(json.dumps(content))
    assert open_subject(folder, eval_tokens=TOKENS).data.flags.eval_text == measured_on
    given = open_subject(folder, {"text": trained_on}, eval_tokens=TOKENS)
    assert given.data.flags.eval_text is None
    assert all("1.jsonl" in name or name.startswith("1") for name in given.data.evaluation.documents)
    both = open_subject(folder, {"text": trained_on, "eval_text": measured_on}, eval_tokens=TOKENS)
    assert both.data.flags.eval_text == measured_on


def test_controls_are_of_the_site_that_is_read(autoencoder, subject):
    own, saved = controls(subject, 4), Statistics.load(autoencoder / "statistics.npz")
    assert tuple(own) == CONTROLS
    np.testing.assert_allclose(own["neurons"].params["mean"], saved.mean, rtol=1e-6)
    elsewhere = open_subject(autoencoder, {"site": "resid_post.1"}, eval_tokens=TOKENS, like=subject)
    assert np.abs(np.asarray(controls(elsewhere, 4)["neurons"].params["mean"]) - saved.mean).max() > 0.01


def test_numbers_of_features(subject):
    n = subject.coder.dictionary.n_features
    check_features(subject.coder, (0, n - 1))
    with pytest.raises(InputError, match=f"features {n}: the dictionary has 0 to {n - 1}"):
        check_features(subject.coder, (0, n))


def test_parts_have_no_more_firings_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr("experiments.feature_panels.FIRINGS_AT_ONCE", 10)
    parts = parts_of(np.array([3, 5, 6, 9, 11]), np.array([4, 6, 1, 40, 2]))
    assert [part.tolist() for part in parts] == [[3, 5], [6], [9], [11]]


def test_rules_in_parts_are_those_of_all(subject, monkeypatch):
    features = np.arange(0, 20)
    strings = subject.data.tokenizer.token_strings(np.arange(subject.data.lm.config.vocab_size))
    fired = np.full(20, 100)
    whole = best_rules(subject, features, fired, subject.numbers, strings, float("inf"))
    monkeypatch.setattr("experiments.feature_panels.FIRINGS_AT_ONCE", 700)
    parts = best_rules(subject, features, fired, subject.numbers, strings, float("inf"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.words(7, strings) == parts.words(7, strings)


def test_ids_without_a_token_are_not_named():
    effects = np.array([[0.0, 3.0, 1.0, 9.0], [1.0, 0.0, -1.0, -9.0]])
    found = valued(["a", "b", "c"], effects, 2, "up", "down")
    assert found["up"] == [(("b", 3.0), ("c", 1.0)), (("a", 1.0), ("b", 0.0))]
    assert found["down"][1][0] == ("c", -1.0)
