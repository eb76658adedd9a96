"""The model and the texts that come with the package, so that everything runs without a network. See README.md here."""

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent

# The pseudo-text that is all the embedded texts, one after the other.
EVERYTHING = "embedded"


@dataclass(frozen=True)
class Text:
    """One embedded text.

    path: the `.txt.gz` file, documents separated by `<|endoftext|>`.
    names: the documents' names, in the file's order.
    held_out: the names kept for evaluation; nothing is ever trained on them.
    """

    path: Path
    names: tuple[str, ...]
    held_out: frozenset[str]


def _text(name: str, file: str, titles: tuple[str, ...], held_out: tuple[str, ...]) -> Text:
    named = {title: f"{name}/{title}" for title in titles}
    return Text(_FOLDER / "text" / file, tuple(named.values()), frozenset(named[title] for title in held_out))


MODELS: dict[str, Path] = {"novel-neox": _FOLDER / "novel_neox"}
# Tokens in the rows each was trained on. It has more positions, but never learned to use them.
TRAINED_CONTEXT: dict[str, int] = {"novel-neox": 256}

TEXTS: dict[str, Text] = {
    "austen": _text(
        "austen",
        "austen.txt.gz",
        (
            "Emma",
            "Mansfield Park",
            "Northanger Abbey",
            "Persuasion",
            "Pride and Prejudice",
            "Sense and Sensibility",
        ),
        ("Persuasion", "Pride and Prejudice"),
    ),
    "state-of-the-union": _text(
        "state-of-the-union",
        "state_of_the_union.txt.gz",
        tuple(str(place) for place in range(1, 250)),
        # The last nine addresses: the embedded model was not trained on them either.
        tuple(str(place) for place in range(241, 250)),
    ),
}

HELD_OUT: frozenset[str] = frozenset().union(*(text.held_out for text in TEXTS.values()))
DOCUMENT_NAMES: frozenset[str] = frozenset(name for text in TEXTS.values() for name in text.names)
