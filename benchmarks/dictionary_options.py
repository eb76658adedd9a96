"""Autoencoder, sparse coding, or one after the other: three ways to a dictionary at equal L0 and equal tokens.

    python -m benchmarks.dictionary_options            half a million tokens each, three seeds: half an hour or more
    python -m benchmarks.dictionary_options --table    only print what the committed results say

    autoencoder         train_sae l1, all tokens
    sparse coding       fista_dictionary, quadratic update (Yun et al. 2021), all tokens, from random atoms
    both                train_sae l1 on half of the tokens, then fista_dictionary --from-run on as many
    frozen              the autoencoder's dictionary as it is, codes that solve the lasso

The authors of the sparse-autoencoder work named the three (Cunningham et al. 2023); the last row tells what codes alone
give. All hold L0 by their controller in training, are measured on the same held-out tokens, and their rows of one seed
see the same tokens in the same order. The refinement of `both` has the other half of the tokens in the order of another
seed.

On held-out text codes that solve the lasso have more active features than in training. So their dictionaries are
measured at a few larger penalties too, and stand beside the autoencoder at its own held-out L0: FVU and CE increase
interpolated there, in the logarithms of both, between the two penalties around it.

Runs are folders in --runs; what is there is not repeated.
"""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from experiments import command, fista_dictionary, train_sae
from experiments.measuring import measure_members
from experiments.reading import open_subject
from experiments.run_folder import environment, write_json
from sparse_jax.activations import Statistics
from sparse_jax.dictionaries import L1, Fista, Normalised

FIGURES = ("fvu", "l0", "ce_increase", "dead_fraction", "seconds")
OPTIONS = ("autoencoder", "sparse coding", "both", "frozen")
# A trained dictionary's penalty times these, to reach the autoencoder's L0 from above.
FACTORS = (1.0, 1.2, 1.45)


@dataclass(frozen=True)
class Flags:
    """Three ways to a dictionary at equal L0 and equal tokens."""

    tokens: int = 524_288
    """Tokens of every way, whole batches of 1,024."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds."""
    l0: float = 32.0
    """Active features."""
    eval_tokens: int = 40_960
    """Held-out tokens to measure on."""
    frozen_tokens: int = 65_536
    """Tokens on which the frozen dictionary's lambda is found."""
    site: str = "resid_post.3"
    """Where activations are taken."""
    model: str = "novel-neox"
    """Language model."""
    text: str = "embedded"
    """Text."""
    runs: Path = Path("runs/options")
    """Where the runs are kept."""
    results: Path = Path("benchmarks/dictionary_options_results.json")
    """Figures of all runs."""
    table: bool = False
    """Only print the table of --results."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Make the runs that are missing, print the table."""
    if not flags.table:
        content = {"flags": {"tokens": flags.tokens, "l0": flags.l0, "eval_tokens": flags.eval_tokens}, "runs": {}}
        for seed in flags.seeds:
            folders = runs_of(flags, seed)
            equal = at_equal_l0(flags, folders)
            for option, out in folders.items():
                figures = json.loads((out / "metrics.json").read_text())
                own = {name: figures[name] for name in FIGURES}
                content["runs"][f"{option}, seed {seed}"] = own | {"at_equal_l0": equal[option]}
        content["floor"] = {"PCA": {name: figures["floors"]["pca"][name] for name in ("fvu", "l0", "ce_increase")}}
        write_json(flags.results, content | {"environment": environment()})
    print_table(json.loads(flags.results.read_text()))
    return 0


