"""Panels as JavaScript data: short, in ASCII, and inert whatever a token holds.

Texts are numbers of a table of strings, for most tokens come again and again; numbers keep four digits, activations
three; what was not measured is null. Nothing of the text is ever a key, so that a name such as `__proto__` is a value.
"""

import json
import math
from collections.abc import Iterable, Sequence

from sparse_jax.features.page import Context
from sparse_jax.features.panels import FeaturePanel, Histogram, IndexRow, Passage, TokenHistogram
from sparse_jax.features.sections import pack_section

# Colours that stay apart; the firings on other tokens are counted with the rest.
COLOURED = 6


class Strings:
    """A table of texts without repetition: a text -> its number."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def table(self) -> list[str]:
        return list(self.numbers)


def script(function: str, *values) -> str:
    """A call of a global function with the values, as the text of a script.

    ASCII only, and without `<`: nothing in it ends the script, starts a comment or breaks a line, wherever it stands.
    """
    parts = (json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")) for value in values)
    return f"{function}({','.join(parts)});\n".replace("<", "\\u003c").replace(">", "\\u003e")


def number(value: float | None, digits: int = 4) -> float | int | None:
    """The value with so many significant digits; null where it is none: not measured, nan, infinite."""
    if value is None or not math.isfinite(value):
        return None
    if value == 0:  # most activations
        return 0
    short = float(f"{float(value):.{digits}g}")
    if not math.isfinite(short):  # rounded up from the largest number there is
        return float(value)
    return int(short) if short == int(short) and abs(short) < 1e15 else short


def _numbers(values: Iterable[float | None], digits: int = 4) -> list:
    return [number(value, digits) for value in values]


def _valued(pairs: Iterable[tuple[str, float]], strings: Strings) -> list:
    return [[strings(token), number(value)] for token, value in pairs]


def _context(context: Context, strings: Strings, effects: Sequence[float] = ()) -> list:
    packed = [
        strings(context.label),
        context.peak,
        [strings(token) for token in context.tokens],
        _numbers(context.activations, 3),
        strings(context.source),
    ]
    return [*packed, _numbers(effects, 3)] if effects else packed


def _passage(passage: Passage, strings: Strings) -> list:
    return _context(passage.context, strings, passage.effects)


def _token_histogram(histogram: TokenHistogram, strings: Strings) -> dict:
    beyond = zip(histogram.rest, *histogram.counts[COLOURED:])
    return {
        "edges": _numbers(histogram.edges),
        "tokens": [strings(token) for token in histogram.tokens[:COLOURED]],
        "counts": [[int(count) for count in counts] for counts in histogram.counts[:COLOURED]],
        "rest": [int(sum(counts)) for counts in beyond],
    }


def _histogram(histogram: Histogram) -> dict:
    return {"edges": _numbers(histogram.edges), "counts": [int(count) for count in histogram.counts]}


def pack(panel: FeaturePanel, strings: Strings) -> dict:
    """A panel as JSON has it; parts without content are absent."""
    packed = {
        "index": int(panel.index),
        "density": number(panel.density),
        "maximum": number(panel.maximum),
        "mean": number(panel.mean),
        "variance": number(panel.variance),
        "skew": number(panel.skew),
        "kurtosis": number(panel.kurtosis),
        "outlier": bool(panel.outlier),
        "explanation": panel.explanation,
        "effect": number(panel.effect),
        "scores": [[strings(name), number(value)] for name, value in panel.scores],
        "tops": _valued(panel.top_tokens, strings),
        "histogram": panel.histogram and _token_histogram(panel.histogram, strings),
        "contexts": [_passage(passage, strings) for passage in panel.contexts],
        "needs": [_context(context, strings) for context in panel.needs],
        "raised": _valued(panel.raised, strings),
        "lowered": _valued(panel.lowered, strings),
        "ablationRaised": _valued(panel.ablation_raised, strings),
        "ablationLowered": _valued(panel.ablation_lowered, strings),
        "drops": panel.drops and _histogram(panel.drops),
        "coactive": [[int(other.feature), int(other.count), number(other.cosine)] for other in panel.coactive],
        "causes": [
            [int(cause.feature), number(cause.drop), number(cause.cosine), strings(cause.where)]
            for cause in panel.causes
        ],
        "tags": [[strings(name), strings(text)] for name, text in panel.tags],
        "lead": [pack_section(section, strings, number, _context) for section in panel.lead],
        "sections": [pack_section(section, strings, number, _context) for section in panel.sections],
    }
    return {
        name: part for name, part in packed.items() if part is not None and part is not False and part not in ("", [])
    }


class Columns:
    """The rows of the index, gathered column by column: some hundred bytes a feature."""

    def __init__(self):
        self.strings = Strings()
        self.numbers, self.density, self.maximum, self.effect = [], [], [], []
        self.tops, self.explanations, self.outliers = [], [], []
        self.scores: dict[str, list] = {}
        self.tags: dict[str, list] = {}

    def add(self, row: IndexRow) -> None:
        position = len(self.numbers)
        self.numbers.append(int(row.index))
        self.density.append(number(row.density))
        self.maximum.append(number(row.maximum))
        self.effect.append(number(row.effect))
        self.tops.append([self.strings(token) for token in row.top_tokens])
        self.explanations.append(row.explanation)
        if row.outlier:
            self.outliers.append(position)
        scores = ((name, number(value)) for name, value in row.scores)
        tags = ((name, self.strings(text)) for name, text in row.tags)
        for columns, named in ((self.scores, scores), (self.tags, tags)):
            for name, value in named:
                column = columns.setdefault(name, [])
                column += [None] * (position - len(column))
                column.append(value)

    def packed(self, per_shard: int) -> dict:
        """The columns as JSON has them. A column that nothing was measured for is null."""
        n = len(self.numbers)
        return {
            "perShard": per_shard,
            "numbers": self.numbers,
            "density": self.density,
            "maximum": self.maximum,
            "effect": self.effect if any(value is not None for value in self.effect) else None,
            "tops": self.tops,
            "explanations": self.explanations if any(self.explanations) else None,
            "outliers": self.outliers,
            "scores": [[name, column + [None] * (n - len(column))] for name, column in self.scores.items()],
            "tags": [[name, column + [None] * (n - len(column))] for name, column in self.tags.items()],
            "strings": self.strings.table(),
        }
