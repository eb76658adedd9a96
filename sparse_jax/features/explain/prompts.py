"""The words in which language models are asked. Nothing else in the package puts words into a prompt."""

from collections.abc import Sequence

from sparse_jax.features.explain.examples import Example
from sparse_jax.features.explain.requests import numbered, quoted

FEATURE = (
    "A feature of a language model is a number that the model computes at each token of a text. It is 0 at most tokens "
    "and larger the more strongly something that the feature stands for is present there."
)

EXPLAIN_SYSTEM = f"{FEATURE} You find out what a feature stands for from texts in which it is active."

EXPLAIN_TASK = (
    "What does this feature stand for? Look for what the active tokens, or the words just before them, have in common, "
    "and weigh strong activations more than weak ones. If one particular token makes it active wherever it stands, "
    "name that token in quotes. Answer with one phrase of at most twenty words and nothing else."
)

SIMULATE_SYSTEM = (
    f"{FEATURE} You are told what a feature stands for, and estimate how active it is at each token of a text, as an "
    "integer from 0 (silent) to 10 (as active as it ever is). At each token only that token and those before it matter."
)

SIMULATE_TASK = (
    "Repeat every line and add a tab and your estimate, an integer from 0 to 10, at its end. Most estimates should be "
    "0. Write nothing else."
)

DETECT_SYSTEM = (
    f"{FEATURE} You are told what a feature stands for, and decide for each of several texts whether the feature is "
    "active anywhere in it. Any number of them may be, all or none included."
)

FUZZ_SYSTEM = (
    f"{FEATURE} You are told what a feature stands for, and see texts in which some tokens stand between [[ and ]]. "
    "Decide for each text whether the marked tokens are the ones at which the feature is active. In some texts they "
    "are, in others they were marked at random."
)

JUDGE_TASK = "Answer with one line for each text: its number, a tab, and {yes} or 0 if not. Write nothing else."


def explain(examples: Sequence[Example], maximum: float) -> str:
    """Texts with their active tokens, and the question."""
    parts = []
    for number, example in enumerate(examples, 1):
        levels, where = example.levels(maximum), example.active(maximum)
        listed = "; ".join(f"{quoted(example.tokens[i])} {max(1, levels[i])}" for i in range(len(levels)) if where[i])
        parts.append(
            f"Text {number}, active tokens between [[ and ]]:\n{quoted(example.marked(where))}\n"
            f"Active tokens and how strongly, from 1 to 10: {listed}"
        )
    return "\n\n".join([*parts, EXPLAIN_TASK])


def simulate(explanation: str, tokens: Sequence[str]) -> str:
    """The explanation, the tokens as numbered lines, and the task."""
    return f"The feature stands for: {explanation}\n\nTokens of the text:\n{numbered(list(tokens))}\n\n{SIMULATE_TASK}"


def judge(explanation: str, texts: Sequence[str], yes: str) -> str:
    """The explanation, texts as numbered lines, and the task; `yes` says when the answer is 1."""
    task = JUDGE_TASK.format(yes=yes)
    return f"The feature stands for: {explanation}\n\nTexts:\n{numbered(list(texts))}\n\n{task}"


DETECT_YES = "1 if the feature is active in it"
FUZZ_YES = "1 if the marked tokens are right"
