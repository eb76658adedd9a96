"""What does feature 123 do? One command: it prints what is known of a feature, and makes its page.

    python -m experiments.feature runs/demo 123
    python -m experiments.feature runs/layer-3 123 --earlier runs/layer-1     also: which earlier features cause it

It says how often the feature fires and on which tokens, the best simple rule for it, the texts on which it is
strongest (the token at which it fires is written [[so]]), which earlier tokens it needs there, which tokens its
direction raises, what ablating it does to the predictions, and which features fire with it.

About a minute for the embedded model on two CPU cores.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments import command
from experiments.features import MeasuringFlags


@dataclass(frozen=True)
class Flags(MeasuringFlags):
    """What does a feature do?"""

    features: Annotated[tuple[int, ...], tyro.conf.Positional] = ()
    """Its number, or several."""
    effect_tokens: int = 16_384
    """Of the tokens, those on which the feature is ablated; 0: it is not."""
    texts: int = 5
    """Strongest texts that are printed, and in which the context is ablated."""
    tokens_shown: int = 8
    """Top tokens, and raised and lowered ones."""
    out: Path = Path("runs/feature")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.feature_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
