"""Pages of all features of a dictionary: a table to sort and search, and a panel of each with what is known of it.

    python -m experiments.features runs/demo --out runs/demo-features
    open runs/demo-features/features/index.html

Of every feature that fires on held-out text: how often and how strongly, moments, the tokens it fires on, the strongest
texts and some of every strength, features that fire with it; the tokens that its direction raises and lowers; what
ablating it does to the predictions; and the best simple rule for it (no language model judges here), scored on text
that it was not found on. Rules tell much of a random dictionary too: `experiments.feature_measures` has the controls.

The folder can be sent to others: it needs no network and no server. `collected.npz` holds what was collected
(`features.Collected.load`). Some minutes for 200,000 tokens and 2,048 features of the embedded model on two CPU cores.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import command
from experiments.reading_flags import ReadingFlags


@dataclass(frozen=True)
class MeasuringFlags(ReadingFlags):
    """What is measured of features: this experiment and `experiments.feature` have it in common."""

    effect_tokens: int = 2048
    """Tokens of the rows (padding included) on which features are ablated; 0: none are."""
    rule_tokens: int = 204_800
    """Tokens of the rows (padding included) on which rules are found and scored; 0: none are."""
    memory_gb: float = 8.0
    """Memory that collecting may need, in GB; told after the first batch."""
    earlier: Path | None = None
    """A dictionary of an earlier site of the same model: which of its features cause these?"""
    causes: int = 8
    """Causes that are shown."""
    cause_texts: int = 20
    """Texts in which earlier features are ablated: drawn from the strongest places and a sample of all firings, those
    with at least half of the largest activation."""
    replace: bool = False
    """Where needed tokens are looked for, replace earlier tokens by ten others drawn from the text; by default each is
    dropped, and the rest moves up."""


@dataclass(frozen=True)
class Flags(MeasuringFlags):
    """Pages of all features of a dictionary."""

    top: int = 6
    """Strongest texts of each feature."""
    per_quantile: int = 2
    """Texts drawn from each fifth of its firings."""
    tokens_shown: int = 8
    """Top tokens, and raised and lowered ones."""
    need_texts: int = 0
    """Strongest texts of each feature in which every earlier token is taken away: seconds a feature, as --earlier."""
    explanations: Path | None = None
    """Run folder of `experiments.explain`, whose explanations and scores are shown."""
    out: Path = Path("runs/features")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.features_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
