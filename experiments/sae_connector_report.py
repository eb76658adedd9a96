"""The page of `experiments.sae_connector`, and what it prints."""

import json
from pathlib import Path

import numpy as np

from experiments.connecting import Opened
from experiments.connecting_layers import layer_folder
from experiments.sae_connector import Flags
from sparse_jax.features import Curve, Report, Table, curve_chart, histogram, write


def write_report(flags: Flags, opened: Opened, final: dict) -> None:
    """report.html of all layers."""
    tables, figures, charts = [], [], []
    for ends in opened.ends:
        layer = final["layers"][str(ends.layer)]
        control = (final["control"] or {}).get(str(ends.layer))
        rows = json.loads((layer_folder(flags.out, ends) / "units.json").read_text(encoding="utf8"))
        tables += [connector_table(layer), *([connector_table(control, ", step0")] if control else [])]
        tables.append(unit_table(layer, rows))
        figures.append(l0_chart(layer, control))
        fired = np.array([row["fired"] for row in rows], float)
        title = f"{layer['name']}: tokens on which units fire"
        charts.append((histogram(fired, title=title, x_label="tokens", y_label="units", log_x=True), layer["read"]))
    links = [f"layers/{ends.layer}/pages/index.html" for ends in opened.ends if flags.pages]
    report = Report(
        title="Autoencoder connectors",
        subtitle=f"{final['model']}: {', '.join(ends.name for ends in opened.ends)}",
        facts=(("pages", ", ".join(links) or "none"), ("control", str(flags.step0_run or "none"))),
        tables=tuple(tables),
        figures=tuple(figures),
        charts=tuple(charts),
        details=(Path(flags.out) / "config.json").read_text(encoding="utf8"),
    )
    write(report, flags.out / "report.html")


def connector_table(layer: dict, suffix: str = "") -> Table:
    """A row a connector."""
    rows = []
    for name, each in layer["connectors"].items():
        matrices = [each["weights"][matrix] for matrix in ("W_enc", "W_dec")]
        counts = [matrix["own"][sign] for matrix in matrices for sign in ("positive", "negative")]
        counts += [matrix["nonzero"] for matrix in matrices]
        r2 = each["r2"], each["median_r2"]
        rows.append((name, *r2, each["hidden_l0"], float(each["silent_units"]), *map(float, counts)))
    return Table(
        f"{layer['name']}{suffix}",
        ("", "R²", "median R²", "hidden L0", "silent units", "W_enc > 0.1", "W_enc < -0.1", "W_dec > 0.1",
         "W_dec < -0.1", "W_enc not 0", "W_dec not 0"),
        tuple(rows),
        f"Held-out text, {layer['alive']:,} alive targets. Hidden L0: mean number of units that fire on a token. "
        "Weights in units of the target per unit of the input.",
    )  # fmt: skip


def unit_table(layer: dict, rows: list[dict], count: int = 20) -> Table:
    """The strongest units with their clusters."""
    shown = sorted(rows, key=lambda row: -row["strength"])[:count]
    keys = ("fired", "strength", "inputs_positive", "inputs_negative", "outputs_positive", "outputs_negative")
    found = layer["clusters"]
    return Table(
        f"{layer['name']}: the strongest hidden units of {layer['read']}",
        ("unit", *(key.replace("_", " ") for key in keys), "clusters"),
        tuple((str(row["unit"]), *(float(row[key]) for key in keys), row["clusters"]) for row in shown),
        "Strength: mean over tokens of activation x norm of what it writes, targets scaled. Counts are of weights "
        f"above 0.1. Of {found['units']} units {found['with several']} have several clusters, "
        f"{found['stopped somewhere']} are stopped by negative inputs somewhere.",
    )


def l0_chart(layer: dict, control: dict | None) -> tuple[str, str]:
    """R^2 against hidden L0."""
    curves = []
    for hue, (each, words) in enumerate(((layer, "autoencoder"), (control, "autoencoder, step0"))):
        if each is not None:
            points = sorted((c["hidden_l0"], c["r2"]) for n, c in each["connectors"].items() if n != "mlp")
            x, y = (np.array(part, float) for part in zip(*points))
            curves.append(Curve(words, x, y, hue=hue))
            mlp = each["connectors"]["mlp"]
            at = np.array([mlp["hidden_l0"]]), np.array([mlp["r2"]])
            curves.append(Curve(words.replace("autoencoder", "MLP"), *at, hue=hue + 2))
    chart = curve_chart(
        curves, title=f"{layer['name']}: R² against hidden L0", x_label="hidden units that fire on a token",
        y_label="mean R² of alive targets", log_x=True,
    )  # fmt: skip
    return chart, "Held-out text. A point for each penalty of hidden codes."


def print_summary(final: dict) -> None:
    """A line for each connector."""
    print(f"\n{'':>34} {'connector':>16} {'R2':>8} {'L0':>8} {'silent':>7} {'W_enc+':>8} {'W_enc-':>8}")
    for layer in final["layers"].values():
        for name, each in layer["connectors"].items():
            counts = each["weights"]["W_enc"]["own"]
            print(f"{layer['name']:>34} {name:>16} {each['r2']:8.3f} {each['hidden_l0']:8.1f} {each['silent_units']:7} "
                  f"{counts['positive']:8} {counts['negative']:8}")  # fmt: skip
