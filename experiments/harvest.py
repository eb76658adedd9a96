"""Run a text through a language model once and keep the activations of several sites: the store that --store reads.

    python -m experiments.harvest --out runs/store --sites resid_post.3 mlp_out.3 --dtype bfloat16
    python -m experiments.train_sae --store runs/store --out runs/a topk

A store holds rows of text in the text's order, each with its tokens and documents and a checksum; training reads them
in the order that its seed gives, the same as without a store. float32 takes 4 bytes a number, bfloat16 2, int8 1 (and
4 a token). With --codes a trained dictionary's sparse codes are kept beside (or, without --sites, in place of) them.

Ctrl-C, a kill or a full disk leave whole shards; --resume goes on at the first that is missing. Several processes,
on one machine or several with one file system, harvest one store: --process 0 --processes 4 and so on, started alike.
--check reads a whole store and names what is damaged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import command
from experiments.text_flags import TextFlags


@dataclass(frozen=True)
class Flags(TextFlags):
    """Run a text through a language model once and keep the activations of several sites in a store."""

    sites: tuple[str, ...] = ()
    """Where activations are taken: NAME.LAYER, or TransformerLens' name; one or several, in one pass. By default
    resid_post.3, or nothing beside --codes."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """How they are written; int8 with a scale for every token."""
    codes: tuple[Path, ...] = ()
    """Run or dictionary folders of trained dictionaries, whose sparse codes are stored."""
    slots: int = 64
    """Active features of a token that are kept, the largest; what finds no slot is counted and said."""
    side: Literal["train", "evaluation"] = "train"
    """Which documents: those to train on, or those held out."""
    tokens: int | None = None
    """Tokens to store, at most, from the start of the text; by default all. A hub dataset may have no end."""
    shard_rows: int | None = None
    """Rows of text in a shard; by default as many as take 128 MB."""
    process: int = 0
    """Which of the processes that harvest this store together."""
    processes: int = 1
    """How many they are; each takes every so-many-th shard."""
    resume: bool = False
    """Go on with the store in --out; the flags must be the same."""
    overwrite: bool = False
    """Remove the store in --out first."""
    check: bool = False
    """Read the whole store in --out and name damaged shards (exit code 1 if there are any); nothing else is done."""
    out: Path = Path("runs/store")
    """Folder of the store."""
    reuse_memory: bool = True
    """Keep freed memory in the process (glibc): faster on CPU, but the peak is never given back."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.harvest_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
