"""Simulation: the activations that a feature would have if an explanation were all there is to it.

A language model sees an explanation and the tokens of a text and estimates the activation at each, as an integer from
0 to 10. Where the endpoint gives log-probabilities the estimate is the expected value over the integers among the
alternatives it lists, sum_v p(v) v / sum_v p(v), which is finer than the integer it wrote. All tokens of a text are
estimated in one reply.

Source: Bills et al. 2023, "Simulate"; the expected value is theirs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from sparse_jax.features.explain import prompts
from sparse_jax.features.explain.cost import count_tokens
from sparse_jax.features.explain.examples import LARGEST
from sparse_jax.features.explain.requests import Reply, Request, numbered, numbered_values

Kind = Literal["expected", "integer", "mixed", "none"]

# Of a line of the reply beyond what it repeats: a tab and an integer, and room for what models add.
TOKENS_A_LINE, ROOM_A_LINE = 2, 16


@dataclass(frozen=True)
class Simulation:
    """Estimates for one text.

    Attributes:
        values: `[tokens]` from 0 to 10; 0 where the reply says nothing.
        kind: "expected": all are expected values over log-probabilities; "integer": all are the integers that were
            written; "mixed"; "none": the reply has no estimate.
        missing: tokens that the reply says nothing of.
    """

    values: Float64[np.ndarray, " tokens"]
    kind: Kind
    missing: int


def request(explanation: str, tokens: Sequence[str]) -> Request:
    """The question that a simulation answers."""
    expected = count_tokens(numbered(list(tokens))) + TOKENS_A_LINE * len(tokens)
    limit = expected + ROOM_A_LINE * len(tokens)
    return Request("simulation", prompts.SIMULATE_SYSTEM, prompts.simulate(explanation, tokens), limit, expected, True)


def read(reply: Reply, count: int) -> Simulation:
    """The estimates in a reply for `count` tokens."""
    # The tokens' own text, so that places in it are places in tokens even where a token is half a character.
    text = reply.text if reply.tokens is None else "".join(token for token, _ in reply.tokens)
    values, expected = np.zeros(count), 0
    found = numbered_values(text, count, LARGEST)
    if reply.tokens is not None and len(written := numbered_values(reply.text, count, LARGEST)) > len(found):
        # Tokens by names that are not their text: no place in them can be found.
        reply, found = Reply(reply.text), written
    ends = np.cumsum([len(token) for token, _ in reply.tokens or ()])
    for number, (value, place) in found.items():
        mean = _expected(reply.tokens, ends, place, value) if reply.tokens else None
        values[number] = value if mean is None else mean
        expected += mean is not None
    kinds = {0: "integer", len(found): "expected"}
    return Simulation(values, kinds.get(expected, "mixed") if found else "none", count - len(found))


def _expected(tokens: list, ends: np.ndarray, place: int, value: int) -> float | None:
    """The expected value at a place of the reply; None where no integer is among the alternatives.

    Some tokenizers write 10 as two tokens: then the alternative 1 stands for 1 and 10, in the shares that the
    alternatives of the token behind it say.
    """
    at = int(np.searchsorted(ends, place, side="right"))
    masses = _masses(tokens[at][1])
    total = sum(masses.values())
    if not total > 0:
        return None
    if value == LARGEST and not tokens[at][0].strip().endswith("10"):
        behind = _masses(tokens[at + 1][1]) if at + 1 < len(tokens) else {}
        ten = min(1.0, behind.get(0, 1.0))
        one = masses.pop(1, 0.0)
        masses[1], masses[LARGEST] = one * (1 - ten), masses.get(LARGEST, 0.0) + one * ten
    return sum(mass * number for number, mass in masses.items()) / total


def _masses(alternatives: dict[str, float] | None) -> dict[int, float]:
    """Integer from 0 to 10 -> the probability of all alternatives that say it."""
    masses: dict[int, float] = {}
    for text, logprob in (alternatives or {}).items():
        number = text.strip()
        if number.isascii() and number.isdigit() and len(number) <= 2 and int(number) <= LARGEST:
            masses[int(number)] = masses.get(int(number), 0.0) + math.exp(logprob)
    return masses
