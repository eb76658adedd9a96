"""Where training metrics go: `metrics.jsonl`, one object a line."""

import json
import math
import os
from pathlib import Path


class JsonLines:
    """Appends to a `.jsonl` file; each line is flushed, so that a killed run loses none that was logged."""

    def __init__(self, path: Path):
        self._path = path

    def truncate_after(self, step: int) -> None:
        """Drop lines of later steps, and a last line that a kill cut short: a resumed run writes them again."""
        if self._path.exists():
            kept = [row for row in read_lines(self._path) if row["step"] <= step]
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text("".join(_line(row) for row in kept), encoding="utf8")
            os.replace(temporary, self._path)  # a kill in between loses no line

    def write(self, row: dict) -> None:
        """Append one row; it has a "step"."""
        with self._path.open("a", encoding="utf8") as file:
            file.write(_line(row))


class Nowhere:
    """What a process that writes no logs has in place of them."""

    def truncate_after(self, step: int) -> None:
        """Nothing."""

    def write(self, row: dict) -> None:
        """Nothing."""


def _line(row: dict) -> str:
    # JSON has no NaN: readers in other languages would refuse the file.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"


def read_lines(path: Path) -> list[dict]:
    """The rows of a `.jsonl` file; a last line without its end is left out."""
    rows = []
    for line in path.read_text(encoding="utf8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
