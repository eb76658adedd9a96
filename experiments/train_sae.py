"""Train a dictionary on one site of a language model, measure it beside its floors, and write a report.

    python -m experiments.train_sae --out runs/demo l1

On two CPU cores the defaults take some minutes. See the README for the figures to expect.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import command
from experiments.scale_flags import ScaleFlags
from experiments.training_flags import TrainingFlags


@dataclass(frozen=True)
class Flags(ScaleFlags, TrainingFlags):
    """Train a dictionary on one site of a language model, measure it beside its floors, and write a report.

    The dictionary is the subcommand; its own flags come after it: `... --out runs/a l1 --l1 4`.
    """

    site: str = "resid_post.3"
    """Where activations are taken: NAME.LAYER, or TransformerLens' name."""
    learning_rate: float = 3e-3
    """Adam's peak learning rate."""
    target_l0: float | None = None
    """Hold the mean number of active features here by moving the sparsity coefficient (l1, lp, gated, jump-relu)."""
    report_features: int = 30
    """Features shown in the report, drawn uniformly from those that fire."""
    seed: int = 0
    """Decides initial parameters, the order of the data and what the report samples."""
    order_seed: int | None = None
    """Decides the order of the data, where it is not to follow --seed: a member of a sweep is trained alone so."""
    out: Path = Path("runs/train_sae")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.scale import joined  # the heavy imports: `--help` does not wait for them
    from experiments.train_sae_run import run

    with joined(flags):
        return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
