"""The flags that say which dictionary is read, and on what: experiments on features have them in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ReadingFlags:
    """A dictionary, and the model and text that it is read on."""

    dictionary: Annotated[Path, tyro.conf.Positional]
    """Run folder, a dictionary's folder, or a folder in SAELens' format."""
    model: str | None = None
    """Language model, where the dictionary does not say which or it has another name here."""
    revision: str | None = None
    """Its revision."""
    site: str | None = None
    """Site, where the dictionary does not say which."""
    text: str | None = None
    """Text; by default that of the dictionary's training, or the embedded one."""
    eval_text: str | None = None
    """What is read; by default as in training: held-out documents."""
    eval_tokens: int = 204_800
    """Held-out tokens to read, at most."""
    max_norm: float | None = None
    """Places where the activation's norm is larger do not count; by default as in the dictionary's training."""
    seed: int = 0
    """Decides what is drawn."""
    overwrite: bool = False
    """Remove the run in --out first."""
    debug: bool = False
    """Show tracebacks of errors in the input."""
