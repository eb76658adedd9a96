"""Further parts of a feature's panel, for those who know more of it: a line, a table, texts of another feature.

    FeaturePanel(..., lead=(Line("Formula", (("OF 3 =", 0.0, ""), ("0.26 IF 9", 0.26, "IF 9"))),), sections=(...))

Pages and notebooks draw them as they draw the rest: all text as text, numbers shaded as activations are.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sparse_jax.errors import InputError
from sparse_jax.features.page import Context

Cell = str | float | None  # None: not measured, shown as a dash


@dataclass(frozen=True)
class Line:
    """A line of pieces, each shaded by its number: a formula."""

    title: str
    pieces: tuple[tuple[str, float, str], ...]  # text, number, and the title of the texts that it opens, or ""
    note: str = ""


@dataclass(frozen=True)
class Cells:
    """A table. The first column names the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    shaded: bool = False  # numbers are shaded, the largest of the table at full shade

    def __post_init__(self):
        if wrong := [len(row) for row in self.rows if len(row) != len(self.columns)]:
            raise InputError(f"table {self.title!r} has {len(self.columns)} columns but a row of {wrong[0]} cells")


@dataclass(frozen=True)
class Texts:
    """Texts shaded by the activation of another feature, folded behind their title."""

    title: str
    contexts: tuple[Context, ...]
    maximum: float  # full shade
    note: str = ""
    open: bool = False


Section = Line | Cells | Texts


def pack_section(section: Section, strings: Callable[[str], int], number, context) -> dict:
    """A section as JSON has it, by the panel's packing of texts, numbers and contexts."""
    packed = {"title": strings(section.title), "note": section.note and strings(section.note)}
    if isinstance(section, Line):
        pieces = [[strings(text), number(value), opens and strings(opens)] for text, value, opens in section.pieces]
        packed |= {"kind": "line", "pieces": pieces}
    elif isinstance(section, Cells):
        rows = [[[strings(cell)] if isinstance(cell, str) else number(cell) for cell in row] for row in section.rows]
        packed |= {"kind": "cells", "columns": [strings(name) for name in section.columns], "rows": rows}
        packed |= {"shaded": section.shaded}
    else:
        contexts = [context(each, strings) for each in section.contexts]
        packed |= {"kind": "texts", "contexts": contexts, "maximum": number(section.maximum), "open": section.open}
    return {name: part for name, part in packed.items() if part != "" and part is not False}
