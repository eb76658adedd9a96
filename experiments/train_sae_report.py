"""The report of a training run, and the table printed at its end."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.data import Data
from experiments.measuring import eval_rows, in_float32
from sparse_jax.dictionaries import Normalised
from sparse_jax.features import Report, Table, feature_activity, feature_card, histogram, line_chart, write
from sparse_jax.metrics import Evaluation
from sparse_jax.training import read_lines, reconstructor

NAMES = {
    "pca": "PCA rotation, top {k}",
    "neurons": "neurons, top {k}",
    "random": "random dictionary, top {k}",
    "token_mean": "mean of the current token",
}
# What a line of metrics.jsonl holds beside the loss and its terms.
NOT_TERMS = (
    *("step", "tokens", "fvu", "l0", "dead", "coefficient"),
    *("grad_norm", "learning_rate"),  # of a gradient
    *("moved", "refreshed"),  # of a basis update
)
COLUMNS = ("fvu", "l0", "ce_increase", "ce_recovered", "ce_recovered_mean", "kl", "shrinkage")
HEADINGS = ("FVU", "L0", "CE increase", "CE recovered (zero)", "CE recovered (mean)", "KL", "shrinkage")


def rows(final: dict) -> list[tuple]:
    """The table's rows: the dictionary, then its floors."""
    named = [(final["dictionary"], final)]
    named += [(NAMES[name].format(k=final["floors_k"]), figures) for name, figures in final["floors"].items()]
    return [(name, *(figures[column] for column in COLUMNS)) for name, figures in named]


def print_table(final: dict) -> None:
    """The figures beside their floors, for the terminal."""
    shown = (*HEADINGS[:3], "recovered", *HEADINGS[5:])
    print(f"\n{'':30}" + "".join(f"{name:>13}" for name in shown))
    for name, fvu, l0, increase, recovered, _, kl, shrinkage in rows(final):
        values = (f"{fvu:.4f}", f"{l0:.1f}", f"{increase:+.4f}", f"{recovered:.4f}", f"{kl:.4f}", f"{shrinkage:.3f}")
        print(f"{name:30}" + "".join(f"{value:>13}" for value in values))
    print(
        f"\nclean CE {final['ce_clean']:.4f}, zero-ablated {final['ce_zero']:.3f}, mean-ablated {final['ce_mean']:.3f} "
        f"nats; dead {100 * final['dead_fraction']:.1f} %, on > 10 % of tokens {100 * final['dense_fraction']:.1f} % "
        f"of {final['n_features']} features; {final['tokens_evaluated']:,} held-out tokens"
    )
    speed = f", {final['tokens_per_second']:,.0f} tokens/s" if final["tokens_per_second"] else ""
    print(f"trained on {final['tokens_trained']:,} tokens{speed}; {final['seconds']:.0f} s in all")


def write_report(out: Path, data: Data, trained: Normalised, evaluation: Evaluation, final: dict, flags: Any) -> None:
    """`report.html` in the run folder."""
    # Lines of other events (features started again) have no loss.
    lines = [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]
    cards, alive = feature_cards(data, trained, evaluation, flags)
    report = Report(
        title=f"{final['dictionary']} dictionary of {final['site']}",
        subtitle=f"{final['model']}, {final['n_features']:,} features, {final['tokens_trained']:,} training tokens",
        facts=facts(final, data),
        tables=tables(final),
        charts=charts(lines, evaluation, final),
        cards=cards,
        cards_note=(
            f"{len(cards)} features drawn uniformly (seed {flags.seed}) from the {alive:,} that fire on the evaluation "
            "tokens. For each: its three strongest places, then two drawn from each fifth of its activation range; no "
            "row of text is used twice. Shade is activation over the feature's maximum; the sampled one is underlined."
        ),
        details=(out / "config.json").read_text(encoding="utf8"),
    )
    write(report, out / "report.html")


def feature_cards(data: Data, trained: Normalised, evaluation: Evaluation, flags: Any) -> tuple[tuple, int]:
    """Cards of features drawn uniformly from the alive ones, and how many are alive."""
    alive = int((evaluation.fired > 0).sum())
    chosen = draw_features(evaluation.fired, flags.report_features, flags.seed)
    if not len(chosen):
        return (), alive
    rebuild = reconstructor(in_float32(trained))
    data = data.in_float32()
    numbers = eval_rows(data, flags.eval_tokens)
    limit = evaluation.mask["outlier_norm"] if flags.drop_outliers else float("inf")
    activity = feature_activity(
        data.lm, data.site, data.evaluation, numbers, rebuild.encode, rebuild.params, chosen, max_norm=limit
    )
    cards = tuple(
        feature_card(activity, column, data.evaluation, data.tokenizer.token_strings, flags.seed)
        for column in range(len(chosen))
    )
    return cards, alive


