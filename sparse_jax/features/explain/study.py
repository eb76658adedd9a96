"""A study: explain every case, score each explanation, and score what it must be better than.

    explained       the explanation that a language model wrote from the case's fragments
    shuffled        the explanation of another feature of the same basis, drawn at random
    top-tokens      the tokens with the largest summed activation as the explanation: no model writes, one judges
    token-means     the mean activation of each token in the explaining fragments as the simulation: no model at all
    constant        the same number at every token: no model at all, 0 by definition

The first three are scored by a judge in the same way; the others have scores of simulation only. Requests are made here
and nowhere else, so that what is estimated is what is sent.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparse_jax.features.explain import detection, explain, fuzzing, judging, simulate
from sparse_jax.features.explain.cases import DETECTION, FUZZING, SHUFFLE, Case
from sparse_jax.features.explain.client import Client, Endpoint
from sparse_jax.features.explain.cost import Estimate, estimate
from sparse_jax.features.explain.requests import Reply, Request
from sparse_jax.features.explain.scores import simulation_scores

SCORES = ("simulation", "detection", "fuzzing")
# Explanations that a judge scores, and simulations that need none.
EXPLAINED, SHUFFLED, TOP_TOKENS = "explained", "shuffled", "top-tokens"
TOKEN_MEANS, CONSTANT = "token-means", "constant"
# What stands for an explanation that is not there yet, in an estimate: about as long as explanations are.
PLACEHOLDER = "words such as these, of about the length that explanations have, where something is named in a text"
# A silent text fewer than these makes no share worth reporting.
LEAST_SILENT = 3


def partners(cases: Sequence[Case], seed: tuple[int, ...]) -> list[int | None]:
    """For each case another of the same basis whose explanation it borrows; None where there is none."""
    found: list[int | None] = [None] * len(cases)
    for number, basis in enumerate(dict.fromkeys(case.basis for case in cases)):
        members = [i for i, case in enumerate(cases) if case.basis == basis]
        order = np.random.default_rng((*seed, SHUFFLE, number)).permutation(members).tolist()
        if len(order) > 1:
            for one, other in zip(order, order[1:] + order[:1]):
                found[one] = other
    return found


def explain_request(case: Case) -> Request:
    """The question that asks for a case's explanation."""
    return explain.request(case.explaining, case.maximum)


def _detection_batches(case: Case, seed: tuple[int, ...]) -> list[list[judging.Item]]:
    if len(case.silent) < LEAST_SILENT:
        return []
    return judging.batches(detection.items(case.scored, case.silent), (*seed, DETECTION, case.feature))


def _fuzzing_batches(case: Case, seed: tuple[int, ...]) -> list[list[judging.Item]]:
    return fuzzing.batches(case.scored, case.maximum, (*seed, FUZZING, case.feature))


_JUDGED = {"detection": (detection.request, _detection_batches), "fuzzing": (fuzzing.request, _fuzzing_batches)}


def score_requests(case: Case, explanation: str, score: str, seed: tuple[int, ...]) -> list[Request]:
    """The questions of one score; none where the case has not the texts for it, or there is no explanation."""
    if not explanation:
        return []
    if score == "simulation":
        return [simulate.request(explanation, example.tokens) for example in case.scored]
    request, batches = _JUDGED[score]
    return [request(explanation, batch) for batch in batches(case, seed)]


def read_score(case: Case, score: str, replies: Sequence[Reply], seed: tuple[int, ...]) -> dict[str, Any] | None:
    """The figures of one score from the replies to `score_requests`; None where nothing was asked."""
    if not replies:
        return None
    if score == "simulation":
        found = [simulate.read(reply, len(e.tokens)) for reply, e in zip(replies, case.scored, strict=True)]
        pairs = list(zip(case.scored, (each.values for each in found)))
        kinds = Counter(each.kind for each in found)
        figures = simulation_scores(pairs[: len(case.top)], pairs[len(case.top) :])
        return figures | {"values": dict(kinds), "missing_tokens": sum(each.missing for each in found)}
    verdict = judging.read(replies, _JUDGED[score][1](case, seed))
    return {"accuracy": verdict.accuracy, "unanswered": verdict.unanswered}


