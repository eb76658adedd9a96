"""The whole experiment on a tiny model: what it leaves behind, against its own parts; what it refuses."""

import json

import numpy as np
import pytest

from experiments import attention_connections
from experiments.attention_connections import Flags
from experiments.reading import open_subject
from sparse_jax.connectors.attention_codes import collect_attention
from sparse_jax.errors import InputError
from tests.experiments.conftest import trained


@pytest.fixture(scope="module")
def pair(model, text, tmp_path_factory):
    """The run folders of small dictionaries before and after attention of layer 1."""
    folder = tmp_path_factory.mktemp("runs")
    return tuple(trained(model, text, folder / site, site) for site in ("resid_post.0", "attn_out.1"))


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "connections"
    flags = Flags(*pair, eval_tokens=1536, trios=5, checks=16, mlp_epochs=2, mlp_width=8, slots=32, out=out)
    assert attention_connections.main(flags) == 0
    return out


def test_what_a_run_leaves(finished, pair):
    figures = json.loads((finished / "metrics.json").read_text())
    subject, after = (
        open_subject(path, {"site": site}, eval_tokens=1536) for path, site in zip(pair, ("resid_pre.1", "attn_out.1"))
    )
    found = collect_attention(subject.data.lm, 1, subject.data.evaluation, subject.numbers, subject.coder, after.coder)
    assert figures["tokens"] == len(found) == subject.data.evaluation[subject.numbers].mask.sum()
    assert figures["layer"] == 1
    assert figures["overflow"] == {"before": 0, "after": 0}
    assert set(figures["heads"]) == {"0", "1"}
    np.testing.assert_allclose([head["own"] for head in figures["heads"].values()], found.own, rtol=1e-5)
    explained = figures["same_position"]
    assert explained["linear"]["targets"] > 3
    assert explained["linear"]["pooled"] > explained["mean"]["pooled"]
    assert explained["mean"]["pooled"] <= 0.01
    assert set(figures["checks"]) == {"strongest", "random"}
    check = figures["checks"]["strongest"]["output, head, scale frozen"]
    assert check["places"] == 16
    assert check["correlation"] > 0.5
    trios = json.loads((finished / "trios.json").read_text())
    assert len(trios) == sum(head["trios"] for head in figures["heads"].values()) > 5
    for head in (0, 1):
        sizes = [abs(each["strength"]) for each in trios if each["head"] == head]
        assert sizes == sorted(sizes, reverse=True)
        assert figures["heads"][str(head)]["strongest"] == pytest.approx(sizes[0], rel=1e-3)
    codes = found.before.dense(slice(None))[:, trios[0]["query"]]
    sums = np.bincount(found.tokens.token, codes)
    (best,) = subject.data.tokenizer.token_strings([sums.argmax()])
    assert trios[0]["query_tokens"][0] == best
    r2 = json.loads((finished / "same_position.json").read_text())["r2"]
    assert sum(value is not None for value in r2["linear"]) == explained["linear"]["targets"]
    maps = json.loads((finished / "maps.json").read_text())
    assert len(maps["1"]["qk"]) == len(maps["1"]["ov"]) == 5
    page = (finished / "report.html").read_text()
    for part in ("Head 1: trios", "Trios checked by intervention", "largest OV entries", "explains least"):
        assert part in page


def test_what_is_refused(pair, autoencoder, tmp_path):
    before, after = pair
    for flags, words in (
        (Flags(before, autoencoder), "is of resid_post.0; around the attention of layer 0"),
        (Flags(after, after), "is of attn_out.1; around"),
        (Flags(before, after, layer=0), "around the attention of layer 0"),
        (Flags(before, after, heads=(2,), eval_tokens=512), "heads 0 to 1"),
        (Flags(before, after, held_out=1.0), "--held-out"),
        (Flags(before, after, trios=0), "--trios"),
        (Flags(before, after, eval_tokens=32), "two documents"),
    ):
        changed = attention_connections.Flags(**{**vars(flags), "out": tmp_path / "out"})
        with pytest.raises(InputError, match=words):
            attention_connections.main(changed)
    assert not (tmp_path / "out").exists()
