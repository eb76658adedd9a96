"""The report of `experiments.jacobian_sae`: every figure of the trained model beside that of random weights."""

import numpy as np

from experiments.jacobian_sae import Flags
from sparse_jax.connectors.scalar_functions import CLASSES
from sparse_jax.features import Curve, Report, Table, curve_chart, write

NO_CONTROL = "No control: without --step0 it is not known what random weights would give."


def members(final: dict) -> list[tuple[str, dict]]:
    """(model's name, figures of one pair), the trained model's first."""
    return [(name, each) for name, model in final["models"].items() for each in model["members"]]


def print_table(final: dict) -> None:
    """The figures for the terminal."""
    names = ("FVU in", "FVU out", "CE+ both", "mean |J|", "concentr.", "connect.")
    print(f"\n{'':22}" + "".join(f"{name:>11}" for name in names))
    for name, each in members(final):
        connections = (each["connections"] or {}).get("holding", float("nan"))
        values = (
            f"{each['fvu_in']:.4f}", f"{each['fvu_out']:.4f}", f"{each['ce_increase']['both']:+.4f}",
            f"{each['mean_absolute']:.4f}", f"{each['concentration']:.3f}", f"{connections:.0f}",
        )  # fmt: skip
        print(f"{name + ', ' + format(each['coefficient'], 'g'):22}" + "".join(f"{value:>11}" for value in values))
    if not final["control"]:
        print(NO_CONTROL)


def write_report(flags: Flags, final: dict) -> None:
    """`report.html` in the run folder."""
    model = final["models"]["trained"]
    report = Report(
        title=f"Jacobian autoencoders around the MLP of layer {final['layer']}",
        subtitle=f"{model['model']}; {final['n_features']:,} features a side, k {final['k']}, "
        f"{final['tokens_trained']:,} training tokens",
        facts=(
            ("control", final["models"]["step0"]["model"] if final["control"] else NO_CONTROL),
            ("Jacobian at", f"the MLP's {final['at']}"),
            ("tokens evaluated", f"{model['members'][0]['tokens_evaluated']:,}"),
            ("clean CE", f"{model['members'][0]['ce_clean']:.4f} nats"),
        ),
        figures=figures(final),
        tables=tables(flags, final),
        details=(flags.out / "config.json").read_text(encoding="utf8"),
    )
    write(report, flags.out / "report.html")


def figures(final: dict) -> tuple[tuple[str, str], ...]:
    """Sparsity of the Jacobian against what it costs, one curve for each model."""
    middle = sorted(next(iter(members(final)))[1]["share_above_relative"], key=float)
    threshold = middle[len(middle) // 2]
    drawn = []
    for label, value, words in (
        ("FVU of the output", lambda m: m["fvu_out"], "Fraction of variance of mlp_out unexplained."),
        ("FVU of the input", lambda m: m["fvu_in"], "Fraction of variance of mlp_in unexplained."),
        ("CE increase, nats", lambda m: m["ce_increase"]["both"], "Input and output of the MLP replaced."),
    ):
        curves = [
            Curve(
                name,
                np.array([m["share_above_relative"][threshold] for m in model["members"]], np.float64),
                np.array([value(m) for m in model["members"]], np.float64),
                hue=number,
                floor=name == "step0",
            )
            for number, (name, model) in enumerate(final["models"].items())
        ]
        x_label = f"share of entries |J| > {threshold} x mean norm"
        chart = curve_chart(curves, title=label, x_label=x_label, y_label=label)
        drawn.append((chart, f"{words} Points of a curve are the penalty's coefficients. {control(final)}"))
    return tuple(drawn)


def control(final: dict) -> str:
    """What the report says of the control."""
    return "Dashed: the same on random weights (step0)." if final["control"] else NO_CONTROL


def tables(flags: Flags, final: dict) -> tuple[Table, ...]:
    """All figures, a line for each pair."""
    each = [(f"{name}, {m['coefficient']:g}", m) for name, m in members(final)]
    costs = tuple(
        (name, m["fvu_in"], m["fvu_out"], *(m["ce_increase"][s] for s in ("input", "output", "both")), m["l0_in"],
         m["l0_out"], m["dead_in"], m["dead_out"])
        for name, m in each
    )  # fmt: skip
    thresholds = [f"{t:g}" for t in flags.thresholds]
    sparsity = tuple(
        (name, m["mean_absolute"], m["mean_norm"], m["concentration"], *(m["share_above"][t] for t in thresholds),
         *(m["share_above_relative"][t] for t in thresholds))
        for name, m in each
    )  # fmt: skip
    functions = tuple(
        (name, *(m["functions"][c] for c in CLASSES), m["strong"], *(m["functions_strong"][c] for c in CLASSES))
        for name, m in each
    )
    connections = tuple(
        (name, *((m["connections"] or {}).get(c) for c in ("holding", "above", "outputs"))) for name, m in each
    )
    return (
        Table(
            "What the pairs cost",
            ("", "FVU in", "FVU out", "CE+ input", "CE+ output", "CE+ both", "L0 in", "L0 out", "dead in", "dead out"),
            costs,
            f"CE+: rise of the cross-entropy in nats with that replaced. {control(final)}",
        ),
        Table(
            "How sparse the Jacobian is",
            (
                "",
                "mean |J|",
                "mean norm",
                "concentration",
                *(f"> {t}" for t in thresholds),
                *(f"> {t} x norm" for t in thresholds),
            ),
            sparsity,
            "Shares of the k x k entries between features active on a token. Concentration is ||J||_1 / (||J||_2 k): "
            f"1 where all entries are equal, 1 / k where one is alone. {control(final)}",
        ),
        Table(
            "How linear each pair's scalar function is",
            ("", *CLASSES, "strong", *(f"strong: {c}" for c in CLASSES)),
            functions,
            f"{flags.functions} functions drawn uniformly: the input's code over its range, all else fixed. Constant: "
            "it hardly moves. Jump: a line behind a stretch of zeros (JumpReLU). Tolerance: 1 % of the output's mean "
            f"code. Strong: |J| over 1 % of its mean norm. {control(final)}",
        ),
        Table(
            "Connections of an output feature",
            ("", "inputs with 90 % of its mean |J|", "inputs over 0.1 of its largest", "output features"),
            connections,
            f"Medians over output features that fire on 20 tokens or more. {control(final)}",
        ),
    )
