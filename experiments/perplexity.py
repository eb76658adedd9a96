"""The clean loss of a language model on a text; with a dictionary, also with its site replaced by the reconstruction.

    python -m experiments.perplexity --text austen --tokens 20480
    python -m experiments.perplexity --text austen --tokens 20480 --dictionary runs/demo --out runs/perplexity_demo

What counts. The documents are joined with the model's separator before each and cut into rows. Without a
begin-of-text token (--bos none) every position predicts the token after it: every token of the rows but the very first
is predicted once, and so is the one after the last row. With one (--bos row) every token of the rows is predicted once,
from the begin-of-text token and those before it in its row; what a row's last position predicts is the next row's
first token and does not count again. So no prediction is left out and none is counted twice: separators count as
targets, and predictions from them and from the begin-of-text token count; the begin-of-text token is never a target.
`--skip-positions N` leaves out the predictions made at the first N positions of each row.

`nats_per_token` is the mean over these predictions. Its standard error is the standard deviation of the rows' means
over the root of the number of rows: rows are taken as independent, which rows of one document are only nearly.
`perplexity` is exp of it. `bits_per_byte` is the sum of nats / ln 2 / the UTF-8 bytes of all targets (a separator has
none), which can be compared between models of different tokenizers.

With --dictionary, the site is replaced exactly where the dictionary's training mask let tokens through: not at
separators, padding and begin-of-text tokens, nor at the first `skip_positions` of each row (as its card says, else 1),
nor where the norm exceeds the card's `max_norm`. Losses are over the same predictions as the clean one, those from
positions that are not replaced included; `fvu` and `l0` are over the replaced positions. The floors beside it replace
the same positions by zero, and by the training mean where the run folder has `statistics.npz`.

Figures go to metrics.json. Ctrl-C ends without them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import command


@dataclass(frozen=True)
class Flags:
    """The clean loss of a language model on a text; with a dictionary, also with its site replaced by it."""

    model: str = "novel-neox"
    """Embedded name (novel-neox), folder in Hugging Face's layout, or hub id (EleutherAI/pythia-70m)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    text: str = "austen"
    """What to predict: embedded, austen, state-of-the-union, a .txt(.gz) or .jsonl(.gz) file, or hub:owner/dataset."""
    text_field: str = "text"
    """Field that holds the text in .jsonl files and hub datasets."""
    split: str = "train"
    """Split of a hub dataset."""
    store: Path | None = None
    """Take --model, --text, --context and --bos from this store of `experiments.harvest`."""
    unfinished_store: bool = False
    """Take them from a store whose harvest has not ended, too."""
    tokens: int | None = None
    """Tokens in all rows together, at most, from the start of the text; by default all. A hub dataset needs it."""
    context: int | None = None
    """Tokens in a row of text; by default 1024, or all positions of a model that has fewer (the embedded one: the 256
    it was trained on)."""
    bos: Literal["auto", "none", "row"] = "auto"
    """Whether each row begins with the begin-of-text token; auto: as the model's family was trained (GPT-NeoX, GPT-2
    and Qwen: none; Llama and Mistral: row)."""
    skip_positions: int = 0
    """Positions at the start of each row whose predictions do not count; by default all count."""
    batch_rows: int = 8
    """Rows at once: their logits, some copies, must fit in memory."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Inputs of matrix products in the model; auto: bfloat16 where matrix units take it. Losses are float32 always."""
    dictionary: Path | None = None
    """Run folder or dictionary folder: its site is replaced by its reconstruction."""
    allow_other_model: bool = False
    """Use the dictionary on a model of other weights than it was trained on."""
    out: Path = Path("runs/perplexity")
    """Run folder."""
    overwrite: bool = False
    """Remove the run in --out first."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    from experiments.perplexity_run import run  # the heavy imports: `--help` does not wait for them

    return run(flags)


if __name__ == "__main__":
    command.main(Flags, main)
