"""Whole studies against the rule finder: features that a token decides score high, noise does not."""

import json

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.explain import Cache, Case, Client, Endpoint, Example, study, summarise
from sparse_jax.features.explain.cost import count_tokens
from sparse_jax.features.explain.explain import read, token_means, top_tokens
from sparse_jax.features.explain.fragments import Fragments
from sparse_jax.features.explain.requests import Reply
from sparse_jax.features.explain.selection import Protocol, select
from tests.features.explain.endpoint import Server

LENGTH, N = 64, 400
SEED = (7,)


def make_case(basis, feature, codes, tokens, names) -> Case:
    """A case from codes `[fragments, tokens]`, one fragment a row and document."""
    fragments = Fragments(
        LENGTH,
        np.arange(N, dtype=np.int64),
        np.zeros(N, np.int32),
        tokens.astype(np.int32),
        np.ones((N, LENGTH), bool),
        np.repeat(np.arange(N), 2).reshape(N, 2).astype(np.int32),
    )
    found = select(codes.max(axis=1), fragments, Protocol(), (feature,))
    shown = lambda part: tuple(  # noqa: E731
        Example(
            tuple(names[t] for t in tokens[i]), codes[i].astype(np.float32), fragments.counts[i], i, 0, f"document {i}"
        )
        for i in part
    )
    parts = (shown(part) for part in (found.explaining, found.top, found.random, found.silent))
    active = int((codes.max(axis=1) > 0).sum())
    return Case(basis, feature, float(codes.max()), 0.1, 1.0, active, *parts, found.disjoint_by)


