"""Fuzzing: are these the tokens that a feature is active at? Asks for the place, where detection asks for the text.

Every text in which the feature is active is shown twice, in different batches: once with its active tokens marked and
once with as many others (or all, where there are fewer), drawn from those at which it is silent. So the judge cannot
tell from the text alone.

Source: Paulo et al. 2024, "Automatically interpreting millions of features in large language models".
"""

from collections.abc import Sequence

import numpy as np

from sparse_jax.features.explain import judging, prompts
from sparse_jax.features.explain.examples import Example
from sparse_jax.features.explain.judging import BATCH, Item
from sparse_jax.features.explain.requests import Request

KIND = "fuzzing"


def batches(active: Sequence[Example], maximum: float, seed: tuple[int, ...]) -> list[list[Item]]:
    """Batches in which no text comes twice and about half are marked rightly.

    Texts that are silent at none of their counted tokens are left out: nothing could be marked wrongly.
    """
    generator = np.random.default_rng(seed)
    both = []
    for example in (active[i] for i in generator.permutation(len(active))):
        right = example.active(maximum)
        silent = np.flatnonzero(np.asarray(example.counts) & (example.activations <= 0))
        if not right.any() or not len(silent):
            continue
        wrong = np.zeros_like(right)
        wrong[generator.permutation(silent)[: int(right.sum())]] = True
        both.append((Item(example.marked(right), True), Item(example.marked(wrong), False)))
    out = []
    for start in range(0, len(both), BATCH):
        part = both[start : start + BATCH]
        first = generator.permutation(np.arange(len(part)) % 2)
        out += [[pair[side] for pair, side in zip(part, sides)] for sides in (first, 1 - first)]
    return out


def request(explanation: str, batch: Sequence[Item]) -> Request:
    """The question about a batch of marked texts."""
    user = prompts.judge(explanation, [item.text for item in batch], prompts.FUZZ_YES)
    return judging.request(KIND, prompts.FUZZ_SYSTEM, user, batch)
