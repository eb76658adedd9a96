"""A run's folder in a notebook: what was run and what came out, as tables.

Run("runs/demo")                     shows itself
Run("runs/demo").metrics["fvu"]      its figures, as in metrics.json
compare([Run("runs/a"), Run("runs/b")], ["fvu", "l0"])      several side by side
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from sparse_jax.errors import InputError
from sparse_jax.features.page import Table
from sparse_jax.features.panel_html import facts_html, table_html, titled_html
from sparse_jax.features.ticks import short_number


class Run:
    """A run's folder, read when it is made.

    Attributes:
        path: the folder.
        metrics: final figures, from metrics.json; empty while the run is not done.
        config: flags, versions and device, from config.json; empty where there is none.
    """

    def __init__(self, path: str | os.PathLike):
        """Read a folder.

        Raises:
            InputError: it holds no run, or what it holds is damaged.
        """
        self.path = Path(path)
        self.config = _read(self.path / "config.json")
        self.metrics = _read(self.path / "metrics.json")
        if not self.config and not self.metrics:
            raise InputError(f"{self.path} holds no run: neither config.json nor metrics.json is there")

    @property
    def flags(self) -> dict:
        """What the run was started with."""
        return self.config.get("flags", {})

    @property
    def figures(self) -> dict:
        """The figures that stand by themselves."""
        return {name: value for name, value in self.metrics.items() if not isinstance(value, dict | list)}

    @property
    def groups(self) -> dict[str, dict]:
        """The others: figures by name, or records by name, as of the floors."""
        lists = {name: value for name, value in self.metrics.items() if isinstance(value, list)}
        numbered = {name: {str(i): entry for i, entry in enumerate(value)} for name, value in lists.items()}
        return {name: group for name, group in (self.metrics | numbered).items() if isinstance(group, dict) and group}

    def __repr__(self) -> str:
        shown = (
            f"{name}={_said(self.metrics[name])}"
            for name in ("site", "dictionary", "fvu", "l0")
            if name in self.metrics
        )
        return f"Run({', '.join([repr(str(self.path)), *shown])})"

    def _repr_html_(self) -> str:
        parts = [facts_html("Figures", _pairs(self.figures))] if self.figures else []
        for name, group in self.groups.items():
            of_records = all(isinstance(record, dict) for record in group.values())
            parts.append(table_html(_grid(name, group)) if of_records else facts_html(name, _pairs(_flat(group))))
        parts += [facts_html("Flags", _pairs(_flat(self.flags)), folded=True)] if self.flags else []
        return titled_html(str(self.path), parts, "" if self.metrics else "This run has no final figures yet.")


class Comparison:
    """Figures of several runs, a row of each."""

    def __init__(self, table: Table):
        self.table = table

    def __repr__(self) -> str:
        head, *rows = [self.table.columns, *(tuple(map(_said, row)) for row in self.table.rows)]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)
        )

    def _repr_html_(self) -> str:
        return titled_html("Runs", [table_html(self.table)])


def compare(runs: Iterable[Run], names: Iterable[str]) -> Comparison:
    """Named figures of several runs side by side; "floors.pca.fvu" is a figure within others.

    Raises:
        InputError: a figure that none of them has.
    """
    runs, names = list(runs), list(names)
    figures = [_flat(run.metrics) for run in runs]
    if runs and (unknown := [name for name in names if not any(name in each for each in figures)]):
        known = ", ".join(list(figures[0])[:12])
        raise InputError(f"no run has {', '.join(unknown)}: the first has {known}, ...")
    rows = tuple((str(run.path), *(_cell(each.get(name)) for name in names)) for run, each in zip(runs, figures))
    return Comparison(Table("", ("run", *names), rows))


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise InputError(f"{path} holds no figures by name: it is not a run's")
    return read


def _cell(value) -> str | float | None:
    """A value as a table has it: a number, a text, or nothing."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)


def _said(value) -> str:
    value = _cell(value)
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    return f"{value:,}" if isinstance(value, int) else short_number(value, 4)


def _flat(values: dict, before: str = "") -> dict:
    """Values within values by joined names, "schedule.lr_warmup"."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) and value else {f"{before}{name}": value}
    return flat


def _pairs(values: dict) -> list[tuple[str, str]]:
    return [(name, _said(value)) for name, value in values.items()]


def _grid(title: str, values: dict) -> Table:
    """Records by name as a table, a row of each."""
    records = {name: _flat(record) for name, record in values.items()}
    columns = list(dict.fromkeys(column for record in records.values() for column in record))
    rows = tuple((name, *(_cell(record.get(column)) for column in columns)) for name, record in records.items())
    return Table(title, ("", *columns), rows)
