"""Quality of the dictionaries that three libraries' own trainers learn from the same stored activations.

    make bench-quality                                        all of it
    python -m benchmarks.quality --libraries saelens --architectures topk gated
    python -m benchmarks.quality --table                      only print what the committed results say

The stream: activations of 3 million distinct tokens at one site of the embedded model, in batches of 1,024. Every
trainer has the same search: runs of a million tokens at two learning rates, and where it cannot be told L0, three
values of its sparsity coefficient each (see quality_search.py); what is chosen is chosen on validation rows of the
training text. Then three seeds of 3 million tokens, measured on over 300,000 tokens of a text that neither the model
nor any trainer saw.

Every finished run is a folder in --results; runs that are there are not repeated, so that the work can be stopped and
continued. Needs the environment with the peers (`make bench-quality` builds it); for one's own library alone, any.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.quality_measure import Held, figures, held_out, quick_figures
from benchmarks.quality_search import REACHED, Point, best_sparsity, exponent, moved, near, nearest, score, search
from benchmarks.quality_stream import CONTEXT, Stream, open_stream
from benchmarks.quality_table import print_table, read_results
from benchmarks.quality_trial import ARCHITECTURES, BATCH, LIBRARIES, OURS_ALONE, Trained, Trial, architectures_of
from experiments import command
from experiments.measuring import TOKENS_FOR_GAIN
from experiments.run_folder import write_json
from sparse_jax.errors import InputError
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.training import fit_floors

# Where each is imported from.
PACKAGES = {"sparse_jax": "sparse_jax", "saelens": "sae_lens", "dictionary_learning": "dictionary_learning"}
# FVU falls about like L0^-s; where a trainer's own trials do not say (it is told L0), this does.
USUAL_EXPONENT = 0.55


@dataclass(frozen=True)
class Flags:
    """Quality of dictionaries, library against library."""

    libraries: tuple[str, ...] = LIBRARIES
    """Whose trainers: sparse_jax, saelens, dictionary_learning."""
    architectures: tuple[str, ...] = (*ARCHITECTURES, *OURS_ALONE)
    """Which architectures; some only sparse_jax has."""
    l0: float = 32.0
    """At which L0 they are compared."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Those that every trainer is tried with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the final runs."""
    trial_tokens: int = 1_000_448
    """Tokens of a trial, whole batches of 1,024."""
    tokens: int = 3_000_320
    """Tokens of a final run, and of the stream."""
    eval_tokens: int = 300_000
    """Held-out tokens, at least."""
    expansion: int = 8
    """Features per dimension."""
    model: str = "novel-neox"
    """The language model."""
    site: str = "resid_post.3"
    """Where activations are taken: the output of a block."""
    text: str = "../shared/text/novels.txt.gz"
    """What the stream is made of."""
    eval_text: str = "austen"
    """What is measured on."""
    stream: Path = Path("runs/quality/stream")
    """Where the activations are stored (3 GB); made where they are not there."""
    results: Path = Path("benchmarks/quality_results")
    """One file a finished run."""
    table: bool = False
    """Only print the table."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> None:
    """Run what is missing, print the table."""
    for name, allowed in (("libraries", LIBRARIES), ("architectures", (*ARCHITECTURES, *OURS_ALONE))):
        if unknown := set(getattr(flags, name)) - set(allowed):
            raise InputError(f"--{name} {' '.join(sorted(unknown))}: choose from {', '.join(allowed)}")
    if flags.tokens % BATCH or flags.trial_tokens % BATCH or flags.trial_tokens > flags.tokens:
        raise InputError(f"--tokens and --trial-tokens: give multiples of {BATCH}, trials no longer than the stream")
    if not flags.table:
        for library in flags.libraries:
            if importlib.util.find_spec(PACKAGES[library]) is None:
                raise InputError(
                    f"{PACKAGES[library]} is not installed: use make bench-quality, or --libraries sparse_jax"
                )
        keep_freed_memory()
        run_missing(flags)
    print_table(read_results(flags.results))


def run_missing(flags: Flags) -> None:
    """All runs without a result, library by library."""
    source = {"model": flags.model, "site": flags.site, "text": flags.text, "eval_text": flags.eval_text}
    stream = open_stream(flags.stream, **source, tokens=flags.tokens)
    held = held_out(
        flags.model, flags.site, flags.text, flags.eval_text, flags.eval_tokens, CONTEXT, flags.stream / "held.npz"
    )
    floors(flags, stream, held)
    for architecture in flags.architectures:
        for library in flags.libraries:
            if architecture not in architectures_of(library):
                continue
            compare(Runs(flags, stream, held, flags.results / library / architecture, library, architecture))


def floors(flags: Flags, stream: Stream, held: Held) -> None:
    """What trivial methods get on the same held-out tokens, at L0 16 and 32."""
    path = flags.results / "floors.json"
    if path.exists():
        return
    x = jnp.array(stream.x[:TOKENS_FOR_GAIN])
    found = {}
    for k in (16, 32):
        fitted = fit_floors(stream.statistics, x, k, flags.expansion * stream.width, seed=0)
        for name in ("pca", "neurons", "random"):
            found[f"{name} {k}"] = figures(held, fitted[name].params, stream.statistics.mean)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)


@dataclass(frozen=True)
class Runs:
    """The runs of one trainer.

    Attributes:
        flags: of the benchmark.
        stream, held: activations to train on, text to measure on.
        folder: where results go.
        library, architecture: the trainer.
    """

    flags: Flags
    stream: Stream
    held: Held
    folder: Path
    library: str
    architecture: str

    def done(self, name: str, trial: Trial, measure) -> dict:
        """The result called `name`: read where it is there, else made and written."""
        path = self.folder / name / "metrics.json"
        asked = {"trial": dataclasses.asdict(trial), "setting": self.setting}
        if path.exists():
            found = json.loads(path.read_text())
            for key, wished in asked.items():
                if found.get(key) != wished:
                    raise InputError(
                        f"{path} is of another {key}: {found.get(key)}, not {wished}; remove it, or give --results"
                    )
            return found
        started = time.perf_counter()
        trained = train(trial, self.stream, self.flags)
        content = {
            **asked,
            "tokens": trial.steps * BATCH,
            **measure(trained.trained),
            "seconds_training": round(trained.seconds, 1),
            "seconds": round(time.perf_counter() - started, 1),
            "scaled": trained.scaled,
            "log": trained.log,
            "version": version(self.library),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
        shown = {key: round(content[key], 4) for key in ("l0", "fvu", "ce_increase", "dead_fraction") if key in content}
        print(f"{self.library} {self.architecture} {name}: {shown}, {content['seconds']:.0f} s", flush=True)
        return content

    @property
    def setting(self) -> dict:
        """What decides a result beside the trial and the code."""
        flags = self.flags
        return {
            **self.stream.card,
            "expansion": flags.expansion,
            "eval_text": flags.eval_text,
            "eval_tokens": flags.eval_tokens,
        }

    def final(self, name: str, rate: float, sparsity: float, seed: int) -> dict:
        """A full-length run, measured on the held-out text and on validation activations."""
        trial = Trial(self.library, self.architecture, rate, sparsity, self.flags.tokens // BATCH, seed)
        mean = self.stream.statistics.mean

        def measure(trained):
            quick = quick_figures(trained, self.stream.validation, mean)
            return figures(self.held, trained, mean) | {"validation_l0": quick["l0"], "validation_fvu": quick["fvu"]}

        return self.done(name, trial, measure)

    def trial(self, rate: float, number: int, sparsity: float) -> Point:
        """One trial of the search, measured on validation activations."""
        trial = Trial(self.library, self.architecture, rate, sparsity, self.flags.trial_tokens // BATCH, seed=0)

        def measure(trained):
            return quick_figures(trained, self.stream.validation, self.stream.statistics.mean)

        found = self.done(f"trial-{rate:g}-{number}", trial, measure)
        return Point(found["trial"]["sparsity"], found["l0"], found["fvu"])

    def searched(self, rate: float, first: float) -> list[Point]:
        """The trials of one learning rate."""
        numbers = iter(range(3))
        return search(lambda sparsity: self.trial(rate, next(numbers), sparsity), first, is_l0(self), self.flags.l0)


def is_l0(runs: Runs) -> bool:
    """Whether the trainer's knob is L0 itself."""
    from benchmarks.quality_peers import SPARSITY_IS_L0

    return runs.library == "sparse_jax" or (runs.library, runs.architecture) in SPARSITY_IS_L0


