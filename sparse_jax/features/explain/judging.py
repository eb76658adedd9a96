"""Texts that a judge answers yes or no to, in mixed batches: what detection and fuzzing share."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparse_jax.features.explain.requests import Reply, Request, numbered_values

# Texts in one question, and tokens of an answer's line.
BATCH, TOKENS_A_LINE = 10, 4


class Item(NamedTuple):
    """A text to be judged.

    text: as the judge sees it.
    truth: whether the right answer is yes.
    """

    text: str
    truth: bool


class Verdict(NamedTuple):
    """How well the answers agree with the truth.

    accuracy: the mean of the share of yes-texts that were found and of no-texts that were refused: 0.5 is chance,
        whatever the numbers of both. A text without an answer counts as answered wrongly.
    unanswered: texts without an answer.
    """

    accuracy: float
    unanswered: int


def batches(items: Sequence[Item], seed: tuple[int, ...]) -> list[list[Item]]:
    """The items in random order, BATCH at a time (the last ones fewer)."""
    order = np.random.default_rng(seed).permutation(len(items))
    return [[items[i] for i in order[start : start + BATCH]] for start in range(0, len(order), BATCH)]


def request(kind: str, system: str, user: str, batch: Sequence[Item]) -> Request:
    """The question about a batch."""
    expected = TOKENS_A_LINE * len(batch)
    return Request(kind, system, user, 4 * expected + 64, expected)


def read(replies: Sequence[Reply], asked: Sequence[Sequence[Item]]) -> Verdict:
    """The verdict over all batches; both answers must be right somewhere."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    unanswered = 0
    for reply, batch in zip(replies, asked, strict=True):
        found = numbered_values(reply.text, len(batch), 1)
        unanswered += len(batch) - len(found)
        for i, item in enumerate(batch):
            right[item.truth].append(i in found and bool(found[i][0]) == item.truth)
    return Verdict(float(np.mean([np.mean(each) for each in right.values()])), unanswered)
