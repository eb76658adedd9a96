"""Pages of all features of a tiny dictionary: what they say beside plain counting, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import features
from experiments.features import Flags
from experiments.reading import open_subject
from sparse_jax.activations import activations
from sparse_jax.errors import InputError
from sparse_jax.features.collected import Collected
from sparse_jax.lm import Edit, at, cross_entropy, forward, scale_features

TOKENS = 2048


@pytest.fixture(scope="module")
def done(autoencoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "features"
    flags = Flags(autoencoder, eval_tokens=TOKENS, effect_tokens=256, rule_tokens=TOKENS, out=out)
    assert features.main(flags) == 0
    return flags, json.loads((out / "metrics.json").read_text())


def called(path) -> list:
    """The arguments of the one call in a data file."""
    return json.loads("[" + re.fullmatch(r"\w+\((.*)\);\n", path.read_text(), re.DOTALL)[1] + "]")


def plain_codes(subject, numbers):
    tokens, targets, mask, _ = subject.data.evaluation[numbers]
    x = activations(subject.data.lm, jnp.array(tokens), subject.data.site)
    codes = np.asarray(subject.coder.encode(x.reshape(-1, x.shape[-1]))).reshape(*tokens.shape, -1)
    return tokens, targets, mask, np.maximum(codes, 0)


def test_figures_are_those_of_plain_counting(done):
    flags, final = done
    subject = open_subject(flags.dictionary, eval_tokens=TOKENS)
    rows = subject.numbers[: len(subject.numbers) // 8 * 8]
    assert len(rows) == len(subject.numbers)
    _, _, mask, codes = plain_codes(subject, rows)
    fired = (codes[mask] > 0).sum(axis=0)
    assert final["tokens"] == mask.sum()
    assert final["firing"] == (fired > 0).sum() > 0
    assert final["l0"] == pytest.approx(fired.sum() / mask.sum())
    collected = Collected.load(flags.out / "collected.npz")
    np.testing.assert_array_equal(collected.fired, fired)
    (index,) = called(flags.out / "features" / "index-data.js")
    assert index["numbers"] == np.flatnonzero(fired).tolist()
    np.testing.assert_allclose(index["density"], fired[fired > 0] / mask.sum(), rtol=1e-3)
    assert [name for name, _ in index["scores"]] == ["rule F1", "rule corr."]
    assert index["effect"] is not None
    assert any(words.startswith("rule: the token") for words in index["explanations"])
    shards = sorted(path.name for path in (flags.out / "features").glob("shard-*.js"))
    panels = [panel for name in shards for panel in called(flags.out / "features" / name)[2]]
    assert [panel["index"] for panel in panels] == index["numbers"]
    assert all(panel["raised"] and panel["contexts"] for panel in panels)


def test_the_effect_is_the_rise_of_the_cross_entropy(done):
    flags, _ = done
    subject = open_subject(flags.dictionary, eval_tokens=TOKENS)
    (index,) = called(flags.out / "features" / "index-data.js")
    data, some = subject.data, subject.numbers[: 256 // subject.data.evaluation.context]
    tokens, targets, mask, codes = plain_codes(subject, some)
    counted = mask & (targets >= 0)

    def ce(edits):
        logits = forward(data.lm, jnp.array(tokens), edits=edits).logits
        return float(np.asarray(cross_entropy(logits, jnp.array(np.maximum(targets, 0))))[counted].mean())

    feature = int(np.argmax(codes[counted].sum(axis=0)))
    ablated = Edit(
        data.site, scale_features, (subject.coder, jnp.array([feature]), jnp.zeros(1)), at(mask=jnp.array(mask))
    )
    rise = ce([ablated]) - ce([])
    assert abs(rise) > 1e-4
    assert index["effect"][index["numbers"].index(feature)] == pytest.approx(rise, abs=2e-5, rel=1e-2)


def test_more_can_be_put_on_the_pages(later, autoencoder, tmp_path):
    """What features need, what causes them, and explanations of another run with their scores."""
    explained = tmp_path / "explained"
    explained.mkdir()
    lines = [
        {"basis": "neurons", "feature": 1, "explanation": "of a neuron", "scores": {}},
        {"basis": "dictionary", "feature": 3, "skipped": "too few"},
    ]
    subject = open_subject(later, eval_tokens=512)
    _, _, mask, codes = plain_codes(subject, subject.numbers)
    number = int((codes * mask[..., None]).max(axis=(0, 1)).argmax())
    scores = {"explained": {"simulation": {"top": 0.1, "both": 0.5}, "detection": {"accuracy": 0.75}, "fuzzing": {}}}
    lines.append({"basis": "dictionary", "feature": number, "explanation": "words </script>", "scores": scores})
    (explained / "explanations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "pages"
    flags = Flags(
        later, eval_tokens=512, effect_tokens=0, rule_tokens=512, need_texts=1, earlier=autoencoder, cause_texts=1,
        causes=3, explanations=explained, out=out,
    )  # fmt: skip
    assert features.main(flags) == 0
    (index,) = called(out / "features" / "index-data.js")
    at = index["numbers"].index(number)
    assert index["explanations"][at].startswith("words </script> · rule: ")
    assert all("of a neuron" not in words for words in index["explanations"])
    by_name = {name: column[at] for name, column in index["scores"]}
    assert (by_name["simulation"], by_name["detection"]) == (0.5, 0.75)
    assert "fuzzing" not in by_name
    shards = sorted((out / "features").glob("shard-*.js"))
    panels = {panel["index"]: panel for path in shards for panel in called(path)[2]}
    assert len(panels[number]["needs"]) == 1
    assert 1 <= len(panels[number]["causes"]) <= 3
    assert all(drop >= 0 for _, drop, *_ in panels[number]["causes"][:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_tokens": 0}, "--eval-tokens 0"),
        ({"effect_tokens": -1}, "--effect-tokens -1"),
        ({"max_norm": 0.0}, "--max-norm 0.0"),
        ({"top": 0}, "--top 0"),
        ({"need_texts": -1}, "--need-texts -1"),
        ({"explanations": Path("nowhere")}, "--explanations nowhere: no run of experiments.explain is there"),
        ({"site": "resid_post.9"}, "layers 0 to 1"),
    ],
)
def test_wrong_flags(autoencoder, tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        features.main(Flags(autoencoder, out=out, **changes))
    assert not out.exists()


def test_memory_is_limited(autoencoder, tmp_path):
    with pytest.raises(InputError, match=r"more than the limit of 0\.00.*--memory-gb"):
        features.main(Flags(autoencoder, eval_tokens=TOKENS, memory_gb=1e-3, out=tmp_path / "run"))


@pytest.mark.parametrize("inside", [False, True])
def test_the_dictionary_that_is_read_is_not_overwritten(autoencoder, tmp_path, inside):
    run = tmp_path / "run"
    shutil.copytree(autoencoder, run)
    read = next((run / "dictionaries").iterdir()) if inside else run
    with pytest.raises(InputError, match="holds what is read"):
        features.main(Flags(read, eval_tokens=TOKENS, out=run, overwrite=True))
    assert (run / "dictionaries").is_dir()
    other = tmp_path / "other"
    (other / "training").mkdir(parents=True)  # not of this experiment
    features.main(Flags(read, eval_tokens=512, effect_tokens=0, rule_tokens=0, out=other, overwrite=True))
    assert (other / "training").is_dir()


def test_a_used_folder_is_refused(done):
    with pytest.raises(InputError, match="already holds a run"):
        features.main(done[0])