def compare(runs: Runs) -> None:
    """The search and the final runs of one trainer."""
    from benchmarks.quality_peers import FIRST_SPARSITY

    target = runs.flags.l0
    first = target if is_l0(runs) else FIRST_SPARSITY[runs.library, runs.architecture]
    by_rate = {}
    for rate in runs.flags.learning_rates:
        by_rate[rate] = runs.searched(rate, first)
        if not is_l0(runs):  # the next rate's search begins where this one's ended
            first = best_sparsity(by_rate[rate], target)
    exponents = {rate: or_usual(exponent(nearest(points, target))) for rate, points in by_rate.items()}
    rate = min(by_rate, key=lambda rate: score(by_rate[rate], exponents[rate], target))
    sparsity = best_sparsity(by_rate[rate], target)
    s = exponents[rate]
    if not is_l0(runs):
        sparsity, s = piloted(runs, rate, sparsity, by_rate[rate], s)
    chosen = {
        "learning_rate": rate,
        "sparsity": sparsity,
        "exponent": s,
        "l0": target,
        "validation_fvu": {f"{r:g}": score(points, exponents[r], target) for r, points in by_rate.items()},
    }
    write_json(runs.folder / "chosen.json", chosen)
    for seed in runs.flags.seeds:
        runs.final(f"seed-{seed}", rate, sparsity, seed)