def runs_of(flags: Flags, seed: int) -> dict[str, Path]:
    """The folders of one seed's runs, each made if it has no figures yet."""
    base = {
        "site": flags.site, "model": flags.model, "text": flags.text, "target_l0": flags.l0,
        "eval_tokens": flags.eval_tokens, "statistics_tokens": 131_072, "report_features": 4,
    }  # fmt: skip
    folder = flags.runs / f"seed-{seed}"

    def autoencoder(name: str, tokens: int) -> Path:
        given = train_sae.Flags(dictionary=L1(), tokens=tokens, seed=seed, out=folder / name, overwrite=True, **base)
        return made(given.out, train_sae.main, given)

    def coded(name: str, tokens: int, **changes) -> Path:
        fields = base | {"dictionary": Fista(), "tokens": tokens, "seed": seed, "out": folder / name}
        given = fista_dictionary.Flags(**(fields | {"overwrite": True} | changes))
        return made(given.out, fista_dictionary.main, given)

    whole = autoencoder("autoencoder", flags.tokens)
    half = autoencoder("half", flags.tokens // 2)
    return {
        "autoencoder": whole,
        "sparse coding": coded("sparse-coding", flags.tokens),
        "both": coded("both", flags.tokens // 2, from_run=half, order_seed=1000 + seed),
        "frozen": coded("frozen", flags.frozen_tokens, from_run=whole, learner="frozen"),
    }


def made(out: Path, experiment, flags) -> Path:
    """The folder, after the experiment where it has no figures yet."""
    if not (out / "metrics.json").is_file():
        print(f"--- {out}", flush=True)
        if experiment(flags) != 0:
            raise SystemExit(command.EXIT_INTERRUPTED)
    return out


def at_equal_l0(flags: Flags, folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """L0, FVU and CE increase of each option at the held-out L0 of the autoencoder."""
    path = folders["autoencoder"].parent / "equal_l0.json"
    if path.is_file():
        return json.loads(path.read_text())
    subjects = {name: open_subject(out, eval_tokens=flags.eval_tokens) for name, out in folders.items()}
    members = {"autoencoder": subjects["autoencoder"].coder}
    for name in OPTIONS[1:]:
        members |= {f"{name} x {factor}": with_penalty(subjects[name].coder, factor) for factor in FACTORS}
    measured, _ = measure_members(
        subjects["autoencoder"].data,
        members,
        Statistics.load(folders["autoencoder"] / "statistics.npz"),
        eval_tokens=flags.eval_tokens,
        seed=0,
        drop=False,
    )
    own = {key: measured.figures["autoencoder"][key] for key in ("l0", "fvu", "ce_increase")}
    found = {"autoencoder": own}
    for name in OPTIONS[1:]:
        points = [measured.figures[f"{name} x {factor}"] for factor in FACTORS]
        found[name] = {"l0": own["l0"]} | {key: interpolated(points, own["l0"], key) for key in ("fvu", "ce_increase")}
    write_json(path, found)
    return found


def with_penalty(coder: Normalised, factor: float) -> Normalised:
    """A FISTA dictionary whose codes are of a larger penalty."""
    penalty = coder.params["penalty"] * jnp.float32(factor)
    return dataclasses.replace(coder, params=coder.params | {"penalty": penalty})


def interpolated(points: list[dict], l0: float, key: str) -> float:
    """A figure at `l0`, on the straight line in logarithms through the two points around it (or nearest to it)."""
    points = sorted(points, key=lambda point: point["l0"])
    after = min(max(1, sum(point["l0"] < l0 for point in points)), len(points) - 1)
    (a, u), (b, v) = ((math.log(point["l0"]), math.log(point[key])) for point in points[after - 1 : after + 1])
    return math.exp(u + (v - u) * (math.log(l0) - a) / (b - a))


def print_table(content: dict) -> None:
    """Means over seeds, with their standard deviations, as Markdown."""
    print(f"{content['flags']['tokens']:,} tokens, L0 {content['flags']['l0']:g}\n")
    print("| | seeds | L0 | FVU | CE increase | dead | at L0 | FVU | CE increase |")
    print("|---|---|---|---|---|---|---|---|---|")
    for option in OPTIONS:
        rows = [figures for name, figures in content["runs"].items() if name.startswith(f"{option}, ")]
        cells = [
            spread([row[name] for row in rows], digits) for name, digits in (("l0", 1), ("fvu", 4), ("ce_increase", 4))
        ]
        dead = 100 * statistics.mean(row["dead_fraction"] for row in rows)
        equal = [row["at_equal_l0"] for row in rows]
        at = [spread([each[name] for each in equal], n) for name, n in (("l0", 1), ("fvu", 4), ("ce_increase", 4))]
        print(f"| {option} | {len(rows)} | {' | '.join(cells)} | {dead:.1f} % | {' | '.join(at)} |")
    floor = content["floor"]["PCA"]
    print(f"| PCA rotation | | {floor['l0']:.1f} | {floor['fvu']:.4f} | {floor['ce_increase']:.4f} | | | | |")


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    command.main(Flags, main)
