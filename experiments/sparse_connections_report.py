"""The page of `experiments.sparse_connections`, and what it prints."""

import json
from pathlib import Path

import numpy as np

from experiments.connecting import Opened
from experiments.connecting_layers import layer_folder
from experiments.sparse_connections import Flags
from sparse_jax.features import Curve, Report, Table, curve_chart, histogram, write

LABELS = ("OR", "AND", "AND-NOT", "weighted sum", "no inputs")


def write_report(flags: Flags, opened: Opened, final: dict) -> None:
    """report.html of all layers."""
    tables, figures, charts = [layers_table(final)], [], []
    for ends in opened.ends:
        layer, folder = final["layers"][str(ends.layer)], layer_folder(flags.out, ends)
        front = json.loads((folder / "front.json").read_text(encoding="utf8"))
        rows = json.loads((folder / "targets.json").read_text(encoding="utf8"))
        figures += front_charts(layer, front)
        charts += target_charts(layer, rows)
        tables += [label_table(layer), *check_tables(layer), best_table(layer, rows)]
    links = [f"layers/{ends.layer}/pages/index.html" for ends in opened.ends if flags.pages]
    report = Report(
        title="Sparse connections",
        subtitle=f"{final['model']}: {', '.join(ends.name for ends in opened.ends)}",
        facts=(("pages", ", ".join(links) or "none"), ("control", str(flags.step0_run or "none"))),
        tables=tuple(tables),
        figures=tuple(figures),
        charts=tuple(charts),
        details=(Path(flags.out) / "config.json").read_text(encoding="utf8"),
    )
    write(report, flags.out / "report.html")


def layer_rows(final: dict) -> list[tuple[str, dict]]:
    """(name, figures) of each layer, and of its control behind it."""
    made = []
    for layer, figures in final["layers"].items():
        made.append((figures["name"], figures))
        if final["control"] and layer in final["control"]:
            made.append((f"{final['control'][layer]['name']}, step0", final["control"][layer]))
    return made


def value_of(figures: dict, *keys: str) -> float | None:
    """A nested figure; None where there is none."""
    for key in keys:
        if figures is None or key not in figures:
            return None
        figures = figures[key]
    return figures


def layers_table(final: dict) -> Table:
    """One row a layer."""
    columns = ("", "alive", "R² dense", "R² sparse", "R² MLP", "nonzeros, elbow", "nonzeros at 90 %", "low", "high",
               "CE, reconstruction", "CE, dense", "CE, sparse", "CE, MLP", "causal r", "control r")  # fmt: skip
    rows = []
    for name, each in layer_rows(final):
        needed = each["nonzeros_at_90"]["refit"]["median"]
        ce = [value_of(each, "spliced", "rows", what, "ce_increase", "value")
              for what in ("reconstruction", "dense", "sparse", "mlp")]  # fmt: skip
        causal = [value_of(each, "causal", "live", "all", what, "correlation", "value")
                  for what in ("connections", "controls")]  # fmt: skip
        rows.append((name, float(each["alive"]), *(each["r2"][kind]["mean"] for kind in ("dense", "sparse", "mlp")),
                     each["nonzeros"]["median"], needed["value"], needed["low"], needed["high"], *ce,
                     *causal))  # fmt: skip
    return Table(
        "Layers",
        columns,
        tuple(rows),
        "On held-out text. R²: mean over targets alive there. Nonzeros: median over alive targets, of the sparse "
        "connector (least squares on the support of the elbow), and the fewest with which a target reaches 90 % of "
        "the dense R² (of a sample of targets, interval over documents; a dash: more than half of them do not on its "
        "path). CE: rise of the "
        "cross-entropy in nats with the target site replaced. Causal: correlation of measured and predicted changes "
        "on changing one input, and of a control target. step0: the model with random weights.",
    )


def label_table(layer: dict) -> Table:
    """How many targets have each label."""
    rows = tuple(
        (label, float(layer["labels"][label]["targets"]), float(layer["labels"][label]["too few tokens"]))
        for label in LABELS
    )
    return Table(
        f"{layer['name']}: labels of alive targets",
        ("label", "targets", "with a rule not tested"),
        rows,
        "By the counts of held-out tokens on which inputs are on; a rule of which a condition is met by fewer than 50 "
        "tokens is not tested where it hangs on it.",
    )


