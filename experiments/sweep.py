"""Train many dictionaries in one pass over the activations; the report shows what each sparsity reaches, over seeds.

    python -m experiments.sweep --seeds 0 1 2 --sparsities 8 16 32 64 topk

Members are all combinations of --sites, --expansions, --learning-rates, --sparsities (or --target-l0s) and --seeds. All
see the same activations in the same order. A member alone: `train_sae` with its flags, `--seed` of its own and
`--order-seed` of the sweep's.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import command
from experiments.scale_flags import ScaleFlags
from experiments.training_flags import TrainingFlags


@dataclass(frozen=True)
class Flags(ScaleFlags, TrainingFlags):
    """Train many dictionaries in one pass over the activations and draw the fronts they reach.

    The dictionary is the subcommand; its own flags come after it: `... --sparsities 16 32 topk --aux-k 64`.
    """

    sites: tuple[str, ...] = ("resid_post.3",)
    """Where activations are taken: NAME.LAYER, or TransformerLens' name; one or several."""
    seeds: tuple[int, ...] = (0,)
    """Each decides the initial parameters of its members; error bars are over them."""
    sparsities: tuple[float, ...] = ()
    """Values of k (topk, batch-topk, matryoshka, multi-topk, matching-pursuit) or of the sparsity coefficient (l1, lp,
    gated, jump-relu); by default the dictionary's own flag."""
    target_l0s: tuple[float, ...] = ()
    """In place of coefficients: mean numbers of active features to hold by moving the coefficient."""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Adam's peak learning rates."""
    expansions: tuple[int, ...] = ()
    """Widths, as features per input dimension; by default the dictionary's own flag."""
    measure_at: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the run at which every member is measured on held-out text; at the end in any case."""
    measure_tokens: int = 32_768
    """Held-out tokens for the measurements before the end."""
    seed: int = 0
    """Decides the order of the data and the random floor."""
    out: Path = Path("runs/sweep")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.scale import joined  # the heavy imports: `--help` does not wait for them
    from experiments.sweep_run import run

    with joined(flags):
        return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
