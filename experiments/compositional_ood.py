"""Are known features found again, and their codes where features meet that never met in training? Beside an oracle.

    python -m experiments.compositional_ood --latents 50 100 200 --seeds 0 1 --learner-steps 600

About 5 minutes for a problem on two shared cores (30 minutes in all). To expect at 100 latents, matched correlation out
of distribution: oracle 1.000; autoencoders' own codes 0.69 to 0.83, lasso codes on their dictionaries 0.79 to 0.99;
annealed 0.999.

Rows are x = z W + noise with exactly k of n latents active and d about 2 k ln(n / k) numbers (coding/compositional.py);
half of all supports are held out, by pairs of features that never meet in training. The question, and what it calls
open, are of Barin Pacela et al. 2026 (arXiv 2603.28744).

Every method gives a dictionary from the same training rows, and none sees latents. Figures are of codes: those of the
method's own encoder where it has one, and those of the lasso on its dictionary ("+ lasso"). "in" is on fresh rows of
allowed supports, "out" on rows of held-out ones. What a figure needs (which code is which latent's, the lasso's
penalty, the size above which a code counts as active) is chosen on validation rows of allowed supports, whose latents
are known: for every method in the same way.

    oracle                      the true W
    random, pca                 floors: random rows; principal directions, both signs of each
    l1, topk, jump-relu, ...    autoencoders by the library's own step, L0 held at k
    lista                       unrolled shrinkage, likewise
    dl-quadratic, dl-online, dl-gradient      lasso codes and a learner, from random rows, penalty fixed
    warm-quadratic, ...                       the same from the best autoencoder's dictionary, dead atoms refreshed
    annealed                    dl-gradient at three times the rate, the penalty falling from --first-penalty to
                                --penalty, dead atoms refreshed
    annealed-warm               that from the best autoencoder's dictionary

The best autoencoder is the one on whose dictionary the validation rows' lasso objective is lowest: no latents needed.
Its bias stays behind. Codes on an autoencoder's dictionary are of x - b_dec or of x, by the same objective.

"gap closed" is (figure - best autoencoder's) / (oracle's - best autoencoder's), out of distribution, of matched
correlation; the best autoencoder here is the best of all their figures, with lasso codes or without.

A cell (latents, active, rows, seed, method) that is finished is a line of metrics.jsonl; --resume goes on after them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import command

AUTOENCODERS = ("l1", "topk", "batch-topk", "jump-relu", "gated", "lista")
LEARNERS = ("quadratic", "online", "gradient")
FLOORS = ("random", "pca")
METHODS = (
    "oracle",
    *FLOORS,
    *AUTOENCODERS,
    *(f"dl-{name}" for name in LEARNERS),
    *(f"warm-{name}" for name in LEARNERS),
    "annealed",
    "annealed-warm",
)
DEFAULT_METHODS = tuple(name for name in METHODS if name not in ("batch-topk", "gated"))


@dataclass(frozen=True)
class Flags:
    """Recover known features and their codes, in and out of distribution, beside an oracle and autoencoders."""

    latents: tuple[int, ...] = (50, 100, 200)
    """Numbers of features, n."""
    active: tuple[int, ...] = (10,)
    """Active features of a row, k."""
    rows: tuple[int, ...] = (20_000,)
    """Training rows."""
    seeds: tuple[int, ...] = (0, 1)
    """Each decides the dictionary, what is held out, all rows and every start."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Any of: oracle random pca l1 topk batch-topk jump-relu gated lista dl-{quadratic,online,gradient}
    warm-{quadratic,online,gradient} annealed annealed-warm. Warm ones need an autoencoder among them."""
    width_factor: float = 2.0
    """d is this times k ln(n / k), rounded up."""
    values: Literal["uniform", "half-normal"] = "uniform"
    """Of active latents: uniform in [0.5, 1.5], or the size of a normal number."""
    noise: float = 0.01
    """Standard deviation in each number of x."""
    held_out: float = 0.5
    """About which share of all supports is held out, by pairs of features."""
    eval_rows: int = 2000
    """Rows in distribution, as many out of it and as many for validation; more where n is large: each latent is active
    in about 20 of them at least."""
    steps: int = 4000
    """Training steps of autoencoders and LISTA."""
    batch: int = 256
    """Rows in a step, of learners too."""
    learning_rate: float = 3e-3
    """Adam's, of autoencoders and LISTA."""
    learner_steps: int = 1000
    """Steps of dictionary learners."""
    penalty: float = 0.1
    """Lambda of learners whose penalty falls: where it ends, in units of codes about 1. Of the objective by which the
    best autoencoder is chosen too."""
    first_penalty: float = 1.0
    """Where it begins."""
    fixed_penalty: float = 0.5
    """Lambda of the others."""
    refresh_every: int = 100
    """Atoms that were silent for so many steps are replaced, where dead atoms are refreshed."""
    devices: int = 1
    """Devices over which learners lay out the rows of a batch; atoms and their state are the same on all."""
    out: Path = Path("runs/compositional_ood")
    """Run folder."""
    resume: bool = False
    """Go on with the run in --out."""
    overwrite: bool = False
    """Remove the run in --out first."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.compositional_ood_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
