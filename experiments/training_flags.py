"""The flags that every experiment which trains dictionaries has in common."""

from dataclasses import dataclass, field
from typing import Literal

import tyro

from sparse_jax.activations.normalise import Rule
from sparse_jax.dictionaries import (
    L1,
    BatchTopK,
    Gated,
    JumpReLU,
    Lp,
    MatchingPursuit,
    Matryoshka,
    MultiTopK,
    TopK,
)
from sparse_jax.training.decoder_bias import BiasStart
from sparse_jax.training.schedules import Schedule

Trainable = tyro.extras.subcommand_type_from_defaults(
    {cls.kind: cls() for cls in (L1, Lp, Gated, JumpReLU, TopK, BatchTopK, Matryoshka, MultiTopK, MatchingPursuit)}
)


@dataclass(frozen=True)
class TrainingFlags:
    """Model, text, data, training and run folder; experiments add what they vary, and say where they write (`out`)."""

    dictionary: Trainable  # type: ignore[valid-type]
    """Architecture; `... KIND --help` shows its flags, formulas are in its module's docstring."""
    model: str = "novel-neox"
    """Embedded name (novel-neox), folder in Hugging Face's layout, or hub id (EleutherAI/pythia-70m)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    text: str = "embedded"
    """What to train on: embedded, austen, state-of-the-union, a .txt(.gz) or .jsonl(.gz) file, or hub:owner/dataset."""
    eval_text: str | None = None
    """What to evaluate on; by default whole documents of --text that are held out and never trained on."""
    holdout: float = 0.05
    """Share of documents held out, where --text is not embedded and there is no --eval-text."""
    text_field: str = "text"
    """Field that holds the text in .jsonl files and hub datasets."""
    tokens: int = 2_200_000
    """Tokens to train on; more than the text holds means several epochs (said)."""
    eval_tokens: int = 212_992
    """Held-out tokens to evaluate on, at most; a feature is called dead on these."""
    context: int = 256
    """Tokens in a row of text."""
    skip_positions: int = 1
    """Positions at the start of each row that are masked: attention sinks stand there."""
    drop_outliers: bool = False
    """Mask tokens whose activation norm exceeds 10 times the median (they are counted either way)."""
    bos: Literal["auto", "none", "row"] = "auto"
    """Whether each row begins with the begin-of-text token; auto: as the model's family was trained (GPT-NeoX, GPT-2
    and Qwen: none; Llama and Mistral: row)."""
    batch: int = 1024
    """Tokens in a training step."""
    schedule: Schedule = field(default_factory=Schedule)
    """Warm-ups and decay, as shares of the run."""
    resample_at: tuple[float, ...] = ()
    """Shares of the run at which features that were silent for the dead window start again (Bricken et al. 2023:
    0.125 0.25 0.375 0.5)."""
    normalise: Rule = "centre-scale"
    """What is done to activations before the dictionary: scale means E||x||^2 = d."""
    decoder_bias_start: BiasStart = "zero"
    """Where the decoder bias is before the first step, in normalised units: the mean or the geometric median (Bricken
    et al. 2023) of the first training tokens, 16,384 at most. Behind centre-scale the mean is 0 already, but for what
    the sample leaves; the median need not be."""
    statistics_tokens: int = 524_288
    """Training tokens from which the normaliser and the floors are fitted, at most."""
    dead_window: int = 500_000
    """A feature silent for more training tokens counts as dead in the curves; at most a quarter of the run."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Inputs of matrix products in model and training; auto: bfloat16 where matrix units take it (TPU, GPU, CPUs with
    AMX). Sums, parameters and the final measures are float32 always."""
    block_rows: int = 256
    """Rows of text that are harvested and shuffled together."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint; the flags must be the same."""
    overwrite: bool = False
    """Remove the run in --out first."""
    reuse_memory: bool = True
    """Keep freed memory in the process (glibc): faster on CPU, but the peak is never given back."""
    debug: bool = False
    """Show tracebacks of errors in the input."""
