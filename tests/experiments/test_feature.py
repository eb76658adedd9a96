"""What does feature 123 do? The command on a tiny dictionary, with causes from an earlier one, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import feature, feature_texts
from experiments.feature import Flags
from experiments.feature_run import line_of, needed
from experiments.reading import open_subject
from sparse_jax.errors import InputError
from sparse_jax.features.causes import causes
from sparse_jax.features.page import Context
from sparse_jax.lm import forward
from tests.experiments.test_features import plain_codes

TOKENS = 1024


@pytest.fixture(scope="module")
def subject(later):
    return open_subject(later, eval_tokens=TOKENS)


@pytest.fixture(scope="module")
def strongest(subject):
    """The feature with the largest activation, and its codes `[rows, position]`, 0 where the mask drops them."""
    tokens, _, mask, codes = plain_codes(subject, subject.numbers)
    codes = np.where(mask[..., None], codes, 0)
    number = int(codes.max(axis=(0, 1)).argmax())
    return number, codes[..., number], tokens


def test_a_feature(subject, strongest, autoencoder, tmp_path, capsys):
    number, codes, tokens = strongest
    flags = Flags(
        subject.path, features=(number,), earlier=autoencoder, eval_tokens=TOKENS, rule_tokens=TOKENS,
        effect_tokens=256, texts=2, cause_texts=3, out=tmp_path / "feature",
    )  # fmt: skip
    assert feature.main(flags) == 0
    said = capsys.readouterr().out
    (panel,) = json.loads((flags.out / "metrics.json").read_text())["features"]
    row, position = np.unravel_index(codes.argmax(), codes.shape)
    assert panel["maximum"] == pytest.approx(codes.max())
    context = panel["contexts"][0]["context"]
    assert context["activations"][context["peak"]] == pytest.approx(codes.max(), rel=1e-5)
    (token,) = subject.data.tokenizer.token_strings(tokens[row, position : position + 1])
    assert f"[[{token}]]" in said
    for words in (f"feature {number} of the l1 dictionary of resid_post.1", "rule: ", "ablating it changes",
                  "its direction raises", "caused by resid_post.0 feature", "needs"):  # fmt: skip
        assert words in said
    assert (flags.out / "features" / "index.html").is_file()
    assert len(panel["needs"]) == 2
    # Without the token before: the row as it is, one token shorter.
    data = subject.data
    shorter = np.delete(tokens[row], position - 1)[None, :position]
    x = forward(data.lm, shorter, capture=[data.site]).captured[str(data.site)][0, -1:]
    without = max(float(np.asarray(subject.coder.encode(x))[0, number]), 0)
    assert panel["needs"][0]["activations"][position - 1] == pytest.approx(codes.max() - without, abs=1e-3)


def test_effects_stand_at_the_tokens_of_the_strongest_texts(subject, strongest, tmp_path):
    number, codes, tokens = strongest
    out = tmp_path / "feature"
    flags = Flags(
        subject.path, features=(number,), eval_tokens=TOKENS, rule_tokens=0, effect_tokens=0, texts=1, out=out
    )
    assert feature.main(flags) == 0
    (panel,) = json.loads((out / "metrics.json").read_text())["features"]
    assert panel["effect"] is None
    assert panel["explanation"] == ""
    passage = panel["contexts"][0]
    row, position = np.unravel_index(codes.argmax(), codes.shape)
    first = position - passage["context"]["peak"]
    targets = subject.data.evaluation[subject.numbers[[row]]].targets[0]
    x = forward(subject.data.lm, tokens[[row]], capture=[subject.data.site]).captured[str(subject.data.site)]
    ablated = x - jnp.array(codes[row][None, :, None]) * subject.coder.directions()[number]

    def log_p(x):
        logits = np.asarray(forward(subject.data.lm, x, start=2).logits[0], np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits[np.arange(len(targets)), targets]

    due = (log_p(ablated) - log_p(x))[first : first + len(passage["effects"])]
    assert np.abs(due).max() > 1e-3
    np.testing.assert_allclose(passage["effects"], due, atol=1e-4)


def test_a_text_on_one_line():
    context = Context(("a", " b\n", " c"), (0.0, 2.5, 0.0), 1, "top")
    assert line_of(context) == "  2.50  a[[ b↵]] c"


def test_needed_tokens_are_those_that_cost_most():
    needs = Context(("a", "b", "c", "d", "e", "f"), (0.2, 0.9, -3.0, 0.5, 0.4, 2.0), 5, "needs")
    assert needed(needs) == "needs 'b' +0.9, 'd' +0.5, 'e' +0.4"
    assert needed(Context(("a", "b"), (0.1, 2.0), 1, "needs")) == "needs no single earlier token"


@pytest.mark.parametrize(
    ("features", "changes", "message"),
    [
        ((), {}, "give the number of a feature"),
        ((1, 1), {}, "several that differ"),
        ((-1,), {}, "features -1: the dictionary has 0 to"),
        ((10**6,), {}, "features 1000000"),
        ((1,), {"texts": 0}, "--texts 0"),
    ],
)
def test_wrong_flags(autoencoder, tmp_path, features, changes, message):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        feature.main(Flags(autoencoder, features=features, eval_tokens=TOKENS, out=out, **changes))
    assert not out.exists()


def test_what_is_called_earlier_must_be(autoencoder, later, tmp_path):
    flags = Flags(
        autoencoder, features=(1,), earlier=later, eval_tokens=TOKENS, rule_tokens=0, effect_tokens=0,
        out=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"site resid_post\.1 does not come before resid_post\.0"):
        feature.main(flags)
    assert not flags.out.exists()


def test_norms_of_the_later_site_say_nothing_of_the_earlier_one(subject, strongest, autoencoder, tmp_path, monkeypatch):
    given = []

    def spied(*arguments, max_norm):
        given.append(max_norm)
        return causes(*arguments, max_norm=max_norm)

    monkeypatch.setattr(feature_texts, "causes", spied)
    flags = Flags(
        subject.path, features=(strongest[0],), earlier=autoencoder, max_norm=1e6, eval_tokens=TOKENS, rule_tokens=0,
        effect_tokens=0, texts=1, cause_texts=2, out=tmp_path / "feature",
    )  # fmt: skip
    assert feature.main(flags) == 0
    assert given == [float("inf")]


def test_as_many_texts_as_are_asked_for(subject, strongest, tmp_path):
    number, codes, _ = strongest
    rows = int((codes > 0).any(axis=1).sum())
    assert rows > 25
    out = tmp_path / "feature"
    flags = Flags(
        subject.path, features=(number,), eval_tokens=TOKENS, rule_tokens=0, effect_tokens=0, texts=25, out=out
    )
    assert feature.main(flags) == 0
    (panel,) = json.loads((out / "metrics.json").read_text())["features"]
    assert len(panel["needs"]) == 25
