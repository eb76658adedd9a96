"""Which features does a layer's attention look for, where, and what do they bring? Between two dictionaries.

    python -m experiments.attention_connections runs/pair/dictionaries/resid_pre.3 runs/pair/dictionaries/attn_out.3

The first dictionary is of the residual stream that enters a layer (resid_pre.L, or resid_post of the layer before), the
second of what its attention adds (attn_out.L). On held-out text:

- how much of each feature of attn_out the features of the same position explain (R^2 on documents that no map was
  fitted on; linear map, MLP, and the mean as floor): what is left, attention has moved from elsewhere;
- the strongest (query feature, key feature, output feature) trios of each head, by the mean over tokens of attention x
  what query and key add to the logit x what the key feature writes on the output feature where that fires;
- the same largest entries of the QK and OV maps, weighed by how strong features are where they fire;
- a sample of the trios checked: the key or the query feature is removed, error kept, and the layer's attention run
  again; beside trios drawn at random.

Run folder: trios.json, same_position.json, maps.json, report.html, metrics.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments import command


@dataclass(frozen=True)
class Flags:
    """Which features does a layer's attention look for, where, and what do they bring?"""

    before: Annotated[Path, tyro.conf.Positional]
    """Dictionary of resid_pre.L: run folder, a dictionary's folder, or a folder in SAELens' format."""
    after: Annotated[Path, tyro.conf.Positional]
    """Dictionary of attn_out.L."""
    layer: int | None = None
    """Layer L; by default the one that the dictionaries were trained on."""
    model: str | None = None
    """Language model, where the dictionaries do not say which or it has another name here."""
    revision: str | None = None
    """Its revision."""
    text: str | None = None
    """Text; by default that of the dictionaries' training, or the embedded one."""
    eval_text: str | None = None
    """What is read; by default as in training: held-out documents."""
    eval_tokens: int = 102_400
    """Held-out tokens to read, at most."""
    heads: tuple[int, ...] = ()
    """Heads to find trios of; by default all."""
    trios: int = 20
    """Trios of each head."""
    pairs: int = 512
    """(Query, key) pairs of each head whose trios are summed exactly."""
    per_pair: int = 1
    """Trios with the same query and key feature, at most."""
    sources: int = 4
    """Places that a head attends to most, of each token, that are looked at."""
    distance: int = 1
    """Distance of query and key in the QK maps."""
    checks: int = 256
    """Places at which trios are checked by intervention, and as many of random trios."""
    held_out: float = 0.2
    """Share of the text, by documents, on which R^2 is measured; the maps are fitted on the rest."""
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Ridges of the linear one, of which a tenth of those documents chooses."""
    mlp_epochs: int = 4
    """Times that the MLP sees the text it is fitted on; 0: no MLP."""
    mlp_width: int = 256
    """Hidden units of the MLP, which stands on the linear map."""
    slots: int = 64
    """Active features of a token that are kept, at most."""
    memory_gb: float = 4.0
    """Memory that the search for trios may need, in GB: 8 bytes for each pair of features."""
    seed: int = 0
    """Decides what is drawn."""
    out: Path = Path("runs/attention_connections")
    """Run folder."""
    overwrite: bool = False
    """Remove the run in --out first."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.attention_connections_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
