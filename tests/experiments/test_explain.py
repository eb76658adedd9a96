"""Whole runs on a tiny model with planted features, against an endpoint that reads its prompts."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import explain
from experiments.explain import Flags
from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Normalised, save
from sparse_jax.errors import InputError
from sparse_jax.lm.tokenizer import load_tokenizer
from tests.experiments.conftest import CONFIG, write_model
from tests.features.explain.endpoint import Server

KEY = "sk-test-0123456789abcdef"
PLANTED, WIDTH = 4, CONFIG["hidden_size"]
WORDS = """should little great before the and that was her with for not had but she his him they have from this
were which when their been would there what will could very some more than into upon time only must such
after most over might other being these first where never those well down house made said know good much
every own think long back""".split()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(dictionary, text, the planted tokens): four features that read a token each, two that never fire.

    The first four numbers of the residual say which planted token stands there; the others are the mean of what came
    before, which no token decides.
    """
    folder = tmp_path_factory.mktemp("planted")
    model = write_model(folder / "model")
    tokenizer = load_tokenizer(model)
    ids = {word: tokenizer.encode([" " + word])[0] for word in WORDS}
    words = [word for word, found in ids.items() if len(found) == 1]
    assert len(words) > 50
    tensors = load_file(model / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith(("attention.dense.weight", "attention.dense.bias")):
            weight *= 40
            weight[:PLANTED] = 0
        elif "query_key_value" in name:
            heads = CONFIG["num_attention_heads"]
            weight.reshape(heads, 3, WIDTH // heads, -1)[:, :2] = 0
            if weight.ndim == 2:
                weight[:, :PLANTED] = 0
        elif "dense_4h_to_h" in name:
            weight[...] = 0
        elif name.endswith("embed_in.weight"):
            weight *= 0.05
            weight[:, :PLANTED] = 0
            for i in range(PLANTED):
                weight[ids[words[i]][0], i] = 0.5
    save_file(tensors, model / "model.safetensors")
    generator = np.random.default_rng(0)
    documents = [" " + " ".join(generator.choice(words, 300)) for _ in range(52)]
    text, train = folder / "text.txt", folder / "train.txt"
    text.write_text("<|endoftext|>".join(documents[:40]))
    train.write_text("<|endoftext|>".join(documents[40:]))
    n = PLANTED + 2
    W = np.eye(n, WIDTH, dtype=np.float32)
    bias = np.where(np.arange(n) < PLANTED, -0.2, -1e3).astype(np.float32)
    params = {"W_enc": W.T, "W_dec": W, "b_enc": bias, "b_dec": np.zeros(WIDTH, np.float32)}
    coder = Normalised(
        L1(n_features=n).sized(WIDTH),
        {name: jnp.array(value) for name, value in params.items()},
        Normaliser(jnp.zeros(WIDTH), jnp.ones(())),
    )
    provenance = {"model": str(model), "site": "resid_post.0", "text": str(train), "eval_text": str(text)}
    provenance["context"] = 64
    save(folder / "dictionary", coder, provenance)
    return folder / "dictionary", text, words[:PLANTED]


def flags(planted, out, server=None, **changes):
    given = {"fragment": 32, "count": 6, "basis": ("dictionary", "random"), "eval_tokens": 20_000, "out": out}
    if server is not None:
        given |= {"base_url": server.url, "judge": "rule-finder", "key_env": "NO_SUCH_KEY"}
    return Flags(planted[0], **{**given, **changes})


def results(out):
    lines = [json.loads(line) for line in (out / "explanations.jsonl").read_text().splitlines()]
    return json.loads((out / "metrics.json").read_text()), lines


@pytest.fixture(scope="module")
def run(planted, tmp_path_factory):
    """(out, the endpoint) of a whole run with a key, on which two calls fail at first."""
    out = tmp_path_factory.mktemp("run") / "run"
    os.environ["EXPLAIN_TEST_KEY"] = KEY
    with Server(key=KEY) as server:
        server.faults = [None, (429, {"Retry-After": "1"}, '{"error": {"message": "slow down"}}'), None, "drop"]
        assert explain.main(flags(planted, out, server, key_env="EXPLAIN_TEST_KEY")) == 0
    del os.environ["EXPLAIN_TEST_KEY"]
    return out, server


def test_planted_features_are_found_and_random_directions_are_not(planted, run):
    final, lines = results(run[0])
    of_dictionary = [line for line in lines if line["basis"] == "dictionary" and "explanation" in line]
    assert {line["feature"]: line["explanation"] for line in of_dictionary} == {
        i: f'the token " {word}"' for i, word in enumerate(planted[2])
    }
    figures, noise = (final["bases"][basis]["explained"] for basis in ("dictionary", "random"))
    for name in ("top", "random", "both"):
        assert figures["simulation"][name]["mean"] > 0.9
        assert abs(noise["simulation"][name]["mean"]) < 0.1
        assert figures["simulation"][name]["n"] == PLANTED
    for score in ("detection", "fuzzing"):
        assert figures[score]["accuracy"]["mean"] > 0.9
    assert abs(noise["fuzzing"]["accuracy"]["mean"] - 0.5) < 0.15
    assert abs(final["bases"]["dictionary"]["shuffled"]["simulation"]["both"]["mean"]) < 0.1
    assert figures["simulation"]["values"] == {"expected": 10 * PLANTED}
    assert final["explained_by"] == "language model rule-finder"


def test_what_is_skipped_is_counted(run):
    final, lines = results(run[0])
    assert final["features"]["dictionary"] == PLANTED
    assert final["active_enough"]["dictionary"] == {"of": PLANTED + 2, "enough": PLANTED}
    assert final["skipped"]["dictionary"] == {"fewer than 20 active fragments": 2}
    skipped = {line["feature"] for line in lines if line["basis"] == "dictionary" and "skipped" in line}
    assert skipped == {PLANTED, PLANTED + 1}


def test_explaining_and_scoring_texts_share_no_document(run):
    final, lines = results(run[0])
    for line in lines:
        if "fragments" in line:
            parts = {name: {(p["document"], p["row"]) for p in part} for name, part in line["fragments"].items()}
            scored = parts["top"] | parts["random"] | parts["silent"]
            assert not {row for _, row in parts["explaining"]} & {row for _, row in scored}
            if line["disjoint_by"] == "document":
                assert not {name for name, _ in parts["explaining"]} & {name for name, _ in scored}
    assert final["disjoint_by"]["document"] > 0


def test_a_busy_and_a_dropped_call_are_made_again(run):
    out, server = run
    final, _ = results(out)
    assert final["paid"]["retries"] == 2
    assert set(server.answered.values()) == {1}
    assert sum(server.bodies.values()) == len(server.bodies) + 2


def test_what_was_estimated_was_sent(run):
    out, server = run
    final, _ = results(out)
    # The same question twice (a list of one top token is what the rule finder says) is asked once.
    assert final["paid"]["calls"] == len(server.answered) <= final["estimated"]["calls"]
    assert final["estimated"]["cached"] == 0
    cases = sum(final["features"].values())
    assert final["estimated"]["calls"] == cases * (1 + 3 * 12) + 2 * sum(
        3 for line in results(out)[1] if len(line.get("fragments", {}).get("silent", ())) >= 3
    )


def test_the_key_is_in_no_file(run):
    out, server = run
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers_seen)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        *("config.json", "explanations.jsonl", "metrics.json", "replies.jsonl", "report.html")
    }
    assert all(KEY.encode() not in path.read_bytes() for path in files)
    assert "EXPLAIN_TEST_KEY" in (out / "config.json").read_text()


