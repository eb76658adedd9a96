"""What a store's rounding costs: error per token, and FVU and CE increase of a dictionary trained on what is read back.

    python -m benchmarks.store_rounding

The stream of `benchmarks.quality` (made first where it is not there: `make bench-quality` does) is written and read as
a store in float32, bfloat16 and int8 would be; a TopK dictionary (k 32, 8 features per dimension, `train_sae`'s
defaults) learns from each, and is measured on Austen with the model's own activations, in float32. Seeds stand for what
chance does.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import quality_ours
from benchmarks.quality_measure import figures, held_out
from benchmarks.quality_stream import CONTEXT, open_stream
from benchmarks.quality_trial import BATCH, Trial
from experiments import command
from sparse_jax.activations import Entry
from sparse_jax.activations.row_encoding import decode, encode
from sparse_jax.lm import Site
from sparse_jax.numerics.allocator import keep_freed_memory

DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Flags:
    """What a store's rounding costs."""

    tokens: int = 1_000_448
    """Tokens to train on, whole batches of 1,024."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the dictionaries."""
    stream: Path = Path("runs/quality/stream")
    """Of `benchmarks.quality`."""
    text: str = "../shared/text/novels.txt.gz"
    """What the stream is made of."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> None:
    """Print the table."""
    keep_freed_memory()
    source = {"model": "novel-neox", "site": "resid_post.3", "text": flags.text, "eval_text": "austen"}
    stream = open_stream(flags.stream, **source, tokens=3_000_320)
    held = held_out(
        source["model"], source["site"], flags.text, source["eval_text"], 300_000, CONTEXT, flags.stream / "held.npz"
    )
    mean, x = stream.statistics.mean, np.array(stream.x[:65536])
    spread = np.sum((x - mean) ** 2, axis=1)
    print(
        f"{'stored as':10}{'bytes/token':>12}{'error, median':>15}{'99 %':>10}{'seed':>6}{'FVU':>9}{'CE increase':>13}"
    )
    for dtype in DTYPES:
        entry = Entry(Site.parse(source["site"]), stream.width, dtype)
        stored = jax.jit(lambda x, entry=entry: decode(entry, encode(entry, x)[0]))
        error = np.sum((np.asarray(stored(jnp.array(x))) - x) ** 2, axis=1) / spread
        found = []
        for seed in flags.seeds:
            batch_of = stream.batch_of(seed)
            trained = quality_ours.train(
                Trial("sparse_jax", "topk", 3e-3, 32, flags.tokens // BATCH, seed),
                lambda step, batch_of=batch_of, stored=stored: np.asarray(stored(jnp.array(batch_of(step)))),
                stream.statistics,
                8 * stream.width,
            )
            found.append(figures(held, trained.trained, mean))
            print(
                f"{dtype:10}{entry.bytes_per_token:12,}{np.median(error):15.1e}{np.quantile(error, 0.99):10.1e}{seed:6}"
                f"{found[-1]['fvu']:9.4f}{found[-1]['ce_increase']:13.4f}",
                flush=True,
            )
        print(f"{dtype:10}{'mean of seeds':>43}{statistics.mean(each['fvu'] for each in found):9.4f}"
              f"{statistics.mean(each['ce_increase'] for each in found):13.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    command.main(Flags, main)
