"""Which tokens does each feature fire on? Tables of a dictionary's features, beside the neurons of its site.

    python -m experiments.top_tokens runs/demo runs/other
    python -m experiments.top_tokens --prompts truthfulqa-six-shot --layers 1 2 3

With run folders: a table for each dictionary, on its held-out text. With --prompts, the whole pipeline of Udell's
write-up: activations of the six-shot prompts, a dictionary for each layer held at a target L0, a table for each on the
prompts it was trained on.

Each table lists, for every feature that fires, the tokens on which its mean activation is largest. Beside it stands the
same for neurons, of which each token keeps as many of the largest as the dictionary has active features (L0; those that
are negative, about half, are not read). CSV files hold all features, the report the first --rows. Run folder:
tables/SITE.csv, tables/SITE-neurons.csv, report.html, metrics.json.

On two CPU cores: about a minute a run folder; the pipeline for three layers of the embedded model some ten minutes. In
a dictionary's features the commonest token has a larger share of the firings than in neurons'.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import command


@dataclass(frozen=True)
class Flags:
    """Which tokens does each feature fire on? Tables of a dictionary's features, beside the neurons of its site."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders: of runs, of dictionaries in them, or in SAELens' format; one for each table."""
    prompts: Literal["truthfulqa-six-shot"] | None = None
    """Train a dictionary for each of --layers on these prompts first."""
    layers: tuple[int, ...] = ()
    """With --prompts: layers whose residual stream (resid_post) is read; by default all."""
    target_l0: float = 20.0
    """With --prompts: mean number of active features that training holds."""
    expansion: int = 4
    """With --prompts: features per input dimension."""
    train_tokens: int = 1_000_000
    """With --prompts: tokens to train on; the prompts hold some 400,000, so these are several epochs."""
    context: int = 512
    """With --prompts: tokens in a row; a prompt has as many shots, up to six, as fit."""
    holdout: float = 0.05
    """With --prompts: share of the questions that is held out, for the figures of training."""
    model: str | None = None
    """Language model, where the dictionary does not say which; with --prompts by default novel-neox."""
    revision: str | None = None
    """Its revision."""
    text: str | None = None
    """With run folders: text to read on, by default that of the training."""
    side: Literal["held-out", "training"] | None = None
    """Read held-out or training documents; by default held-out, and with --prompts training."""
    read_tokens: int = 204_800
    """Tokens to read, at most."""
    tokens_shown: int = 10
    """Tokens of each feature."""
    over: Literal["occurrences", "firings"] = "occurrences"
    """Mean activation over all occurrences of a token, or over those on which the feature fires."""
    least: int = 5
    """Tokens that occur less often are left out: their means are noise."""
    order: Literal["mean", "density", "feature"] = "mean"
    """Features by the mean activation on their first token, by density (largest first), or by number."""
    rows: int = 200
    """Features of each table in the report."""
    seed: int = 0
    """Decides the training."""
    out: Path = Path("runs/top_tokens")
    """Run folder."""
    overwrite: bool = False
    """Remove the run in --out first."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.top_tokens_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
