"""What does a module do between two dictionaries, in hidden units? The autoencoder connector, beside a plain MLP.

    python -m experiments.sae_connector runs/pair3 --layers 3
    python -m experiments.sae_connector runs/pair3 --layers 3 --hidden-l1 0.03 0.1 0.3 1 --alpha 1e-4

    h = ReLU(F1 W_enc + b_enc)      F2 = h W_dec + b_dec
    loss = squared error + alpha |W|_1 + hidden_l1 x norm-weighted |h|_1

One autoencoder connector for each --hidden-l1, and an MLP as wide without any penalty: R^2 of targets against the mean
number of hidden units that fire (L0), counts of weights above 0.1 by sign. Of the connector that is read (--read; by
default the first --hidden-l1) each of the strongest units gets a page: what it is made of, what it writes, its texts,
and clusters of the tokens that fire it or that its negative inputs stop it on ('A large with B small').

Run folder: layers/L/{figures,units}.json (a row each unit), layers/L/connectors, layers/L/pages/index.html,
metrics.json, report.html. Minutes for each connector of 2 million tokens on two quiet cores.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments import command
from experiments.connecting_flags import ConnectingFlags


@dataclass(frozen=True)
class Flags(ConnectingFlags):
    """What does a module do between two dictionaries, in hidden units?"""

    width: int = 2048
    """Hidden units of all connectors."""
    hidden_l1: tuple[float, ...] = (0.1, 0.03, 0.3)
    """Penalties of hidden codes, one autoencoder connector each."""
    alpha: float = 1e-4
    """Penalty of the weights of the autoencoder connectors: without it no weight is exactly 0."""
    plain_norm: bool = False
    """Penalise hidden codes as they are, not times the norm of what they write."""
    read: float | None = None
    """The --hidden-l1 of the connector whose units get pages; 0 is the MLP; by default the first."""
    fit_tokens: int = 0
    """Tokens that connectors are trained on, repeats included; 0: each once."""
    batch: int = 2048
    """Tokens in a step of training."""
    pages: int = 40
    """Units that get pages, those with the largest mean of activation x norm of what they write; 0: none."""
    cluster_tokens: int = 1000
    """Tokens that a unit's clusters are of: so many where it fires, as many where it is stopped."""
    out: Path = Path("runs/sae_connector")
    """Run folder."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.sae_connector_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
