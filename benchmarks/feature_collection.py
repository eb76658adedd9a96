"""What collecting costs beyond the extraction of activations, and how long 5 million tokens would take.

    python -m benchmarks.feature_collection                    the embedded model, 2,048 random features at L0 32
    python -m benchmarks.feature_collection --dictionary RUN   a trained dictionary

Three passes over the same held-out rows, compiled and warm, take turns batch after batch, so that whatever else the
machine does falls on all alike: activations alone; with their codes, which come back as lists of firings; and what is
collected of these. No dictionary is read without its encoder, so the second is the floor of the third. A fourth pass is
`collect` itself, which hides part of its work behind the next batch's extraction. Core seconds are the work of all
cores together: they depend less on what else the machine does than seconds by the clock.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command
from experiments.reading import open_data, open_subject
from sparse_jax.activations import activations
from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries import Normalised, TopK
from sparse_jax.features.collect import COACTIVE_TOKENS, TOKEN_ENTRIES, _Totals, activation_edges, collect, memory
from sparse_jax.features.firings import firings, rows_at_once
from sparse_jax.numerics.allocator import keep_freed_memory

PROJECTED = 5_000_000


@dataclass(frozen=True)
class Flags:
    """What collecting costs beyond the extraction of activations."""

    dictionary: Path | None = None
    """Run folder of a trained dictionary; by default random features of the embedded model, top-k."""
    n_features: int = 2048
    """Of the random dictionary."""
    l0: int = 32
    """Of the random dictionary."""
    tokens: int = 200_000
    """Tokens of text."""
    top: int = 20
    """Strongest places of each feature."""
    sample: int = 256
    """Drawn places of each feature."""
    bins: int = 10
    """Bins of activation."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def subject(flags: Flags):
    """(coder, data, row numbers)."""
    if flags.dictionary is not None:
        opened = open_subject(flags.dictionary, eval_tokens=flags.tokens)
        return opened.coder, opened.data, opened.numbers
    data = open_data(Path("random"), {}, {"model": "novel-neox", "site": "resid_post.3"}, eval_tokens=flags.tokens,
                     tokens=flags.tokens)  # fmt: skip
    d = data.width
    dictionary = TopK(n_features=flags.n_features, d_in=d, d_out=d, k=flags.l0, compute_dtype="float32")
    x = activations(data.lm, jnp.array(data.evaluation[np.arange(8)].tokens), data.site).reshape(-1, d)
    normaliser = Normaliser(jnp.mean(x, axis=0), jnp.std(x))
    rows = np.arange(min(len(data.evaluation), flags.tokens // data.evaluation.context))
    return Normalised(dictionary, dictionary.init(jax.random.key(0)), normaliser), data, rows


def timed(step, times: list[np.ndarray]):
    """What `step()` gives; its seconds, by the clock and of all cores, go to the list."""
    started = np.array([time.perf_counter(), time.process_time()])
    made = step()
    times.append(np.array([time.perf_counter(), time.process_time()]) - started)
    return made


def main(flags: Flags) -> None:
    """Time the passes, print a table."""
    keep_freed_memory()
    coder, data, numbers = subject(flags)
    text, n, vocab = data.evaluation, coder.dictionary.n_features, data.lm.config.vocab_size
    batch = rows_at_once(None, text.context, n)
    numbers = numbers[: len(numbers) // batch * batch]
    edges = activation_edges(data.lm, data.site, text, numbers, coder, flags.bins)
    kept = {
        "top": flags.top,
        "sample": flags.sample,
        "coactive_tokens": COACTIVE_TOKENS,
        "token_entries": TOKEN_ENTRIES,
    }
    totals = _Totals(edges, vocab, np.zeros(vocab, bool), kept, 0)
    seconds: dict[str, list[np.ndarray]] = {"extraction": [], "firings": [], "collecting": []}
    extract = lambda rows: activations(data.lm, jnp.array(text[rows].tokens), data.site).block_until_ready()  # noqa: E731
    extract(numbers[:batch])
    fired = 0
    for rows in numbers.reshape(-1, batch):
        timed(lambda rows=rows: extract(rows), seconds["extraction"])
        (found,) = timed(lambda rows=rows: list(firings(data.lm, data.site, text, rows, coder)), seconds["firings"])
        timed(lambda found=found: totals.add(found), seconds["collecting"])
        fired += len(found.features)
    ending: list[np.ndarray] = []
    timed(lambda: totals.result(numbers), ending)
    whole: list[np.ndarray] = []
    timed(
        lambda: collect(data.lm, data.site, text, numbers, coder, edges=edges, top=flags.top, sample=flags.sample),
        whole,
    )
    report(flags, seconds, ending[0], whole[0], numbers.size * text.context, fired, n)
    parts = memory(n, vocab, PROJECTED, l0=fired / numbers.size / text.context, batch_tokens=batch * text.context,
                   bins=flags.bins, **kept)  # fmt: skip
    print(f"memory for {PROJECTED:,} tokens, at most: {sum(parts.values()) / 1e9:.2f} GB")
    for name, size in parts.items():
        print(f"{name:>24} {size / 1e9:8.3f} GB")


def report(flags: Flags, seconds: dict, ending: np.ndarray, whole: np.ndarray, tokens: int, fired: int, n: int) -> None:
    """Print the table."""
    extraction, codes, collecting = (sum(each) for each in seconds.values())
    # What is kept fills up at first; later batches have little that is new.
    half = len(seconds["collecting"]) // 2
    late = sum(seconds["collecting"][half:]) / max(1, len(seconds["collecting"]) - half) * len(seconds["collecting"])
    print(f"{tokens:,} tokens x {n:,} features, {fired / tokens:.1f} firings a token")
    print(
        f"{'':>28} {'seconds':>9} {'tokens/s':>10} {'for ' + format(PROJECTED, ','):>14} {'of extraction':>14} "
        f"{'core seconds':>14}"
    )
    rows = {
        "extraction": extraction,
        "+ encoder, firings": codes,
        "  collecting alone": collecting + ending,
        "  its later half, doubled": late,
        "collect (overlapping)": whole,
        "beyond extraction": whole - extraction,
    }
    for name, (value, cores) in rows.items():
        speed = tokens / value if value > 0 else np.nan
        print(
            f"{name:>28} {value:9.2f} {speed:10,.0f} {value * PROJECTED / tokens:12,.0f} s "
            f"{value / extraction[0]:14.2f} {cores * PROJECTED / tokens:12,.0f} s"
        )


if __name__ == "__main__":
    command.main(Flags, main)
