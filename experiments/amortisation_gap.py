"""How much does an encoder lose against the best codes of its own dictionary?

    python -m experiments.amortisation_gap runs/demo
    python -m experiments.amortisation_gap path/to/a/saelens/folder --model EleutherAI/pythia-70m

The dictionary, its decoder bias, the norms of its atoms and the sign of its codes stay the same. Four kinds of codes on
the same held-out tokens:

    encoder                 what the dictionary's own encoder gives
    encoder's support       the encoder chooses the features, non-negative least squares their values
    solver                  argmin ||x - c W||^2 + lambda ||c||_1, c >= 0, lambda such that L0 is the encoder's
    solver's support        the solver chooses, non-negative least squares gives the values

lambda is tuned on tokens of the training text, never on what is measured. The lasso shrinks its values, which costs it
FVU that the refitted row gives back; what remains between the refitted rows is what the encoder's choice loses. The
objective gap is how far the encoder's codes are above the minimum of the lasso at that lambda, relatively.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments import command


@dataclass(frozen=True)
class Flags:
    """How much does an encoder lose against the best codes of its own dictionary?"""

    dictionary: Annotated[Path, tyro.conf.Positional]
    """Run folder, a dictionary's folder, or a folder in SAELens' format."""
    model: str | None = None
    """Language model, where the dictionary does not say which or it has another name here."""
    revision: str | None = None
    """Its revision."""
    text: str | None = None
    """Text; by default that of the dictionary's training, or the embedded one."""
    eval_text: str | None = None
    """What is measured on; by default as in training: held-out documents."""
    eval_tokens: int = 40_960
    """Held-out tokens to measure on, at most."""
    tune_tokens: int = 8_192
    """Tokens of the training text on which lambda is tuned."""
    tolerance: float = 1e-4
    """Relative duality gap of the solver's codes."""
    seed: int = 0
    """Decides which tokens lambda is tuned on."""
    out: Path = Path("runs/amortisation_gap")
    """Run folder."""
    overwrite: bool = False
    """Remove the run in --out first."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.amortisation_gap_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
