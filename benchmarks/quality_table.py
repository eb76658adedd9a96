"""The table of `benchmarks.quality`, from its result files."""

import json
import statistics as stats
from pathlib import Path

from benchmarks.quality_search import at_target


def read_results(folder: Path) -> dict:
    """{"floors": {...}, "rows": [{library, architecture, seeds, fvu, ...}]} from the files in `folder`.

    fvu is (mean, spread over seeds) at the wished L0, each seed's FVU moved there along the exponent that the trainer's
    own trials showed; the others are as measured.
    """
    floors = folder / "floors.json"
    rows = []
    for chosen in sorted(folder.glob("*/*/chosen.json")):
        choice = json.loads(chosen.read_text())
        seeds = [json.loads(path.read_text()) for path in sorted(chosen.parent.glob("seed-*/metrics.json"))]
        trials = [json.loads(path.read_text()) for path in sorted(chosen.parent.glob("trial-*/metrics.json"))]
        if seeds:
            rows.append(_row(chosen.parent, choice, seeds, trials))
    return {"floors": json.loads(floors.read_text()) if floors.exists() else {}, "rows": rows}


def _row(folder: Path, choice: dict, seeds: list[dict], trials: list[dict]) -> dict:
    fvu = [at_target(seed["l0"], seed["fvu"], choice["exponent"], choice["l0"]) for seed in seeds]
    return {
        "library": folder.parent.name,
        "architecture": folder.name,
        "seeds": len(seeds),
        "learning_rate": choice["learning_rate"],
        "sparsity": choice["sparsity"],
        "l0": _mean_spread([seed["l0"] for seed in seeds]),
        "raw_fvu": _mean_spread([seed["fvu"] for seed in seeds]),
        "fvu": _mean_spread(fvu),
        "ce_increase": _mean_spread([seed["ce_increase"] for seed in seeds]),
        "dead": _mean_spread([seed["dead_fraction"] for seed in seeds]),
        "tokens_evaluated": seeds[0]["tokens_evaluated"],
        "minutes": sum(run["seconds"] for run in [*seeds, *trials]) / 60,
        "scaled": seeds[0]["scaled"],
    }


def _mean_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    return stats.mean(values), stats.stdev(values) if len(values) > 1 else 0.0


def print_table(results: dict) -> None:
    """Architecture by architecture, the libraries below each other; floors last."""
    print(f"{'architecture':12} {'library':20} {'seeds':>5} {'rate':>6} {'L0':>12} {'FVU at that L0':>17} "
          f"{'CE increase':>17} {'dead %':>12} {'min':>6}")  # fmt: skip
    for row in sorted(results["rows"], key=lambda row: (row["architecture"], row["library"])):
        l0, fvu, ce, dead = row["l0"], row["fvu"], row["ce_increase"], row["dead"]
        print(
            f"{row['architecture']:12} {row['library']:20} {row['seeds']:5} {row['learning_rate']:6g} "
            f"{l0[0]:6.1f} +-{l0[1]:4.1f} {fvu[0]:8.4f} +-{fvu[1]:7.4f} {ce[0]:8.4f} +-{ce[1]:7.4f} "
            f"{100 * dead[0]:6.1f} +-{100 * dead[1]:4.1f} {row['minutes']:6.1f}"
        )
    for row in results["rows"]:
        if row["scaled"]:
            changed = "; ".join(f"{name}: {what}" for name, what in row["scaled"].items())
            print(f"scaled to a quarter of the run, {row['library']} {row['architecture']}: {changed}")
    for name, figures in results["floors"].items():
        print(
            f"{'floor':12} {name:20} {'':5} {'':6} {figures['l0']:6.1f} {'':6} {figures['fvu']:8.4f} {'':9} "
            f"{figures['ce_increase']:8.4f}"
        )
    print(f"runs of all rows: {sum(row['minutes'] for row in results['rows']):.0f} minutes")
