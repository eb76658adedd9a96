"""How specific are features, measured without a judge? A dictionary beside its controls.

    python -m experiments.feature_measures runs/demo
    python -m experiments.feature_measures runs/demo --step0-run runs/demo-step0
    python -m experiments.feature_measures path/to/a/saelens/folder --model EleutherAI/pythia-70m

Of a sample of features that fire, drawn uniformly, mean and standard error of

    commonest token     share of the commonest token among activations evenly spaced over the feature's range
    token entropy       entropy (nats) of the token given that the feature fires, over equally many firings of each
    entropy before      the same of the token before it
    rule F1, ...        how well the best simple rule tells the feature: found on the first half of the text, scored on
                        the second (precision, recall, F1, correlation with the activation); a rule is a certain token,
                        or a pattern ("begins with a capital", "-ing"), at the place or before it
    token F1, ...       of rules of each kind alone

beside the same figures for neurons, PCA and a random dictionary (of which each token keeps as many coefficients as the
dictionary has active features), and for --step0-run, a dictionary trained on a model with random weights. Only what
exceeds the controls says something about the dictionary: rules about tokens tell features of a random model well.

Samples that fire often come from few features where a basis has few (neurons, PCA). Two to five minutes on a laptop for
200,000 tokens of the embedded model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import command
from experiments.reading_flags import ReadingFlags


@dataclass(frozen=True)
class Flags(ReadingFlags):
    """How specific are features, measured without a judge? A dictionary beside its controls."""

    step0_run: Path | None = None
    """The same of a dictionary that was trained on the model with random weights; on its own card's model and text."""
    controls: bool = True
    """Measure neurons, PCA and a random dictionary too."""
    sample: int = 200
    """Features measured of each, drawn uniformly from those that fire often enough."""
    min_firings: int = 20
    """Firings that a feature must have in each half of the text."""
    draws: int = 40
    """Firings of each feature that its entropies are of; at most twice --min-firings, so that all have as many."""
    levels: int = 20
    """Activations evenly spaced over a feature's range, of which the commonest token's share is taken."""
    by: Literal["correlation", "f1"] = "correlation"
    """What makes a rule the best, on the half that it is found on."""
    seed: int = 0
    """Decides which features and firings are drawn, and the random dictionary."""
    out: Path = Path("runs/feature_measures")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.feature_measures_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
