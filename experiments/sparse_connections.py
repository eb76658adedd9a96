"""Which features before a module make which features after it? A sparse linear connector between two dictionaries.

    python -m experiments.sparse_connections runs/pair3 --layers 3
    python -m experiments.sparse_connections runs/sweep --all-layers --step0-run runs/connections-step0
    python -m experiments.sparse_connections --train-missing --layers 3 --inputs resid_pre --target attn_out
    python -m experiments.sparse_connections runs/all --layers 3 --inputs resid_pre attn_out mlp_out --target resid_post

For each layer, on codes of both dictionaries (fitted on training text, chosen on other documents of it, measured on
held-out text):

    path        the linear connector with an l1 penalty, exactly, for every alpha; least squares on each support
    front       R^2 of targets against connections, elbow (chord rule), connections for 90 % of the dense R^2
    beside it   the dense linear connector (ridge chosen) and an MLP: R^2 of each target, g = R^2 of MLP - R^2 of dense
    formulas    OF 30 = 0.26 IF 2797 + 0.23 IF 259 - ..., labelled OR, AND, AND-NOT or weighted sum by counts
    spliced     rise of the cross-entropy with the target site replaced by what connectors predict
    causal      inputs removed one at a time, the module run again: does the target change as its weight says?
    weights     beside mean Jacobians (MLPs) and virtual weights

Run folder: layers/L/{figures,front,targets}.json (a row each target), layers/L/connectors, layers/L/pages/index.html,
metrics.json, report.html. Some minutes a layer of 2,048 features on two quiet cores for 100,000 tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import command
from experiments.connecting_flags import ConnectingFlags


@dataclass(frozen=True)
class Flags(ConnectingFlags):
    """Which features before a module make which features after it?"""

    alphas: tuple[float, ...] = ()
    """Penalties of the path; by default --points of them, evenly in the logarithm."""
    points: int = 12
    """How many, then."""
    smallest: float = 2e-2
    """The last of those over the largest, from which all weights are 0; smaller ones need more connections and time."""
    sample: int = 256
    """Targets, drawn from those alive, whose path goes on to --sample-smallest: how many connections do they need for
    90 % of what the dense connector reaches? 0: the path of all answers that, as far as it goes."""
    sample_smallest: float = 2e-3
    """As --smallest, for those."""
    alpha: float | None = None
    """Penalty of the sparse connector; by default that of the elbow of the front on the validation documents."""
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Ridges of the dense linear connector, of which validation chooses."""
    mlp: Literal["on-linear", "plain"] = "on-linear"
    """The MLP: hidden units beside the dense linear connector, which stays as it is; or hidden units alone."""
    mlp_width: int = 512
    """Hidden units of the MLP."""
    mlp_tokens: int = 0
    """Tokens it is trained on, repeats included; 0: each once."""
    mlp_batch: int = 2048
    """Tokens in a step of its training."""
    splice_tokens: int = 20_480
    """Held-out tokens on which the site is replaced, at most; 0: it is not."""
    splice_points: int = 3
    """Points of the path with which it is replaced too, from the sparsest to the densest: what sparsity costs."""
    jacobian_support: bool = False
    """Replace it also by connectors with as many inputs of each target as at those points, those of the largest mean
    Jacobian: which choice needs fewer for the same rise? MLPs only."""
    jacobian_tokens: int = 40_960
    """Fitting tokens, at most, that this mean is of."""
    non_negative: bool = False
    """Where the site is replaced, codes predicted below 0 become 0, as no encoder would give them."""
    checks: int = 1000
    """Connections at places whose input is changed; 0: none are."""
    set_to: Literal["zero", "maximum"] = "zero"
    """What the input's code becomes there: removed, or the largest it has on held-out text."""
    weights: bool = True
    """Compare with mean Jacobians and virtual weights."""
    pages: int = 40
    """Targets that get pages: in turns those of each label, the best predicted first; 0: none."""
    needs: bool = True
    """Look for the earlier tokens that those need."""
    out: Path = Path("runs/sparse_connections")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.sparse_connections_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
