"""Learn a dictionary by sparse coding: codes that solve the lasso, atoms moved by a basis update; from scratch, or from
a trained autoencoder.

    python -m experiments.fista_dictionary --out runs/fista --target-l0 32
    python -m experiments.fista_dictionary --out runs/refined --target-l0 32 --from-run runs/demo
    python -m experiments.fista_dictionary --out runs/codes --target-l0 32 --from-run runs/demo --learner frozen

The last keeps the autoencoder's dictionary as it is and only gives it the best codes. What is written is what
`train_sae` writes: the same report, floors and checkpoints, and every experiment that reads a run reads it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experiments import command
from experiments.train_sae import Flags as TrainFlags
from sparse_jax.dictionaries import Fista


@dataclass(frozen=True)
class Flags(TrainFlags):
    """Learn a dictionary by sparse coding: solved codes, atoms moved by a basis update."""

    dictionary: Fista = field(default_factory=Fista)
    """The dictionary: its size, lambda (--dictionary.l1), the sign of its codes, tolerances."""
    tokens: int = 1_000_448
    """Tokens to learn from; solving codes takes some times as long as an autoencoder's step."""
    learner: Literal["quadratic", "online", "adam", "frozen"] = "quadratic"
    """How atoms move, given codes. quadratic: Yun et al. 2021's basis update; online: Mairal et al. 2009's (for up to a
    few thousand features); adam: Adam on the same gradient, with --learning-rate; frozen: not at all."""
    rate: float = 0.2
    """Step of the quadratic update; 1 is Newton's for each atom alone."""
    from_run: Path | None = None
    """Begin with the dictionary, the decoder bias and the normaliser of this run."""
    out: Path = Path("runs/fista_dictionary")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.fista_dictionary_run import run  # the heavy imports: `--help` does not wait for them
    from experiments.scale import joined

    with joined(flags):
        return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
