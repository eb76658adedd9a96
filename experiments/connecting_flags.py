"""The flags that say which dictionaries are connected, and on what: experiments on connections have them in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ConnectingFlags:
    """Dictionaries before and after a part of the model, and the text that connectors are fitted and measured on.

    Dictionaries are found in the run folder of `experiments.sweep` by site, for each of --layers; or they are given one
    by one: --before and --after. The connectors' training text is that of the dictionaries, of which a share of the
    documents is for choices (validation); all figures are of the held-out text, which nothing was fitted on.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder of `experiments.sweep` in which the dictionaries are (dictionaries/SITE/MEMBER)."""
    inputs: tuple[str, ...] = ("resid_pre",)
    """Input sites of each layer, without its number; several stand side by side. A dictionary of resid_post of the
    layer before serves as one of resid_pre."""
    target: str = "mlp_out"
    """Target site of each layer, without its number."""
    raw: tuple[str, ...] = ()
    """Which of these sites are taken as they are, without a dictionary."""
    layers: tuple[int, ...] = ()
    """Layers."""
    all_layers: bool = False
    """All layers of which the run folder has the dictionaries; with --train-missing all of the model's."""
    member: str | None = None
    """Which member of the sweep, where a site has several."""
    before: tuple[Path, ...] = ()
    """Dictionaries of the input sites, where they are given one by one: folders of ours or in SAELens' format."""
    after: Path | None = None
    """Dictionary of the target site, then."""
    train_missing: bool = False
    """Train the dictionaries that are missing first (TopK, by `experiments.sweep`, in OUT/trained)."""
    dictionary_tokens: int = 2_200_000
    """Tokens to train them on."""
    dictionary_k: int = 32
    """Their active features a token."""
    dictionary_expansion: int = 8
    """Their features per input dimension."""
    model: str | None = None
    """Language model, where the dictionaries do not say which or it has another name here."""
    revision: str | None = None
    """Its revision."""
    text: str | None = None
    """Text; by default that of the dictionaries' training, or the embedded one."""
    eval_text: str | None = None
    """What figures are of; by default as in training: held-out documents."""
    tokens: int = 2_000_000
    """Tokens of the training text that connectors are fitted on, at most (validation included)."""
    validation: float = 0.1
    """Share of them, by documents, on which choices are made (ridge, elbow)."""
    eval_tokens: int = 204_800
    """Held-out tokens that figures are of, at most."""
    codes: Path | None = None
    """Folder of the codes, to be shared by runs on the same dictionaries and text; by default OUT/codes, which stays
    with --overwrite if it is the same."""
    step0_run: Path | None = None
    """Finished run of this experiment on a model with random weights, whose figures stand beside (control)."""
    seed: int = 0
    """Decides what is drawn, and starting weights."""
    resume: bool = False
    """Continue the run in --out: layers that are done are not done again. The flags must be the same."""
    overwrite: bool = False
    """Remove the run in --out first."""
    debug: bool = False
    """Show tracebacks of errors in the input."""
