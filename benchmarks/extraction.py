"""Extracting activations at one layer: ours against transformers cut off at that layer, and TransformerLens.

    make bench-extraction                              both shapes, contexts 128, 256 and 1,024
    python -m benchmarks.extraction --shapes pythia-70m --contexts 256 --dtypes float32

Models have random weights in the shapes of Pythia-70m and GPT-2 small. All contenders get the same tokens and the same
weights, and give the residual stream after the fourth of six (the sixth of twelve) blocks. They take turns, `--repeats`
times; the table has the median of tokens a second, the ratio to ours of the same dtype, and the largest error of the
output against transformers in float32, relative to the output's root mean square.

transformers: the base model without the layers above and without the final norm, `inference_mode`, its default
attention; bfloat16 is `torch.autocast`. TransformerLens: `run_with_cache(stop_at_layer=..., names_filter=...)`.
`attention` is the share of our time that attention takes by itself (scores, softmax and mixing of all layers).

The last lines: what writing a store, and reading it, cost beside extraction alone. Needs the peers' environment.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax import lax

from experiments import command
from sparse_jax.activations import Entry, Manifest, StoredBlocks, activations, open_store
from sparse_jax.activations.blocks import CHUNK_ROWS
from sparse_jax.activations.harvest import harvest
from sparse_jax.errors import InputError
from sparse_jax.lm import LanguageModel, Site, load
from sparse_jax.lm.attention import causal_attention
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.tap import Tap
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.numerics.precision import fast_dtype

SHAPES = ("pythia-70m", "gpt2-small")


@dataclass(frozen=True)
class Flags:
    """Extracting activations at one layer, library against library."""

    shapes: tuple[Literal["pythia-70m", "gpt2-small"], ...] = SHAPES
    """Shapes of models."""
    contexts: tuple[int, ...] = (128, 256, 1024)
    """Tokens in a row."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Compute dtypes; by default float32, and bfloat16 where the machine has units for it (elsewhere all are slow)."""
    peers: tuple[Literal["transformers", "TransformerLens"], ...] = ("transformers", "TransformerLens")
    """Against whom."""
    tokens: int = 16384
    """Tokens in a call."""
    repeats: int = 5
    """How often the contenders take turns."""
    store: bool = True
    """Measure writing and reading a store too."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


@dataclass(frozen=True)
class Shape:
    """A model of one shape in all libraries.

    Attributes:
        model: transformers', with its head.
        stop: how many blocks are run.
        ours: dtype -> ours.
        lens: TransformerLens'.
    """

    model: torch.nn.Module
    stop: int
    ours: dict[str, LanguageModel]
    lens: torch.nn.Module

    @property
    def site(self) -> Site:
        return Site("resid_post", self.stop - 1)


def make_shape(name: str, dtypes: tuple[str, ...]) -> Shape:
    """Random weights in a shape, handed to all libraries."""
    torch.manual_seed(0)
    if name == "pythia-70m":
        config = transformers.GPTNeoXConfig(
            hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=50304,
            max_position_embeddings=2048, rotary_pct=0.25, use_parallel_residual=True, tie_word_embeddings=False,
        )  # fmt: skip
        model, stop = transformers.GPTNeoXForCausalLM(config), 4
    else:
        model, stop = transformers.GPT2LMHeadModel(transformers.GPT2Config()), 6
    model = model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = {dtype: load(folder, dtype=dtype) for dtype in dtypes}
    return Shape(model, stop, ours, lens_of(model))


def lens_of(model: torch.nn.Module) -> torch.nn.Module:
    """TransformerLens' model with the weights of transformers'."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_neox_weights

    config = model.config
    neox = config.model_type == "gpt_neox"
    options = (
        {"d_mlp": config.intermediate_size, "positional_embedding_type": "rotary", "rotary_adjacent_pairs": False,
         "rotary_dim": config.hidden_size // config.num_attention_heads // 4, "parallel_attn_mlp": True,
         "eps": config.layer_norm_eps, "act_fn": "gelu"}
        if neox
        else {"d_mlp": 4 * config.n_embd, "positional_embedding_type": "standard", "eps": config.layer_norm_epsilon,
              "act_fn": "gelu_new"}
    )  # fmt: skip
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers, d_model=config.hidden_size, n_heads=config.num_attention_heads,
        d_head=config.hidden_size // config.num_attention_heads, n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size, normalization_type="LN", default_prepend_bos=False, init_weights=False, device="cpu",
        original_architecture=type(model).__name__, **options,
    )  # fmt: skip
    made = HookedTransformer(cfg)
    made.load_and_process_state_dict(
        (convert_neox_weights if neox else convert_gpt2_weights)(model, cfg),
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    return made.eval()


def truncated(shape: Shape) -> torch.nn.Module:
    """transformers' base model that ends with the last block that is wanted."""
    base = shape.model.base_model
    if shape.model.config.model_type == "gpt_neox":
        base.layers, base.final_layer_norm = base.layers[: shape.stop], torch.nn.Identity()
    else:
        base.h, base.ln_f = base.h[: shape.stop], torch.nn.Identity()
    base.config.num_hidden_layers = shape.stop
    return base


def contenders(shape: Shape, tokens: np.ndarray, dtypes: tuple[str, ...]) -> dict[tuple[str, str], Callable]:
    """(library, dtype) -> a call that gives `[rows, context, d]` float32 as NumPy."""
    ids, base, lens, site = torch.tensor(tokens, dtype=torch.long), truncated(shape), shape.lens, shape.site
    name = f"blocks.{site.layer}.hook_resid_post"

    def ours(dtype):
        lm, given = shape.ours[dtype], jnp.array(tokens)
        return lambda: np.asarray(activations(lm, given, site))

    def theirs(call):
        def run():
            with torch.inference_mode():
                return call().float().numpy()

        return run

    def with_autocast(call):
        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call()

        return run

    def plain():
        return base(ids, use_cache=False).last_hidden_state

    def cached():
        return lens.run_with_cache(ids, stop_at_layer=shape.stop, names_filter=name)[1][name]

    found = {}
    for dtype in dtypes:
        wrapped = with_autocast if dtype == "bfloat16" else (lambda call: call)
        found |= {
            ("sparse_jax", dtype): ours(dtype),
            ("transformers", dtype): theirs(wrapped(plain)),
            ("TransformerLens", dtype): theirs(wrapped(cached)),
        }
    return found


def attention_seconds(shape: Shape, dtype: str, rows: int, context: int, repeats: int) -> float:
    """Seconds that attention of all layers takes by itself on tokens of this shape."""
    config = shape.ours[dtype].config
    size = (rows // CHUNK_ROWS, CHUNK_ROWS, context, config.n_heads, config.head_dim)
    q, k, v = (jax.random.normal(jax.random.key(i), size, dtype) for i in range(3))

    @jax.jit
    def attend(q, k, v):
        def chunk(qkv):
            q, k, v = qkv
            for _ in range(shape.stop):
                q = causal_attention(q, k, v, config.head_dim**-0.5, Tap(lambda name, value: value, frozenset()))
            return q

        return lax.map(chunk, (q, k, v))

    return statistics.median(timed(lambda: attend(q, k, v).block_until_ready(), repeats + 1)[1:])


def timed(call: Callable, repeats: int) -> list[float]:
    """Seconds of each of some calls."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found


def compare(flags: Flags, name: str, shape: Shape, context: int) -> None:
    """Print the table of one shape and context."""
    rows = flags.tokens // context
    tokens = np.random.default_rng(0).integers(0, 50257, (rows, context)).astype(np.int32)
    dtypes = tuple(dict.fromkeys(("float32", *flags.dtypes)))
    calls = contenders(shape, tokens, dtypes)
    due = calls["transformers", "float32"]()
    rms = float(np.sqrt(np.mean(due**2)))
    asked = ("sparse_jax", *flags.peers)
    calls = {key: call for key, call in calls.items() if key[0] in asked and key[1] in flags.dtypes}
    errors = {key: float(np.abs(call() - due).max()) / rms for key, call in calls.items()}  # and compiles
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(flags.repeats):
        for key, call in calls.items():
            seconds[key] += timed(call, 1)
    medians = {key: statistics.median(each) for key, each in seconds.items()}
    print(f"\n{name}, context {context}, {rows} rows, residual stream after block {shape.stop}")
    print(f"{'':18}{'dtype':10}{'tokens/s':>10}{'ours is':>9}{'error':>10}{'attention':>11}")
    for (library, dtype), median in medians.items():
        ratio = f"{median / medians['sparse_jax', dtype]:.2f} x" if library != "sparse_jax" else ""
        share = ""
        if library == "sparse_jax":
            share = f"{100 * attention_seconds(shape, dtype, rows, context, flags.repeats) / median:.0f} %"
        print(
            f"{library:18}{dtype:10}{tokens.size / median:10,.0f}{ratio:>9}{errors[library, dtype]:10.1e}{share:>11}",
            flush=True,
        )


def store_costs(flags: Flags, name: str, shape: Shape, context: int) -> None:
    """Print tokens a second of extraction alone, of writing a store, and of reading one."""
    n_rows = 4 * flags.tokens // context
    stream = np.random.default_rng(0).integers(0, 50257, n_rows * context + 1).astype(np.uint16)
    rows = Rows(stream, np.zeros(1, np.int64), ("random",), context, 1, (), None, 0, 0)
    dtype = flags.dtypes[0]
    lm, site = shape.ours[dtype], shape.site
    entry = Entry(site, lm.config.d_model)
    manifest = Manifest({}, (entry,), context, 0, lm.config.vocab_size, n_rows // 4, n_rows, None)
    tokens = jnp.array(rows[:].tokens).reshape(-1, 32, context)

    def extract():
        for batch in tokens:
            np.asarray(activations(lm, batch, site))

    found: dict[str, list[float]] = {"extracting": [], "writing a store": [], "reading it": []}
    with tempfile.TemporaryDirectory() as folder:
        extract()
        for number in range(flags.repeats):
            path = Path(folder, str(number))
            found["extracting"] += timed(extract, 1)
            found["writing a store"] += timed(lambda path=path: harvest(lm, rows, path, manifest), 1)
            blocks = StoredBlocks(open_store(path), (site,), seed=0, block_rows=n_rows // 4)
            if not number:
                blocks[0]  # compiles
            found["reading it"] += timed(lambda blocks=blocks: [blocks[i].x for i in range(4)], 1)
    print(f"\n{name}, context {context}, {dtype}, {n_rows * context:,} tokens of {4 * lm.config.d_model:,} bytes")
    base = statistics.median(found["extracting"])
    for what, seconds in found.items():
        median = statistics.median(seconds)
        print(f"{what:18}{n_rows * context / median:10,.0f} tokens/s, {median / base:.2f} of the time of extracting")


def main(flags: Flags) -> None:
    """Run all comparisons."""
    for context in flags.contexts:
        if flags.tokens % (context * CHUNK_ROWS):
            raise InputError(f"--tokens {flags.tokens}: give a multiple of {CHUNK_ROWS} rows of {context}")
    keep_freed_memory()
    if not flags.dtypes:
        flags = replace(flags, dtypes=tuple(dict.fromkeys(("float32", fast_dtype()))))
    for name in flags.shapes:
        shape = make_shape(name, tuple(dict.fromkeys(("float32", *flags.dtypes))))
        for context in flags.contexts:
            compare(flags, name, shape, context)
        if flags.store:
            store_costs(flags, name, shape, 256)


if __name__ == "__main__":
    command.main(Flags, main)
