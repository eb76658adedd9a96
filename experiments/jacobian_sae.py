"""Train Jacobian autoencoders around the MLP of one layer, and compare them with a model of random weights.

    python -m experiments.jacobian_sae --layer 3 --step0 EleutherAI/pythia-70m --step0-revision step0 \
        --model EleutherAI/pythia-70m --out runs/jacobian

For each penalty coefficient a pair of TopK dictionaries, of the MLP's input and of its output, is trained: all of them
in one pass over the text. A coefficient of 0 trains two ordinary dictionaries, which is what the others are measured
by. Measured on held-out text: FVU of both sides, the rise of the CE with the input, the output or both replaced, how
sparse the Jacobian between active features is, how linear the function of each pair of features is, and how many
connections an output feature has. The same pairs are trained on --step0, whose figures stand beside every other:
sparsity that random weights show too says nothing about what the model has learnt.

The dictionaries are saved as ordinary ones: dictionaries/trained/mlp_in.3/jacobian-128 and so on. An interrupted run
goes on with --resume. Source: Farnik et al. 2025 (ICML); formulas: sparse_jax/connectors/jacobian_sae.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experiments import command
from experiments.text_flags import TextFlags
from sparse_jax.activations.normalise import Rule
from sparse_jax.training.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Flags(TextFlags):
    """Train Jacobian autoencoders around the MLP of one layer, and compare them with a model of random weights."""

    step0: str | None = None
    """The same model with random weights, as --model takes it: the control. Without it there is none, which is said."""
    step0_revision: str | None = None
    """Its revision on the hub (of Pythia: step0)."""
    layer: int = 3
    """Whose MLP."""
    coefficients: tuple[float, ...] = (0.0, 128.0, 512.0)
    """Of the penalty, one pair each; 0 first gives the curves their start."""
    n_features: int = 2048
    """Features on each side."""
    k: int = 32
    """Active features of a token, on each side."""
    aux_coefficient: float = 1 / 32
    """Weight of AuxK, which revives dead features; the paper does without (0)."""
    at: Literal["reconstruction", "input"] = "reconstruction"
    """At which input of the MLP the Jacobian is taken."""
    every: int = 4
    """Take the penalty on every so many-th row of a batch: an unbiased estimate, rows being shuffled. On all rows (1)
    the penalty takes about twice as long as all else on a CPU, on every fourth about as long."""
    learning_rate: float = 3e-3
    """Adam's peak learning rate."""
    schedule: Schedule = field(default_factory=lambda: Schedule(coefficient_warmup=0.05))
    """Warm-ups and decay, as shares of the run; the penalty is warmed up over 5 % of it, as in the paper."""
    normalise: Rule = "centre-scale"
    """What is done to activations on each side: scale means E||x||^2 = d."""
    tokens: int = 2_000_000
    """Tokens to train on."""
    eval_tokens: int = 102_400
    """Held-out tokens to measure on, at most."""
    functions: int = 512
    """How many scalar functions (a token and a feature on either side) are sampled of each pair."""
    thresholds: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Above which entries of the Jacobian are counted, as they are and relative to its mean norm."""
    drop_outliers: bool = False
    """Mask tokens whose activation norm exceeds 10 times the median."""
    batch: int = 1024
    """Tokens in a training step."""
    statistics_tokens: int = 131_072
    """Training tokens from which the normalisers are fitted, at most."""
    dead_window: int = 500_000
    """A feature silent for more training tokens counts as dead; at most a quarter of the run."""
    block_rows: int = 256
    """Rows of text that are harvested and shuffled together."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    seed: int = 0
    """Decides initial parameters, the order of the data and what is sampled."""
    out: Path = Path("runs/jacobian_sae")
    """Run folder."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoints; the flags must be the same."""
    overwrite: bool = False
    """Remove the run in --out first."""
    reuse_memory: bool = True
    """Keep freed memory in the process (glibc): faster on CPU, but the peak is never given back."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.jacobian_sae_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
