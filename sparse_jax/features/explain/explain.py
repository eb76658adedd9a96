"""Explanations: a phrase for what a feature stands for, from a language model or without one.

Source: Bills et al. 2023 (the explainer sees strong texts with their activations).
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from sparse_jax.features.explain import prompts
from sparse_jax.features.explain.examples import Example
from sparse_jax.features.explain.requests import Reply, Request, quoted

# An explanation is a phrase: what a model writes beyond this is cut.
MAX_TOKENS, EXPECTED_TOKENS, MAX_CHARACTERS = 120, 25, 400


def request(examples: Sequence[Example], maximum: float) -> Request:
    """The question that an explanation answers; `maximum` is the feature's activation that counts as 10."""
    return Request("explain", prompts.EXPLAIN_SYSTEM, prompts.explain(examples, maximum), MAX_TOKENS, EXPECTED_TOKENS)


def read(reply: Reply) -> str:
    """The explanation, on one line; empty where the model gave none."""
    return " ".join(reply.text.split())[:MAX_CHARACTERS]


def token_means(examples: Sequence[Example]) -> dict[str, float]:
    """Token -> its mean activation in the texts, of tokens that count: what a table can know without a judge."""
    values = defaultdict(list)
    for example in examples:
        for token, value, counts in zip(example.tokens, example.activations, example.counts):
            if counts:
                values[token].append(float(value))
    return {token: float(np.mean(each)) for token, each in values.items()}


def top_tokens(examples: Sequence[Example], count: int = 5) -> str:
    """An explanation that no language model wrote: the tokens with the largest summed activation in the texts."""
    sums = defaultdict(float)
    for example in examples:
        for token, value in zip(example.tokens, example.activations):
            sums[token] += float(value)
    best = sorted((token for token in sums if sums[token] > 0), key=lambda token: (-sums[token], token))[:count]
    return f"the tokens {', '.join(map(quoted, best))}" if len(best) != 1 else f"the token {quoted(best[0])}"
