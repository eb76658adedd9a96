"""The report of `experiments.compositional_ood`: curves over numbers of latents, and a table for every problem."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.compositional_ood import AUTOENCODERS, FLOORS, METHODS
from sparse_jax.features import Curve, Report, Table, curve_chart, write

KINDS = {"own": "", "lasso": " + lasso"}
COLUMNS = (
    ("correlation in", lambda cell, codes: codes["in"]["correlation"]),
    ("correlation out", lambda cell, codes: codes["out"]["correlation"]),
    ("F1 in", lambda cell, codes: codes["in"]["f1"]),
    ("F1 out", lambda cell, codes: codes["out"]["f1"]),
    ("AUC out", lambda cell, codes: codes["out"]["auc"]),
    ("MMCS truth in found", lambda cell, codes: cell["truth_in_found"]),
    ("MMCS found in truth", lambda cell, codes: cell["found_in_truth"]),
    ("Hungarian mean", lambda cell, codes: cell["hungarian"]),
    ("training s", lambda cell, codes: cell["training_seconds"]),
)
PROBLEM = ("latents", "width", "active", "rows")


def name_of(method: str, kind: str) -> str:
    """What a row is called: a method without an encoder has one kind of codes, which needs no mention."""
    return method + (KINDS[kind] if method in AUTOENCODERS else "")


def summarise(cells: list[dict]) -> list[dict]:
    """One entry for each problem and kind of codes: means, lowest and highest over seeds, and the gap closed."""
    made = []
    for problem in dict.fromkeys(tuple(cell[name] for name in PROBLEM) for cell in cells):
        here = [cell for cell in cells if tuple(cell[name] for name in PROBLEM) == problem]
        entries = []
        for method in METHODS:
            of_method = [cell for cell in here if cell["method"] == method]
            for kind in KINDS:
                if found := [(cell, cell["codes"][kind]) for cell in of_method if kind in cell["codes"]]:
                    entry = {"name": name_of(method, kind), "method": method, "kind": kind, "seeds": len(found)}
                    columns = {name: over_seeds(value, found) for name, value in COLUMNS}
                    entries.append(dict(zip(PROBLEM, problem)) | entry | columns)
        made += with_gap_closed(entries)
    return made


def over_seeds(value: Callable, found: list[tuple[dict, dict]]) -> dict[str, float]:
    """Mean, lowest and highest of a figure."""
    values = [value(cell, codes) for cell, codes in found]
    return {"mean": float(np.mean(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def with_gap_closed(entries: list[dict]) -> list[dict]:
    """The entries of one problem with which share of the gap between the best autoencoder and the oracle each closes.

    None without an oracle or an autoencoder, or where the best autoencoder is within 0.01 of the oracle: no gap.
    """
    of = lambda entry: entry["correlation out"]["mean"]  # noqa: E731
    oracle = [of(entry) for entry in entries if entry["method"] == "oracle"]
    baseline = [of(entry) for entry in entries if entry["method"] in AUTOENCODERS]
    gap = oracle[0] - max(baseline) if oracle and baseline else 0.0
    return [entry | {"gap_closed": (of(entry) - max(baseline)) / gap if gap > 0.01 else None} for entry in entries]


def write_report(out: Path, final: dict) -> None:
    """`report.html` in the run folder."""
    summary = final["summary"]
    problems = list(dict.fromkeys(tuple(entry[name] for name in PROBLEM) for entry in summary))
    seeds = sorted({cell["seed"] for cell in final["cells"]})
    report = Report(
        title="Known features, in and out of distribution",
        subtitle=f"{len(problems)} problems, {len(seeds)} seeds, {len(final['cells'])} dictionaries",
        facts=(
            ("latents", ", ".join(f"{n:,}" for n in sorted({entry["latents"] for entry in summary}))),
            ("active", ", ".join(map(str, sorted({entry["active"] for entry in summary})))),
            ("training rows", ", ".join(f"{n:,}" for n in sorted({entry["rows"] for entry in summary}))),
            ("seeds", ", ".join(map(str, seeds))),
        ),
        figures=tuple(charts(summary)),
        tables=tuple(table(problem, summary) for problem in problems),
        details=(out / "config.json").read_text(encoding="utf8"),
    )
    write(report, out / "report.html")


def charts(summary: list[dict]) -> list[tuple[str, str]]:
    """For every sparsity and number of rows: figures over numbers of latents, each with its caption."""
    made = []
    for k, rows in dict.fromkeys((entry["active"], entry["rows"]) for entry in summary):
        here = [entry for entry in summary if (entry["active"], entry["rows"]) == (k, rows)]
        for column, label in (("correlation out", "matched correlation"), ("Hungarian mean", "mean |cosine|, matched")):
            title = f"{column}, k {k}, {rows:,} rows"
            caption = "Means over seeds; bars reach from the lowest to the highest. Grey: the oracle and floors."
            svg = curve_chart(
                curves(here, column), title=title, x_label="latents", y_label=label, log_x=True, height=480
            )
            made.append((svg, caption))
    return made


def curves(entries: list[dict], column: str) -> list[Curve]:
    """One curve for each name, in the order of the table; the dictionary's figures are the same for all codes."""
    names = dict.fromkeys(
        entry["name"]
        for entry in entries
        if column != "Hungarian mean" or entry["kind"] == "lasso" or entry["method"] not in AUTOENCODERS
    )
    made, hues = [], {False: 0, True: 0}
    for name in names:
        points = sorted((entry for entry in entries if entry["name"] == name), key=lambda entry: entry["latents"])
        floor = points[0]["method"] in ("oracle", *FLOORS)
        low, mean, high = (np.array([point[column][part] for point in points]) for part in ("low", "mean", "high"))
        x = np.array([point["latents"] for point in points], np.float64)
        shown = name.replace(" + lasso", "") if column == "Hungarian mean" else name
        made.append(Curve(shown, x, mean, y_range=(low, high), hue=hues[floor], floor=floor))
        hues[floor] += 1
    return made


def table(problem: tuple, summary: list[dict]) -> Table:
    """All figures of one problem, means over seeds."""
    here = [entry for entry in summary if tuple(entry[name] for name in PROBLEM) == problem]
    n, d, k, rows = problem
    lines = tuple(
        (entry["name"], *(entry[name]["mean"] for name, _ in COLUMNS), entry["gap_closed"], entry["seeds"])
        for entry in here
    )
    note = (
        "Means over seeds. Gap closed: of what lies between the best autoencoder (with either codes) and the oracle, "
        "in matched correlation out of distribution; a dash where there is no gap."
    )
    columns = ("", *(name for name, _ in COLUMNS), "gap closed", "seeds")
    return Table(f"{n:,} latents in {d} numbers, {k} active, {rows:,} rows", columns, lines, note)


def print_table(summary: list[dict]) -> None:
    """The figures for the terminal."""
    for problem in dict.fromkeys(tuple(entry[name] for name in PROBLEM) for entry in summary):
        made = table(problem, summary)
        print(f"\n{made.title}\n{'':20}" + "".join(f"{name[-9:]:>11}" for name in ("corr in", "corr out", "F1 in",
              "F1 out", "AUC out", "MMCS t>f", "MMCS f>t", "Hungarian", "train s", "gap closed")))  # fmt: skip
        for name, *values, _ in made.rows:
            cells = [f"{value:.3f}" if value is not None else "-" for value in values]
            print(f"{name:20}" + "".join(f"{cell:>11}" for cell in cells))
