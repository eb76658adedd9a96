"""How linear is what makes each feature of those before a module? A linear connector against MLPs, target by target.

    python -m experiments.linearity runs/pair3 --layers 3
    python -m experiments.linearity runs/sweep --all-layers --seeds 0 1 2 --step0-run runs/linearity-step0
    python -m experiments.linearity runs/pair3 --layers 3 --widths 128 512 2048 --batches 1024 4096 --retrain

    g_j = (MSE_linear,j - MSE_mlp,j) / Var(F2_j)        held-out text, interval over documents and over seeds

A target is linear if the interval of g ends below s*^2, nonlinear if it begins above it, unexplained if the MLP itself
has an R^2 below 0.5. s* is calibrated: noise of s^2 Var(F2_j) in every active code of the target's site raises the
cross-entropy by 0.003, 0.01 or 0.03 nats. Beside it: a constant predictor, the original rule in its own units with the
share of targets that a constant would pass it with, and outlier features (of first tokens, or nearly everywhere) apart.

The linear connector is the exact least squares (of a ridge chosen on validation documents), so its part of g has no
seeds; --gradients trains it as the MLP is, a seed each.

Run folder: layers/L/{figures,targets}.json (a row each target), metrics.json, report.html. Most of the time is that of
the MLPs: minutes for each of 2 million tokens on two quiet cores.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import command
from experiments.connecting_flags import ConnectingFlags


@dataclass(frozen=True)
class Flags(ConnectingFlags):
    """How linear is what makes each feature of those before a module?"""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the MLPs (and of the linear connectors with --gradients)."""
    gradients: bool = False
    """Train the linear connector by gradients, in place of its exact solution."""
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Ridges of the exact one, of which validation chooses."""
    mlp: Literal["on-linear", "plain"] = "on-linear"
    """The MLPs: hidden units beside the linear connector, which stays as it is, so that g_j is what they add; or hidden
    units alone (the original's), which must carry the linear part too."""
    widths: tuple[int, ...] = (512,)
    """Hidden units of the MLP. The first is the one that classes are of; of the others the table says what changes."""
    batches: tuple[int, ...] = (2048,)
    """Tokens in a step of training; the first as above."""
    fit_tokens: int = 0
    """Tokens that connectors are trained on, repeats included; 0: each once."""
    retrain: bool = False
    """Train an MLP again on the linear targets alone: are they so because others had the hidden units?"""
    levels: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Rises of the cross-entropy, in nats, that thresholds are calibrated to; classes are of --level."""
    level: float = 0.01
    """The one that classes are of."""
    noise_tokens: int = 10_240
    """Held-out tokens on which the threshold is calibrated, at most."""
    unexplained: float = 0.5
    """R^2 of the MLP below which a target is called unexplained."""
    min_documents: int = 10
    """Documents in which a target must fire to be classed; with fewer it is called rare."""
    replicates: int = 1000
    """Of the bootstrap."""
    out: Path = Path("runs/linearity")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.linearity_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