def piloted(runs: Runs, rate: float, sparsity: float, points: list[Point], s: float) -> tuple[float, float]:
    """(coefficient, exponent) for the final runs, after a first full-length one at the coefficient of the trials."""
    target = runs.flags.l0
    if not (runs.folder / "pilot").exists():
        first = runs.final("seed-0", rate, sparsity, seed=0)
        if near(first["validation_l0"], target, REACHED):
            return sparsity, s
        (runs.folder / "seed-0").rename(runs.folder / "pilot")
    pilot = runs.final("pilot", rate, sparsity, seed=0)
    sparsity = moved(sparsity, pilot["validation_l0"], points, target)
    second = runs.final("seed-0", rate, sparsity, seed=0)
    pair = [Point(run["trial"]["sparsity"], run["validation_l0"], run["validation_fvu"]) for run in (pilot, second)]
    return sparsity, exponent(pair) or s


def or_usual(s: float | None) -> float:
    """The exponent, or the usual one where the trials do not tell it."""
    return USUAL_EXPONENT if s is None else s


def train(trial: Trial, stream: Stream, flags: Flags) -> Trained:
    """Run one trial with its library."""
    batch_of, n_features = stream.batch_of(trial.seed), flags.expansion * stream.width
    if trial.library == "sparse_jax":
        from benchmarks import quality_ours

        return quality_ours.train(trial, batch_of, stream.statistics, n_features)
    from benchmarks import quality_peers

    sample = stream.x[: 64 * BATCH].astype(np.float64)
    norms = np.linalg.norm(sample, axis=1)
    return quality_peers.train(
        trial,
        batch_of,
        width=stream.width,
        n_features=n_features,
        mean=stream.statistics.mean,
        mean_norm=float(norms.mean()),
        mean_square=float((norms**2).mean()),
    )


def version(library: str) -> str:
    """Of the package that did the training."""
    return importlib.metadata.version(PACKAGES[library].replace("_", "-"))


if __name__ == "__main__":
    command.main(Flags, main)