def test_the_page_shows_explanations_and_scores(planted, run):
    page = (run[0] / "report.html").read_text()
    assert all(f"the token &quot; {word}&quot;" in page or f'the token " {word}"' in page for word in planted[2])
    assert "dictionary, explained" in page
    assert "random, shuffled" in page
    assert "expected values over log-probabilities" in page


def test_again_costs_nothing(planted, run, tmp_path):
    """With --overwrite and with --resume: replies stay, and so does what is made of them."""
    out, before = run[0], results(run[0])
    with Server() as server:
        address = json.loads((out / "config.json").read_text())["flags"]["base_url"]
        for changes in ({"resume": True}, {"overwrite": True}):
            # Nobody is at the old address: a call would fail.
            assert explain.main(flags(planted, out, server, base_url=address, tries=1, **changes)) == 0
            after = results(out)
            assert after[0]["bases"] == before[0]["bases"]
            assert after[1] == before[1]
            assert after[0]["paid"]["calls"] == 0
            assert after[0]["estimated"]["calls"] == 0
    with pytest.raises(InputError, match="seed: 0 there, 1 now"):
        explain.main(flags(planted, out, server, base_url=address, resume=True, seed=1))
    with pytest.raises(InputError, match="already holds a run"):
        explain.main(flags(planted, out, server, base_url=address))


