"""Detection: which of several texts is a feature active in? Cheaper than simulation: one short line a text.

Source: Paulo et al. 2024, "Automatically interpreting millions of features in large language models".
"""

from collections.abc import Sequence

from sparse_jax.features.explain import judging, prompts
from sparse_jax.features.explain.examples import Example
from sparse_jax.features.explain.judging import Item
from sparse_jax.features.explain.requests import Request

KIND = "detection"


def items(active: Sequence[Example], silent: Sequence[Example]) -> list[Item]:
    """Texts in which the feature is active, and in which it is not."""
    return [Item(e.text, True) for e in active] + [Item(e.text, False) for e in silent]


def request(explanation: str, batch: Sequence[Item]) -> Request:
    """The question about a batch of texts."""
    user = prompts.judge(explanation, [item.text for item in batch], prompts.DETECT_YES)
    return judging.request(KIND, prompts.DETECT_SYSTEM, user, batch)