def check_tables(layer: dict) -> list[Table]:
    """Spliced, causal, weights: those that there are."""
    made, name = [], layer["name"]
    if spliced := layer.get("spliced"):
        keys = ("ce_increase", "kl", "ce_recovered", "ce_recovered_mean")
        rows = tuple(
            (what, *(each[key]["value"] for key in keys), *(each["ce_increase"][end] for end in ("low", "high")),
             each["fvu"])
            for what, each in (*spliced["rows"].items(), *path_rows(spliced))
        )  # fmt: skip
        made.append(Table(f"{name}: the model with the site replaced",
                          ("", "CE increase", "KL", "recovered of zero", "of mean", "CE low", "CE high", "FVU"), rows,
                          f"{spliced['predictions']:,} predictions of held-out text, CE {spliced['ce_clean']:.4f} nats "
                          "as it is; intervals over documents. n a target: sparse connectors with that many "
                          "connections, median over alive targets."))  # fmt: skip
    if causal := layer.get("causal"):
        rows = []
        for norm in ("live", "frozen"):
            for places, pair in causal[norm].items():
                for kind, each in pair.items():
                    if each is not None:
                        values = (each[key]["value"] for key in ("correlation", "slope", "same_sign", "size"))
                        rows.append((f"{kind}, norm {norm}, {places}", float(each["connections"]), *values))
        made.append(Table(f"{name}: inputs changed one at a time",
                          ("", "places", "correlation", "slope", "same sign", "size"), tuple(rows),
                          f"{causal['sampled']:,} connections at places, the input's code set to {causal['set_to']}; "
                          "measured change of the target's pre-activation on the weight's prediction. Controls: "
                          "a target without a weight from the input. Active: where the target fires."))  # fmt: skip
    if weights := layer.get("weights"):
        keys = ("correlation", "cosine", "same_sign", "auc")
        rows = tuple((what, *(each[key] for key in keys)) for what, each in weights.items())
        made.append(Table(f"{name}: learned weights beside others",
                          ("", "correlation", "cosine", "same sign", "AUC"), rows,
                          "On the support of the learned ones; AUC: |other| tells connections from "
                          "the rest."))  # fmt: skip
    return made


def path_rows(spliced: dict) -> list[tuple[str, dict]]:
    """(name, figures) of the points of the path that were spliced, and of as many inputs by the mean Jacobian."""
    kinds = (("path", ""), ("jacobian", " by Jacobian"))
    return [
        (f"{each['nonzeros']['median']:g} a target{words}", each["figures"])
        for kind, words in kinds
        for each in spliced.get(kind, ())
    ]


def best_table(layer: dict, rows: list[dict], count: int = 8) -> Table:
    """Targets of each label, the best predicted first."""
    shown = []
    for label in LABELS[:4]:
        of_it = [row for row in rows if row["alive"] and row["label"] == label and row["r2_sparse"] is not None]
        for row in sorted(of_it, key=lambda row: -row["r2_sparse"])[:count]:
            shown.append((str(row["target"]), label, row["r2_sparse"], row["r2_dense"], row["r2_mlp"], row["formula"]))
    columns = ("target", "label", "R² sparse", "dense", "MLP", "formula")
    note = "The best predicted of each label; targets.json has all."
    return Table(f"{layer['name']}: formulas", columns, tuple(shown), note)


def front_charts(layer: dict, front: dict) -> list[tuple[str, str]]:
    """R^2 against nonzeros, and against the l1 norm."""
    charts = []
    for key, words in (("nonzeros", "nonzeros, mean over alive targets"), ("l1", "l1 norm, mean over alive targets")):
        curves, ends = [], [1.0]
        for hue, kind in enumerate(("lasso", "refit")):
            x, y, low, high = (
                np.array([np.nan if p[k] is None else p[k] for p in front[kind]], float)
                for k in (key, "r2", "r2_low", "r2_high")
            )
            curves.append(Curve(kind, x, y, y_range=(low, high), hue=hue))
            ends += [v for v in x if np.isfinite(v) and v > 0]
        for name in ("dense", "mlp"):
            curves.append(Curve(name, np.array([min(ends), max(ends)]), np.full(2, front[name]), floor=True))
        chart = curve_chart(curves, title=f"{layer['name']}: R² against {key}", x_label=words, y_label="R²", log_x=True)
        charts.append((chart, "Held-out text; bars: 95 % over documents. Refit: least squares on the support."))
    return charts


def target_charts(layer: dict, rows: list[dict]) -> list[tuple[str, str]]:
    """R^2 of the sparse connector, and g, of alive targets."""
    alive = [row for row in rows if row["alive"]]
    made = []
    for key, name in (("r2_sparse", "R², sparse"), ("r2_dense", "R², dense"), ("r2_mlp", "R², MLP"), ("g", "g")):
        values = np.array([row[key] for row in alive if row[key] is not None], float)
        title = f"{layer['name']}: {name}"
        chart = histogram(np.clip(values, -1, 1), title=title, x_label=name, y_label="targets")
        words = "g: (MSE of dense - MSE of the MLP) / variance." if key == "g" else "Alive targets, held-out text."
        made.append((chart, f"{words} What is beyond -1 to 1 stands at its end."))
    return made


def print_summary(final: dict) -> None:
    """A few lines of each layer."""
    kinds = ("dense", "sparse", "mlp")
    heads = ("alive", *kinds, "nonzeros", "at 90 %", "CE sparse")
    print(f"\n{'':>34} " + " ".join(f"{head:>9}" for head in heads))
    for name, each in layer_rows(final):
        needed = each["nonzeros_at_90"]["refit"]["median"]["value"]
        ce = value_of(each, "spliced", "rows", "sparse", "ce_increase", "value")
        shown = [f"{each['alive']}", *(f"{each['r2'][kind]['mean']:.3f}" for kind in kinds)]
        shown += [f"{each['nonzeros']['median']:.1f}", "-" if needed is None else f"{needed:.1f}"]
        shown.append("-" if ce is None else f"{ce:+.4f}")
        print(f"{name:>34} " + " ".join(f"{value:>9}" for value in shown))
