"""What is asked of a language model, what comes back, and replies that are numbered lines."""

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple


class Request(NamedTuple):
    """One question.

    kind: "explain", "simulation", "detection" or "fuzzing".
    system, user: the two messages.
    max_tokens: where the reply is cut.
    expected_tokens: about how long the reply will be, for the estimate of costs.
    values: the reply holds small integers whose log-probabilities are wanted.
    """

    kind: str
    system: str
    user: str
    max_tokens: int
    expected_tokens: int
    values: bool = False


@dataclass(frozen=True)
class Reply:
    """What came back, as it is kept.

    Attributes:
        text: the message.
        finish: why it ended ("stop", "length", ...).
        usage: tokens by kind, as the endpoint counts them.
        model: the model that answered, by its own name.
        tokens: the tokens of the message, each with its alternatives that are an integer from 0 to 10 (text ->
            log-probability), None at tokens without a digit; None where the endpoint gave no log-probabilities.
    """

    text: str
    finish: str | None = None
    usage: dict[str, int] | None = None
    model: str | None = None
    tokens: list[tuple[str, dict[str, float] | None]] | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Reply":
        tokens = content.get("tokens")
        return cls(**{**content, "tokens": tokens and [(token, alternatives) for token, alternatives in tokens]})


# A line begins with its number and ends with its value: what stands between is not read.
_LINE = re.compile(r"^[^\S\n]*(\d+)\b.*?(?<![\d.,/-])(\d{1,2})[^\S\n]*$", re.MULTILINE)


def numbered_values(text: str, count: int, largest: int) -> dict[int, tuple[int, int]]:
    """The values of numbered lines: number - 1 -> (value, where in the text it stands).

    Lines out of range, and values above `largest`, are left out; of a number that comes twice the first counts.
    """
    found: dict[int, tuple[int, int]] = {}
    for match in _LINE.finditer(text):
        number, value = int(match[1]), int(match[2])
        if 1 <= number <= count and value <= largest:
            found.setdefault(number - 1, (value, match.start(2)))
    return found


def numbered(items: list[str]) -> str:
    """Items as numbered lines; quoted, so that each stays on its line."""
    return "\n".join(f"{i}\t{quoted(item)}" for i, item in enumerate(items, 1))


def quoted(text: str) -> str:
    """In double quotes, with line breaks and quotes escaped."""
    return json.dumps(text, ensure_ascii=False)