def without_judge(case: Case) -> dict[str, dict[str, Any]]:
    """Simulations that ask no language model, and their scores."""
    means = explain.token_means(case.explaining)
    simulations = {
        TOKEN_MEANS: lambda example: np.array([means.get(token, 0.0) for token in example.tokens]),
        CONSTANT: lambda example: np.ones(len(example.tokens)),
    }
    found = {}
    for name, simulation in simulations.items():
        top, random = ([(e, simulation(e)) for e in part] for part in (case.top, case.random))
        found[name] = {"simulation": simulation_scores(top, random)}
    return found


def subjects(cases: Sequence[Case], explanations: Sequence[str], baselines: Sequence[str], seed: tuple[int, ...]):
    """(number of the case, name, explanation) of all that a judge scores."""
    borrowed = partners(cases, seed)
    for i, case in enumerate(cases):
        yield i, EXPLAINED, explanations[i]
        if SHUFFLED in baselines and borrowed[i] is not None:
            yield i, SHUFFLED, explanations[borrowed[i]]
        if TOP_TOKENS in baselines:
            yield i, TOP_TOKENS, explain.top_tokens(case.explaining)


def plan(
    cases: Sequence[Case],
    scores: Sequence[str],
    baselines: Sequence[str],
    seed: tuple[int, ...],
    endpoint: Endpoint,
    cached: Callable[[str], dict | None],
) -> Estimate:
    """What the study has still to ask.

    The number of calls is exact, unless questions turn out to be the same: those are asked once. Where an explanation
    is not there yet, one of usual length stands for it in the questions that score it.

    Args:
        cases, scores, baselines, seed: of the study.
        endpoint: says under which key a reply is kept.
        cached: key -> reply, or None.
    """
    known = list(map(explain_request, cases))
    explanations = []
    for case in cases:
        reply = cached(endpoint.cache_key(explain_request(case)))
        explanations.append(PLACEHOLDER if reply is None else explain.read(Reply.from_json(reply)))
    waiting = []  # of an explanation that is not there: all placeholders look alike, their questions are not
    for i, _, explanation in subjects(cases, explanations, baselines, seed):
        for score in scores:
            to_ask = waiting if explanation == PLACEHOLDER else known
            to_ask += score_requests(cases[i], explanation, score, seed)
    asked = {endpoint.cache_key(request): request for request in known}
    found = estimate(list(asked.values()), [cached(key) is not None for key in asked])
    return found + estimate(waiting, [False] * len(waiting)) + Estimate(repeated=len(known) - len(asked))


def run(
    client: Client,
    cases: Sequence[Case],
    scores: Sequence[str],
    baselines: Sequence[str],
    seed: tuple[int, ...],
    progress: Callable[[], Any] = lambda: None,
) -> tuple[list[str], list[dict[str, dict]]]:
    """Explain and score.

    Args:
        client: whom to ask.
        cases: what to explain.
        scores: of SCORES.
        baselines: of SHUFFLED, TOP_TOKENS.
        seed: decides the order of judged texts, wrong marks, and whose explanation is borrowed.
        progress: called after every reply.

    Returns:
        Explanations, and for each case: name of what is scored -> score -> figures (None: it has not the texts).

    Raises:
        InputError: what `Client.ask` raises.
    """
    explanations = [explain.read(reply) for reply in client.ask_all(list(map(explain_request, cases)), progress)]
    jobs, requests = [], []
    for i, name, explanation in subjects(cases, explanations, baselines, seed):
        for score in scores:
            mine = score_requests(cases[i], explanation, score, seed)
            jobs.append((i, name, score, len(requests), len(requests) + len(mine)))
            requests += mine
    replies = client.ask_all(requests, progress)
    found: list[dict[str, dict]] = [{} for _ in cases]
    for i, name, score, start, stop in jobs:
        found[i].setdefault(name, {})[score] = read_score(cases[i], score, replies[start:stop], seed)
    for case, of_case in zip(cases, found):
        of_case.update(without_judge(case))
    return explanations, found
