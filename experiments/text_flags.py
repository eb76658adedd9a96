"""The flags that say which model reads which text in which rows: every experiment that makes activations has them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TextFlags:
    """Model, text and rows."""

    model: str = "novel-neox"
    """Embedded name (novel-neox), folder in Hugging Face's layout, or hub id (EleutherAI/pythia-70m)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    text: str = "embedded"
    """What to train on: embedded, austen, state-of-the-union, a .txt(.gz) or .jsonl(.gz) file, hub:owner/dataset, or
    truthfulqa-six-shot (prompts). A list of prompts is a .jsonl file with --packing documents."""
    eval_text: str | None = None
    """What to evaluate on; by default whole documents of --text that are held out and never trained on."""
    holdout: float = 0.05
    """Share of documents held out, where --text is not embedded and there is no --eval-text."""
    text_field: str = "text"
    """Field that holds the text in .jsonl files and hub datasets."""
    context: int = 256
    """Tokens in a row of text."""
    stride: int | None = None
    """Tokens from the beginning of a row to that of the next; by default rows do not overlap. Where they do, a token
    counts in the first row that holds it: every token once, with at least context - stride tokens before it."""
    packing: Literal["auto", "joined", "documents"] = "auto"
    """joined: documents one after the other, rows cut across them, as models are trained; documents: each document (or
    prompt) in rows of its own, the last filled up with padding that does not count; auto: documents for prompts."""
    skip_positions: int = 1
    """Positions at the start of each row that are masked: attention sinks stand there."""
    bos: Literal["auto", "none", "row"] = "auto"
    """Whether each row begins with the begin-of-text token; auto: as the model's family was trained (GPT-NeoX, GPT-2
    and Qwen: none; Llama and Mistral: row)."""
    window_rows: int | None = None
    """Read the text as it goes, so many rows at a time, each window read while the one before is used; the order is
    then random within windows only. By default a hub dataset is read in windows of 4,096 rows, other texts whole."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Inputs of matrix products in model and training; auto: bfloat16 where matrix units take it (TPU, GPU, CPUs with
    AMX). Sums, parameters and the final measures are float32 always."""


@dataclass(frozen=True, kw_only=True)
class StoredTextFlags(TextFlags):
    """The same, or a store that was made of them."""

    store: Path | None = None
    """Read activations from this folder of `experiments.harvest`, in place of running the model: it says what --model,
    --text and all that makes rows are. The same seed gives the same tokens in the same order."""
    unfinished_store: bool = False
    """Use the whole shards at the start of a store whose harvest has not ended."""