def draw_features(fired: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Numbers of up to `count` features, drawn uniformly from those that fire, ascending."""
    alive = np.flatnonzero(fired > 0)
    return np.sort(np.random.default_rng(seed).choice(alive, min(count, len(alive)), replace=False))


def facts(final: dict, data: Data) -> tuple[tuple[str, str], ...]:
    """The figures that stand alone at the head of the report."""
    mask = final["mask"]
    return (
        ("model", final["model"] + (f" @ {final['revision']}" if final["revision"] else "")),
        ("site", f"{final['site']} (width {data.width})"),
        ("text", f"{data.flags.text}; {len(data.train.documents)} documents to train on"),
        ("held out", held_out(data.evaluation.documents)),
        ("normaliser", f"{data.flags.normalise}; raw ||mean|| / ||std|| {final['mean_over_std']:.3f}"),
        ("tokens trained", f"{final['tokens_trained']:,} ({epochs_of(final)})"),
        ("tokens evaluated", f"{final['tokens_evaluated']:,}"),
        ("clean CE", f"{final['ce_clean']:.4f} nats (perplexity {final['perplexity_clean']:.2f})"),
        ("spliced", f"perplexity {final['perplexity_spliced']:.2f} ({final['perplexity_increase']:+.2f})"),
        ("ablated", f"zero {final['ce_zero']:.3f}, mean {final['ce_mean']:.3f} nats"),
        ("dead features", f"{100 * final['dead_fraction']:.2f} %"),
        ("rare, < 1e-5", f"{100 * final['rare_fraction']:.2f} %"),
        ("dense, > 0.1", f"{100 * final['dense_fraction']:.2f} %"),
        ("masked tokens", f"{mask['dropped']:,} with {100 * mask['dropped_share_of_variance']:.2f} % of the variance"),
        ("outliers", f"{mask['outliers']:,} with norm over {mask['outlier_norm']:.3g}; {mask['outliers_kept']:,} kept"),
    )


def epochs_of(final: dict) -> str:
    """How often training went through the text."""
    return "of a text read as it goes" if final["epochs"] is None else f"{final['epochs']:.2f} epochs"


def held_out(names: tuple[str, ...], most: int = 3) -> str:
    """The first few held-out documents by name, and how many there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def tables(final: dict) -> tuple[Table, ...]:
    """The dictionary beside its floors, and the same without the mask."""
    note = (
        "FVU, KL and CE increase (nats): lower is better. CE recovered is flattering where ablation is destructive: "
        "read it beside the floors. Shrinkage is E||x_hat||² / E[x_hat · x] about the mean; 1 is unbiased. "
        f"k = {final['floors_k']} is the dictionary's L0 on the first held-out rows, rounded."
    )
    both = (("masked", final), ("every token", final["unmasked"]))
    columns = ("", *HEADINGS, "clean CE", "dead")
    unmasked = tuple(
        (name, *(figures[c] for c in COLUMNS), figures["ce_clean"], figures["dead_fraction"]) for name, figures in both
    )
    return (
        Table("Beside its floors, on the same held-out tokens", ("", *HEADINGS), tuple(rows(final)), note, 0),
        Table(
            "With and without the mask",
            columns,
            unmasked,
            f"Every token: nothing masked but padding; on {final['unmasked']['tokens_evaluated']:,} of the tokens.",
        ),
    )


def charts(lines: list[dict], evaluation: Evaluation, final: dict) -> tuple[tuple[str, str], ...]:
    """Training curves and the histogram of feature densities."""

    def curve(names: dict[str, str], title: str, y_label: str, log_y: bool = False) -> str:
        tokens = np.array([line["tokens"] for line in lines], np.float64)
        series = {
            label: (tokens, np.array([np.nan if line[n] is None else line[n] for line in lines], np.float64))
            for n, label in names.items()
        }
        return line_chart(series, title=title, x_label="training tokens", y_label=y_label, log_y=log_y)

    terms = {name: name for name in (lines[0] if lines else ()) if name not in NOT_TERMS}
    density = evaluation.fired / final["tokens_evaluated"]
    return (
        (curve(terms, "Loss", "per token, normalised units", log_y=True), "The objective and its terms, by batch."),
        (curve({"fvu": "FVU"}, "FVU", "share", log_y=True), "Fraction of variance unexplained, by training batch."),
        (curve({"l0": "L0"}, "L0", "active features", log_y=True), "Active features per token, by training batch."),
        (curve({"dead": "dead"}, "Silent features", "share"), "Share silent for longer than the dead window."),
        (
            histogram(
                density[density > 0],
                title="Feature densities",
                x_label="share of tokens",
                y_label="features",
                log_x=True,
            ),
            f"How often each feature fires on {final['tokens_evaluated']:,} held-out tokens; "
            f"{int((density == 0).sum())} never do and are left out.",
        ),
    )