@pytest.mark.slow
def test_killed_and_resumed_nothing_is_paid_twice(planted, run, tmp_path):
    out, stop_at, killed = tmp_path / "run", 21, threading.Event()

    def gate(sent):
        """After so many replies nobody gets another: as soon as all are on the disk the process is killed."""
        if sent < stop_at:
            return
        deadline = time.monotonic() + 60
        while not killed.is_set() and (out / "replies.jsonl").read_bytes().count(b"\n") < stop_at:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed.set()
        raise ConnectionError("the client is gone")

    score, basis = ("simulation", "detection"), ("dictionary",)
    with Server(gate=gate) as first:
        command = [sys.executable, "-m", "experiments.explain", str(planted[0]), "--base-url", first.url]
        command += ["--judge", "rule-finder", "--key-env", "NO_SUCH_KEY", "--fragment", "32", "--count", "6"]
        command += ["--score", *score, "--basis", *basis, "--eval-tokens", "20000", "--out", str(out), "--baselines"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            assert process.wait(120) == -signal.SIGKILL
    assert len(first.answered) == stop_at
    assert not (out / "metrics.json").exists()
    # As if the kill had cut a line.
    with (out / "replies.jsonl").open("ab") as file:
        file.write(b'{"key": "abc", "kind": "exp')
    with Server(port=first.server_port) as server:
        given = flags(planted, out, server, score=score, basis=basis, baselines=(), resume=True)
        assert explain.main(given) == 0
    assert not set(server.bodies) & set(first.answered)
    assert set(server.bodies.values()) == {1}
    final, lines = results(out)
    assert final["paid"]["calls"] == len(server.answered) == PLANTED * (1 + 10 + 2) - stop_at
    complete, all_lines = results(run[0])
    for score in ("simulation", "detection"):
        explained = (each["bases"]["dictionary"]["explained"][score] for each in (final, complete))
        assert next(explained) == next(explained)
    assert [line["explanation"] for line in lines[:PLANTED]] == [line["explanation"] for line in all_lines[:PLANTED]]


def test_an_estimate_asks_and_writes_nothing(planted, tmp_path, capsys):
    with Server() as server:
        given = flags(planted, tmp_path / "out", server, estimate=True, price_in=1.0, price_out=2.0, features=(1, 2))
        assert explain.main(Flags(**{**vars(given), "basis": ("dictionary",)})) == 0
        said = capsys.readouterr().out
        calls = 2 * (1 + 3 * 14)
        assert f"{calls} calls to make, 0 answered already" in said
        assert re.search(r"cost about 0\.\d+, at most 0\.\d+", said)
        with pytest.raises(InputError, match="more than --max-cost"):
            explain.main(flags(planted, tmp_path / "out", server, price_in=1.0, price_out=2.0, max_cost=1e-4))
        assert not server.bodies
    assert not (tmp_path / "out").exists()


def test_without_an_endpoint_a_rule_explains_and_says_so(planted, tmp_path):
    out = tmp_path / "out"
    given = flags(planted, out, features=(3, 0, 5), basis=("dictionary", "neurons"))
    assert explain.main(given) == 0
    final, lines = results(out)
    assert final["judge"] is None
    assert final["explained_by"].startswith("rule: ")
    assert "no language model" in final["explained_by"]
    assert [line["feature"] for line in lines if line["basis"] == "dictionary"] == [3, 0, 5]
    assert lines[0]["explanation"] == f"the token: ' {planted[2][3]}'"
    assert set(final["bases"]["dictionary"]) == {"rule", "token-means", "constant"}
    assert final["bases"]["dictionary"]["rule"]["other half"]["correlation"]["mean"] > 0.9
    assert final["bases"]["neurons"]["rule"]["other half"]["correlation"]["n"] > 0
    assert final["bases"]["dictionary"]["token-means"]["simulation"]["both"]["mean"] > 0.9
    assert not (out / "replies.jsonl").exists()
    assert "no language model" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": None}, "--base-url needs --judge"),
        ({"base_url": None}, "need an endpoint"),
        ({"base_url": "nowhere"}, "--base-url 'nowhere'"),
        ({"key_env": KEY}, "never the key itself"),
        ({"extra": "{"}, "--extra is no JSON"),
        ({"extra": "[]"}, "--extra: give a JSON object"),
        ({"count": 0}, "--count 0"),
        ({"score": ()}, "at least one --score"),
        ({"basis": ("neurons", "neurons")}, "--basis has the same twice"),
        ({"features": (6,)}, "features 6: the dictionary has 0 to 5"),
        ({"fragment": 65}, "fragments of 65 tokens do not fit rows of 64"),
        ({"features": (4, 5), "basis": ("dictionary",)}, "no feature is active in enough fragments"),
    ],
)
def test_what_cannot_be(planted, tmp_path, changes, words):
    with Server() as server, pytest.raises(InputError, match=words) as caught:
        explain.main(flags(planted, tmp_path / "out", server, **changes))
    assert KEY not in str(caught.value)
    assert not server.bodies
    assert not (tmp_path / "out").exists()
