"""What a study will cost, before the first question is asked.

Tokens are counted by a rule, for the judge's tokenizer is not at hand: a run of letters with the space before it is one
token for every eight letters begun, a run of digits one for every three, any other run of signs one for every two, a
line break or tab one. On prompts like these that is within about a tenth of what byte-level tokenizers make of English.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_jax.errors import InputError
from sparse_jax.features.explain.requests import Request

# What the chat format adds to a question of two messages.
FORMAT_TOKENS = 11
_PIECE = re.compile(r" ?([^\W\d_]+)| ?(\d+)|(\s+)| ?([^\w\s]+|_+)")
_SIZES = (8, 3, 8, 2)


def count_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return sum(
        -(-len(group) // size)
        for match in _PIECE.finditer(text)
        for group, size in zip(match.groups(), _SIZES)
        if group
    )


@dataclass(frozen=True)
class Estimate:
    """Calls to be made and tokens in them.

    Attributes:
        calls: questions that are not answered yet.
        cached: questions whose replies are there already.
    repeated: questions that are the same as another one, and are asked with it.
        prompt_tokens: in the questions.
        completion_tokens: expected in the replies.
        completion_limit: in the replies if each is as long as it may be.
    """

    calls: int = 0
    cached: int = 0
    repeated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    completion_limit: int = 0

    @property
    def questions(self) -> int:
        """All of them."""
        return self.calls + self.cached + self.repeated

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def estimate(requests: Sequence[Request], cached: Sequence[bool]) -> Estimate:
    """The estimate for some questions; those whose replies are there cost nothing."""
    left = [request for request, there in zip(requests, cached, strict=True) if not there]
    return Estimate(
        len(left),
        len(requests) - len(left),
        0,
        sum(count_tokens(request.system) + count_tokens(request.user) + FORMAT_TOKENS for request in left),
        sum(request.expected_tokens for request in left),
        sum(request.max_tokens for request in left),
    )


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens, in whatever currency; `limit`: stop before more than this is spent (None: never)."""

    prompt: float = 0.0
    completion: float = 0.0
    limit: float | None = None

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    def check(self, found: Estimate) -> None:
        """Refuse a study that may cost more than the limit.

        Raises:
            InputError: it may, if every reply is as long as it can be; or there is a limit but no price.
        """
        if self.limit is None:
            return
        if not (self.prompt > 0 or self.completion > 0):
            raise InputError("--max-cost needs prices: give --price-in and --price-out, per million tokens")
        at_most = self.of(found.prompt_tokens, found.completion_limit)
        if at_most > self.limit:
            raise InputError(
                f"{found.calls:,} calls may cost up to {at_most:.4g}, more than --max-cost {self.limit:.4g}: ask for "
                "fewer features, scores or bases, or raise it"
            )

    def words(self, found: Estimate) -> str:
        """The estimate in a few lines."""
        lines = [
            f"{found.calls:,} calls to make, {found.cached:,} answered already",
            f"about {found.prompt_tokens:,} prompt tokens and {found.completion_tokens:,} completion tokens "
            f"(at most {found.completion_limit:,}), counted by a rule",
        ]
        if self.prompt > 0 or self.completion > 0:
            likely = self.of(found.prompt_tokens, found.completion_tokens)
            at_most = self.of(found.prompt_tokens, found.completion_limit)
            lines.append(f"cost about {likely:.4g}, at most {at_most:.4g}")
        return "\n".join(lines)
