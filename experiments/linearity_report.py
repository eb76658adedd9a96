"""The page of `experiments.linearity`, and what it prints."""

import json
from pathlib import Path

import numpy as np

from experiments.connecting import Opened
from experiments.connecting_layers import layer_folder
from experiments.linearity import Flags
from sparse_jax.features import Report, Table, histogram, write

CLASSES = ("linear", "nonlinear", "undecided", "unexplained", "rare", "dead", "outlier")


def layer_rows(final: dict) -> list[tuple[str, dict]]:
    """(name, figures) of each layer, and of its control behind it."""
    made = []
    for layer, figures in final["layers"].items():
        made.append((figures["name"], figures))
        if final["control"] and layer in final["control"]:
            made.append((f"{final['control'][layer]['name']}, step0", final["control"][layer]))
    return made


def write_report(flags: Flags, opened: Opened, final: dict) -> None:
    """report.html of all layers."""
    tables, charts = [layers_table(final), levels_table(final), original_table(final)], []
    for ends in opened.ends:
        layer = final["layers"][str(ends.layer)]
        rows = json.loads((layer_folder(flags.out, ends) / "targets.json").read_text(encoding="utf8"))
        charts += target_charts(layer, rows)
        tables += [*sweep_tables(layer), nonlinear_table(layer, rows, flags.level)]
    report = Report(
        title="Linearity of connections",
        subtitle=f"{final['model']}: {', '.join(ends.name for ends in opened.ends)}",
        facts=(("seeds", " ".join(map(str, flags.seeds))), ("control", str(flags.step0_run or "none"))),
        tables=tuple(tables),
        charts=tuple(charts),
        details=(Path(flags.out) / "config.json").read_text(encoding="utf8"),
    )
    write(report, flags.out / "report.html")


def layers_table(final: dict) -> Table:
    """One row a layer, at the main level."""
    level = f"{final['level']:g}"
    rows = []
    for name, each in layer_rows(final):
        counts = each["classes"].get(level, {})
        rows.append((name, *(float(counts[c]) if c in counts else None for c in CLASSES),
                     each["linear_share"].get(level), each["r2"]["linear"], each["r2"]["mlp"], each["r2"]["constant"],
                     each["median_g"], each["median_seed_spread"]))  # fmt: skip
    return Table(
        f"Classes of targets, threshold at {level} nats",
        ("", *CLASSES, "linear share", "R² linear", "R² MLP", "R² constant", "median g", "seed spread"),
        tuple(rows),
        "Linear share: of linear, nonlinear and undecided targets. R²: mean over alive targets that are no outliers; "
        "the constant is the mean over training tokens. Outliers stand apart. step0: the model with random weights.",
    )


def levels_table(final: dict) -> Table:
    """Thresholds and what they change."""
    rows = []
    for name, each in layer_rows(final):
        noise = each["threshold"]
        for at, level in enumerate(noise["levels"]):
            counts = each["classes"][f"{level:g}"]
            scale, low, high = (noise[key][at] for key in ("scales", "low", "high"))
            rows.append((f"{name}, {level:g} nats", scale, low, high, None if scale is None else scale**2,
                         *(float(counts[c]) for c in CLASSES[:3]), each["linear_share"][f"{level:g}"]))  # fmt: skip
    return Table(
        "Calibrated thresholds",
        ("", "s*", "low", "high", "threshold on g", *CLASSES[:3], "linear share"),
        tuple(rows),
        "s*: the largest s at which noise of s² Var(F2) in every active code of the target's site raises the "
        "cross-entropy by no more than the level. A dash: no noise that was tried costs so much; then no target is "
        "nonlinear.",
    )


def original_table(final: dict) -> Table:
    """The original rule."""
    keys = ("share", "share_alive", "share_constant", "norm", "min_norm")
    rows = tuple((name, *(each["original"][key] for key in keys)) for name, each in layer_rows(final))
    return Table(
        "The original rule, in its own units",
        ("", "linear, of all", "of alive", "a constant would pass", "norm", "least norm"),
        rows,
        "(loss_linear - loss_MLP) / (norm / least norm)² < 0.001, losses in raw codes. A constant would pass: share of "
        "alive targets that the rule calls linear with a constant in place of the linear connector.",
    )


def sweep_tables(layer: dict) -> list[Table]:
    """Widths and batches; retraining."""
    made = []
    if rows := layer.get("sweep"):
        shown = tuple(
            (f"width {row['width']}, batch {row['batch']}", *(float(row["classes"][c]) for c in CLASSES[:4]),
             row["linear_share"], row["r2"]["mlp"], row["median_g"])
            for row in rows
        )  # fmt: skip
        columns = ("", *CLASSES[:4], "linear share", "R² MLP", "median g")
        made.append(Table(f"{layer['name']}: other MLPs", columns, shown, "One seed each."))
    if (found := layer.get("retrained")) and found["targets"]:
        keys = ("targets", "r2_linear", "r2_mlp", "r2_retrained", "median_g", "median_g_retrained")
        made.append(Table(f"{layer['name']}: an MLP for the linear targets alone", ("", *keys),
                          (("linear targets", *(float(found[key]) for key in keys)),), "One seed."))  # fmt: skip
    return made


def nonlinear_table(layer: dict, rows: list[dict], level: float, count: int = 15) -> Table:
    """The most nonlinear targets."""
    of_it = [row for row in rows if row[f"class_{level:g}"] == "nonlinear" and not row["outlier"]]
    shown = sorted(of_it, key=lambda row: -row["low"])[:count]
    keys = ("g", "low", "high", "r2_linear", "r2_mlp", "density", "documents")
    return Table(
        f"{layer['name']}: the most nonlinear targets",
        ("target", *keys),
        tuple((str(row["target"]), *(None if row[key] is None else float(row[key]) for key in keys)) for row in shown),
        "By the lower end of the interval of g.",
    )


def target_charts(layer: dict, rows: list[dict]) -> list[tuple[str, str]]:
    """g and R^2 of alive targets."""
    made = []
    for key, name in (("g", "g"), ("r2_linear", "R², linear"), ("r2_mlp", "R², MLP")):
        values = np.array([row[key] for row in rows if row[key] is not None and not row["outlier"]], float)
        title = f"{layer['name']}: {name}"
        chart = histogram(np.clip(values, -1, 1), title=title, x_label=name, y_label="targets")
        made.append((chart, "Held-out text, without outliers. What is beyond -1 to 1 stands at its end."))
    return made


def print_summary(final: dict) -> None:
    """A few lines of each layer."""
    level = f"{final['level']:g}"
    heads = ("linear", "nonlin.", "undec.", "unexpl.", "rare", "dead", "outlier", "R2 lin", "R2 MLP", "s*", "original")
    print(f"\n{'':>34} " + " ".join(f"{head:>8}" for head in heads))
    for name, each in layer_rows(final):
        counts = each["classes"].get(level, {})
        noise = each["threshold"]
        scale = noise["scales"][noise["levels"].index(final["level"])] if final["level"] in noise["levels"] else None
        values = [*(counts.get(c) for c in CLASSES), each["r2"]["linear"], each["r2"]["mlp"], scale]
        values.append(each["original"]["share_alive"])
        print(f"{name:>34} " + " ".join(f"{_short(value):>8}" for value in values))


def _short(value) -> str:
    return "-" if value is None else f"{value}" if isinstance(value, int) else f"{value:.3f}"
