"""The stored activations that every trainer of `benchmarks.quality` learns from: made once, the same bytes for all.

    stream.npy        [tokens, d] float32, raw activations of distinct tokens, shuffled within blocks of 256 random rows
    validation.npy    [tokens, d] float32, of rows that are not in the stream: trainers are chosen by these
    statistics.npz    of the blocks that the stream is cut from: means, covariance, means per token (for the floors)
    card.json         where they come from

Position 0 of every row is left out, as everywhere in the project (attention sinks).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality_trial import BATCH
from experiments.data import weights_sha256
from sparse_jax.activations import Blocks, RememberedBlocks, Statistics, collect_statistics
from sparse_jax.errors import InputError
from sparse_jax.lm import check_site, load, load_tokenizer, resolve
from sparse_jax.lm.documents import fingerprint
from sparse_jax.lm.holdout import split
from sparse_jax.lm.packing import pack

CONTEXT = 256
# Blocks of 65,536 tokens behind those of the stream, for validation.
VALIDATION_BLOCKS = 2


@dataclass(frozen=True)
class Stream:
    """What is stored.

    Attributes:
        x: `[tokens, d]` float32, mapped from disk.
        validation: `[tokens, d]` float32.
        statistics: of x.
        card: where it comes from.
    """

    x: np.ndarray
    validation: np.ndarray
    statistics: Statistics
    card: dict

    @property
    def width(self) -> int:
        return self.x.shape[1]

    @property
    def batches(self) -> int:
        """How many whole batches there are."""
        return len(self.x) // BATCH

    def batch_of(self, seed: int):
        """step -> `[BATCH, d]` float32; the seed decides the order of the batches."""
        order = np.random.default_rng(seed).permutation(self.batches)

        def batch(step: int) -> np.ndarray:
            start = int(order[step]) * BATCH
            return np.array(self.x[start : start + BATCH])

        return batch


def open_stream(folder: Path, *, model: str, site: str, text: str, eval_text: str, tokens: int) -> Stream:
    """The stored stream, made first where it is not there; no document of `eval_text` may be in `text`.

    Raises:
        InputError: the folder holds another one; the text has too few tokens.
    """
    card = {
        "model": model,
        "weights_sha256": weights_sha256(model, None),
        "site": site,
        "text": Path(text).name,
        "text_fingerprint": fingerprint(text),
        "tokens": tokens,
        "context": CONTEXT,
    }
    if not (folder / "card.json").exists():
        _make(folder, card, text, eval_text)
    found = json.loads((folder / "card.json").read_text())
    if found != card:
        raise InputError(f"{folder} holds the stream {found}, not {card}: give another --stream, or remove it")
    return Stream(
        np.load(folder / "stream.npy", mmap_mode="r"),
        np.load(folder / "validation.npy"),
        Statistics.load(folder / "statistics.npz"),
        found,
    )


def _make(folder: Path, card: dict, text: str, eval_text: str) -> None:
    from tqdm import tqdm

    lm, tokenizer = load(card["model"], dtype="float32"), load_tokenizer(resolve(card["model"]))
    site = check_site(lm.config, card["site"])
    train, _ = split(text, eval_text, tokenizer=tokenizer, context=CONTEXT)
    rows = pack(train, tokenizer, CONTEXT)
    # Remembered: the statistics are a second pass over the same blocks.
    blocks = RememberedBlocks(Blocks(lm, rows, site, seed=0), lm.config.d_model, limit_bytes=8 << 30)
    block_rows = blocks.blocks.block_rows
    needed = -(-card["tokens"] // (block_rows * (CONTEXT - 1))) + 1
    if (needed + VALIDATION_BLOCKS) * block_rows > len(rows):
        raise InputError(f"{text} has {rows.n_tokens:,} tokens: too few for {card['tokens']:,} distinct ones")
    folder.mkdir(parents=True, exist_ok=True)
    first = counted(blocks, 0)
    stream = np.lib.format.open_memmap(
        folder / "stream.npy", mode="w+", dtype=np.float32, shape=(card["tokens"], first.shape[1])
    )
    filled = 0
    for index in tqdm(range(needed), desc="storing activations", unit="block"):
        x = counted(blocks, index)[: card["tokens"] - filled]
        stream[filled : filled + len(x)] = x
        filled += len(x)
    if filled < card["tokens"]:
        raise InputError(f"only {filled:,} tokens of {needed} blocks count; {card['tokens']:,} are asked for")
    stream.flush()
    np.save(
        folder / "validation.npy",
        np.concatenate([counted(blocks, needed + index) for index in range(VALIDATION_BLOCKS)]),
    )
    collect_statistics(blocks, needed).save(folder / "statistics.npz")
    # The card comes last: without it the rest counts as not there.
    temporary = folder / "card.tmp"
    temporary.write_text(json.dumps(card, indent=1))
    os.replace(temporary, folder / "card.json")


def counted(blocks: Blocks | RememberedBlocks, index: int) -> np.ndarray:
    """`[tokens, d]` activations of a block that the mask lets count."""
    block = blocks[index]
    return np.asarray(block.x)[np.asarray(block.weight) > 0]