@pytest.fixture(scope="module")
def cases():
    """Five features that a token each decides, and five that are noise at a tenth of the tokens; 300 kinds of token."""
    generator = np.random.default_rng(0)
    names = [f" {chr(97 + i // 26 % 26)}{chr(97 + i % 26)}{i}" for i in range(300)]
    names[17] = "\n"
    tokens = generator.integers(0, 300, (N, LENGTH))
    made = []
    for feature in range(5):
        codes = np.where(tokens == 15 + feature, generator.uniform(0.8, 1.0, tokens.shape), 0)
        made.append(make_case("dictionary", feature, codes, tokens, names))
    for feature in range(5):
        codes = generator.exponential(size=tokens.shape) * (generator.random(tokens.shape) < 0.05)
        codes[: N // 5] = 0  # there must be silent fragments
        made.append(make_case("random", 10 + feature, codes, tokens, names))
    return made


def run(server, cases, cache=None, scores=study.SCORES, baselines=("shuffled", "top-tokens"), **fields):
    endpoint = Endpoint(server.url, "judge", key_env="NO_SUCH_KEY", concurrency=4, **fields)
    client = Client(endpoint, Cache(None) if cache is None else cache)
    return study.run(client, cases, scores, baselines, SEED)


@pytest.fixture(scope="module")
def studied(cases):
    with Server() as server:
        return *run(server, cases), server.bodies


def test_planted_features_score_high_and_noise_does_not(cases, studied):
    explanations, found, _ = studied
    assert explanations[2] == 'the token "\\n"'
    summary = summarise(cases, found)
    planted, noise = (summary[basis]["explained"] for basis in ("dictionary", "random"))
    for name in ("top", "random", "both"):
        assert planted["simulation"][name]["mean"] > 0.9
        assert planted["simulation"][name]["n"] == 5
    assert abs(noise["simulation"]["random"]["mean"]) < 0.1
    assert abs(noise["simulation"]["both"]["mean"]) < 0.2
    for score in ("detection", "fuzzing"):
        assert planted[score]["accuracy"]["mean"] > 0.9
        assert abs(noise[score]["accuracy"]["mean"] - 0.5) < 0.15
        assert planted[score]["unanswered"] == 0


def test_baselines(cases, studied):
    summary = summarise(cases, studied[1])["dictionary"]
    assert abs(summary["shuffled"]["simulation"]["both"]["mean"]) < 0.1
    assert abs(summary["shuffled"]["detection"]["accuracy"]["mean"] - 0.5) < 0.2
    assert summary["top-tokens"]["simulation"]["both"]["mean"] > 0.9
    assert summary["token-means"]["simulation"]["both"]["mean"] > 0.9
    assert summary["constant"]["simulation"]["both"] == {"mean": 0.0, "error": 0.0, "n": 5}
    assert set(summary["constant"]) == set(summary["token-means"]) == {"simulation"}
    noise = summarise(cases, studied[1])["random"]
    assert abs(noise["token-means"]["simulation"]["random"]["mean"]) < 0.15


def test_a_borrowed_explanation_is_anothers_of_the_same_basis(cases):
    found = study.partners(cases, SEED)
    assert sorted(found) == list(range(10))
    assert all(cases[i].basis == cases[j].basis and i != j for i, j in enumerate(found))
    assert study.partners(cases[:1], SEED) == [None]
    assert study.partners(cases, (8,)) != found


def test_expected_values_and_integers_are_named(cases):
    for with_logprobs, asked, kind in ((True, True, "expected"), (False, True, "integer"), (True, False, "integer")):
        with Server(with_logprobs) as server:
            _, found = run(server, cases[:1], scores=("simulation",), baselines=(), logprobs=asked)
            sent = [json.loads(body) for body in server.bodies]
        assert found[0]["explained"]["simulation"]["values"] == {kind: 10}
        summary = summarise(cases[:1], found)["dictionary"]["explained"]["simulation"]
        assert summary["values"] == {kind: 10}
        assert summary["missing_tokens"] == 0
        # Only simulations need them.
        assert sum("logprobs" in body for body in sent) == (10 if asked else 0)
    # The score is that of the expected values: 9.8 for a 10, 0.1 for a 0.
    case = cases[0]
    simulated = [np.where(np.array(e.tokens) == " ap15", 9.8, 0.1) for e in case.top]
    due = np.corrcoef(np.concatenate(simulated), np.concatenate([e.activations for e in case.top]))[0, 1]
    with Server() as server:
        _, found = run(server, cases[:1], scores=("simulation",), baselines=())
    assert found[0]["explained"]["simulation"]["top"] == pytest.approx(due)


def test_no_prompt_of_a_score_shows_what_was_explained_from(cases, studied):
    for case in cases:
        explained = {(e.row, e.start) for e in case.explaining}
        assert not explained & {(e.row, e.start) for e in (*case.scored, *case.silent)}
    bodies = [json.loads(body)["messages"][-1]["content"] for body in studied[2]]
    shown = [body for body in bodies if "Active tokens and how strongly" in body]
    assert len(shown) == 10
    plain = lambda text: text.replace("[[", "").replace("]]", "")  # noqa: E731
    case = cases[0]
    (mine,) = (body for body in shown if plain(case.explaining[0].text) in plain(body))
    assert all(plain(e.text) in plain(mine) for e in case.explaining)
    assert not any(plain(e.text) in plain(mine) for e in (*case.scored, *case.silent))


@pytest.mark.parametrize("baselines", [(), ("shuffled", "top-tokens")])
def test_what_is_estimated_is_what_is_sent(cases, baselines, tmp_path):
    cases = cases[:4]
    endpoint = lambda server: Endpoint(server.url, "judge", key_env="NO_SUCH_KEY")  # noqa: E731
    with Server() as server, Cache(tmp_path / "replies.jsonl") as cache:
        before = study.plan(cases, study.SCORES, baselines, SEED, endpoint(server), cache.get)
        run(server, cases, cache, baselines=baselines)
        calls = sum(server.bodies.values())
        assert before.questions == 4 * (1 + 14 * (1 + len(baselines)))
        # Top tokens of a planted feature are what the rule finder says: the same questions, asked once.
        assert all(top_tokens(case.explaining) == explanation_of(cache, server, case) for case in cases)
        a_case = 10 + 2 + 2
        assert before.calls == 4 * (1 + a_case * (1 + len(baselines)))
        assert calls == before.calls - (4 * a_case if baselines else 0)
        sent = [json.loads(body)["messages"] for body in server.bodies]
        tokens = sum(count_tokens(m["content"]) for messages in sent for m in messages) + 11 * len(sent)
        assert before.prompt_tokens / before.calls == pytest.approx(tokens / calls, rel=0.1)
        after = study.plan(cases, study.SCORES, baselines, SEED, endpoint(server), cache.get)
        assert (after.calls, after.cached, after.prompt_tokens) == (0, calls, 0)
        assert after.questions == before.questions
        run(server, cases, cache, baselines=baselines)
        assert sum(server.bodies.values()) == calls


def explanation_of(cache, server, case):
    endpoint = Endpoint(server.url, "judge", key_env="NO_SUCH_KEY")
    return read(Reply.from_json(cache.get(endpoint.cache_key(study.explain_request(case)))))


def test_a_study_without_silent_fragments_has_no_detection(cases):
    import dataclasses

    case = dataclasses.replace(cases[0], silent=cases[0].silent[:2])
    with Server() as server:
        _, found = run(server, [case], baselines=())
    assert found[0]["explained"]["detection"] is None
    assert found[0]["explained"]["fuzzing"]["accuracy"] > 0.9
    assert summarise([case], found)["dictionary"]["explained"]["detection"] == {}


def test_a_model_that_says_nothing_has_no_score(cases):
    said = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]})
    with Server() as server:
        server.faults = [(200, {}, said)]
        explanations, found = run(server, cases[:1], baselines=())
        assert sum(server.bodies.values()) == 1
    assert explanations == [""]
    assert found[0]["explained"] == {"simulation": None, "detection": None, "fuzzing": None}


def test_a_refusal_ends_the_study(cases):
    with Server() as server:
        server.faults = [(400, {}, "{}")]
        with pytest.raises(InputError, match="HTTP 400"):
            run(server, cases)


def test_explanations_without_a_model():
    counts = np.array([True, True, True, False])
    examples = [
        Example((" a", " b", " a", " c"), np.array([1.0, 0.0, 3.0, 0.0], np.float32), counts, 0, 0, "x"),
        Example((" b", " b", " d", " d"), np.array([0.0, 2.5, 0.0, 0.0], np.float32), counts, 1, 0, "x"),
    ]
    assert token_means(examples) == {" a": 2.0, " b": pytest.approx(2.5 / 3), " d": 0.0}
    assert top_tokens(examples) == 'the tokens " a", " b"'
    assert top_tokens(examples, 1) == 'the token " a"'
    assert read(Reply("  Kings,\n and  queens ")) == "Kings, and queens"
