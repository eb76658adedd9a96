"""What `experiments.perplexity` does with its flags, from top to bottom."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run_folder
from experiments.data import check_fits, resolve_bos, weights_sha256
from experiments.perplexity import Flags
from experiments.replacement import Replacement, load_replacement, read_provenance
from experiments.stored import with_store
from sparse_jax.errors import InputError
from sparse_jax.lm import LanguageModel, load, load_tokenizer, resolve, truthfulqa
from sparse_jax.lm.documents import documents, fingerprint
from sparse_jax.lm.embedded import TRAINED_CONTEXT
from sparse_jax.lm.packing import pack
from sparse_jax.lm.rows import RowBatch, Rows
from sparse_jax.lm.tokenizer import Tokenizer
from sparse_jax.metrics.reconstruction import fvu
from sparse_jax.metrics.sparsity import l0
from sparse_jax.metrics.text_loss import loss_figures, row_nats, standard_error
from sparse_jax.numerics.precision import fast_dtype

# The longest default row: what the logits of a large vocabulary allow on a small machine.
LONGEST_CONTEXT = 1024


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sums of a whole text, on the host.

    Attributes:
        predictions: `[rows]` int64, how many predictions each row counts.
        n_bytes: UTF-8 bytes of all targets that count.
        nats, kl: "clean" (and "dictionary", "zero", "mean") -> `[rows]` float64 sums.
        figures: with a dictionary its fvu, l0 and replaced_tokens, else empty.
    """

    predictions: np.ndarray
    n_bytes: int
    nats: dict[str, np.ndarray]
    kl: dict[str, np.ndarray]
    figures: dict[str, float]


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    flags = of_store(flags)
    check_numbers(flags)
    run_folder.check_apart(flags.out, flags.dictionary)
    run_folder.prepare(flags.out, overwrite=flags.overwrite)
    provenance = None if flags.dictionary is None else read_provenance(flags.dictionary)
    flags, lm, tokenizer = load_model(flags)
    sha256 = weights_sha256(flags.model, flags.revision)
    replacement = None
    if provenance is not None:
        replacement = load_replacement(flags.dictionary, provenance, lm.config, sha256, flags.allow_other_model)
    rows = pack(
        documents(flags.text, split=flags.split, text_field=flags.text_field), tokenizer, flags.context,
        limit=flags.tokens, bos=flags.bos, skip_positions=1 if replacement is None else replacement.skip_positions,
    )  # fmt: skip
    identity = {
        "model": flags.model,
        "revision": flags.revision,
        "weights_sha256": sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "text": flags.text,
        "text_fingerprint": fingerprint(flags.text),
        "context": flags.context,
        "bos": flags.bos,
    }
    if flags.overwrite:
        run_folder.clear(flags.out)
    write_config(flags, identity, replacement)
    print(f"model {flags.model}: {lm.config.n_layers} layers, d_model {lm.config.d_model}, {flags.compute_dtype}")
    print(
        f"text {flags.text}: {rows.n_rows:,} rows of {flags.context} tokens, {len(rows.documents):,} "
        f"document{'s' * (len(rows.documents) != 1)}, bos {flags.bos}",
        flush=True,
    )
    measured = measure(lm, tokenizer, rows, replacement, flags)
    final = {**identity, **final_figures(measured, rows, replacement), "seconds": time.perf_counter() - started}
    run_folder.write_json(flags.out / "metrics.json", final)
    print_table(final)
    print(f"figures: {flags.out / 'metrics.json'}")
    return 0


def of_store(flags: Flags) -> Flags:
    """The flags with the store's model and text, where one is given; the mask of its rows is not taken over."""
    skip_positions = flags.skip_positions
    flags, store = with_store(flags)
    if store is not None and flags.text == truthfulqa.NAME:
        raise InputError(f"the store in {flags.store} is of prompts ({flags.text}), which are no text to predict")
    return dataclasses.replace(flags, skip_positions=skip_positions)


def check_numbers(flags: Flags) -> None:
    """Raises InputError for numbers that no run can use, before anything is loaded."""
    for name in ("tokens", "context", "batch_rows"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: give a positive number")
    if flags.skip_positions < 0:
        raise InputError(f"--skip-positions {flags.skip_positions}: give 0 or more")
    if flags.tokens is None and flags.text.startswith("hub:"):
        raise InputError(f"--text {flags.text}: a dataset of the hub may have no end; say how much with --tokens")


def load_model(flags: Flags) -> tuple[Flags, LanguageModel, Tokenizer]:
    """The model, its tokenizer, and the flags with all that was left to be chosen filled in.

    Raises:
        InputError: no such model; a context or skip_positions that does not fit.
    """
    flags = resolve_bos(flags)
    if flags.compute_dtype == "auto":
        flags = dataclasses.replace(flags, compute_dtype=fast_dtype())
    tokenizer = load_tokenizer(resolve(flags.model, flags.revision))
    lm = load(flags.model, flags.revision, dtype=flags.compute_dtype)
    if flags.context is None:
        usable = TRAINED_CONTEXT.get(flags.model, lm.config.max_positions)
        flags = dataclasses.replace(flags, context=min(usable, LONGEST_CONTEXT))
    check_fits(lm, tokenizer, flags)
    width = flags.context - (flags.bos == "row")
    if flags.skip_positions >= width:
        raise InputError(
            f"--skip-positions {flags.skip_positions} leaves none of the {width} predictions of a row; "
            f"give at most {width - 1}"
        )
    return flags, lm, tokenizer


def write_config(flags: Flags, identity: dict, replacement: Replacement | None) -> None:
    """`config.json`: every flag, what they resolved to, versions and device."""
    resolved = identity if replacement is None else {**identity, "replaced": replacement.facts()}
    flags.out.mkdir(parents=True, exist_ok=True)
    content = {"flags": run_folder.jsonable(flags), "resolved": resolved, "environment": run_folder.environment()}
    run_folder.write_json(flags.out / "config.json", content)


def counted_predictions(rows: Rows, batch: RowBatch, skip_positions: int) -> np.ndarray:
    """`[rows, position]` the predictions that count: each target of the text once (see `experiments.perplexity`)."""
    position = np.arange(rows.context)
    # Behind a begin-of-text token a row predicts its own tokens; the next row's first is not its own.
    own = position < rows.width
    return (batch.targets >= 0) & (position >= skip_positions) & own


def batches(rows: Rows, size: int) -> Iterator[RowBatch]:
    """All rows in batches of one shape, empty rows filling up the last."""
    for start in range(0, len(rows), size):
        index = np.arange(start, start + size)
        yield rows[np.where(index < len(rows), index, -1)]


def measure(
    lm: LanguageModel, tokenizer: Tokenizer, rows: Rows, replacement: Replacement | None, flags: Flags
) -> Measured:
    """One pass over the text. Each row's sum is float32; sums over rows are float64 on the host.

    Raises:
        InputError: a loss is not finite.
    """
    from tqdm import tqdm

    size, lengths = min(flags.batch_rows, len(rows)), tokenizer.byte_lengths().astype(np.int64)
    predictions, n_bytes, nats, kl, others = [], 0, defaultdict(list), defaultdict(list), None
    with tqdm(total=rows.n_tokens, desc="predicting", unit="tok", unit_scale=True, mininterval=0.5) as bar:
        for number, batch in enumerate(batches(rows, size)):
            counted = counted_predictions(rows, batch, flags.skip_positions)
            inputs = jnp.array(batch.tokens), jnp.array(batch.targets), jnp.array(counted)
            if replacement is None:
                nats["clean"].append(np.asarray(row_nats(lm, *inputs), np.float64))
            else:
                sums = replacement.sums(lm, *inputs, jnp.array(batch.mask))
                for name, losses in sums.losses.items():
                    nats[name].append(np.asarray(losses.ce, np.float64))
                    kl[name].append(np.asarray(losses.kl, np.float64))
                more = jax.tree.map(lambda value: np.asarray(value, np.float64), (sums.reconstruction, sums.sparsity))
                others = more if others is None else jax.tree.map(np.add, others, more)
            if wrong := [name for name, found in nats.items() if not np.isfinite(found[-1]).all()]:
                raise InputError(f"the loss ({', '.join(wrong)}) is not finite in batch {number} of {size} rows")
            predictions.append(counted.sum(1))
            n_bytes += int(lengths[batch.targets[counted]].sum())
            bar.update(int((batch.targets[:, 0] >= 0).sum()) * rows.context)
    real = slice(len(rows))
    return Measured(
        np.concatenate(predictions)[real],
        n_bytes,
        {name: np.concatenate(found)[real] for name, found in nats.items()},
        {name: np.concatenate(found)[real] for name, found in kl.items()},
        {} if others is None else _reconstruction_figures(*others),
    )


def _reconstruction_figures(reconstruction, sparsity) -> dict[str, float]:
    if not reconstruction.tokens:
        raise InputError("no position is replaced: the dictionary's mask drops all of the text")
    return {"fvu": fvu(reconstruction), "l0": l0(sparsity), "replaced_tokens": int(reconstruction.tokens)}


def final_figures(measured: Measured, rows: Rows, replacement: Replacement | None) -> dict:
    """What goes into `metrics.json`, beside what was measured on what."""
    predictions, nats = measured.predictions, measured.nats
    final = {
        **loss_figures(nats["clean"], predictions, measured.n_bytes),
        "tokens": int(predictions.sum()),
        "bytes": measured.n_bytes,
        "rows": len(rows),
        "documents": len(rows.documents),
    }
    if replacement is None:
        return final

    def replaced(name: str) -> dict:
        increase = nats[name] - nats["clean"]
        return {
            **loss_figures(nats[name], predictions, measured.n_bytes),
            "ce_increase": float(increase.sum()) / float(predictions.sum()),
            "ce_increase_standard_error": standard_error(increase, predictions),
            "kl": float(measured.kl[name].sum()) / float(predictions.sum()),
        }

    floors = {f"{name}_ablation": replaced(name) for name in ("zero", "mean") if name in nats}
    return {
        **final,
        "dictionary": {**replacement.facts(), **replaced("dictionary"), **measured.figures},
        "floors": floors,
    }


def print_table(final: dict) -> None:
    """The figures for the terminal."""
    headings = ("nats/token", "+-", "perplexity", "bits/byte")
    lines = {"clean": final}
    if found := final.get("dictionary"):
        headings += ("CE increase", "KL")
        lines[f"{found['kind']} at {found['site']}"] = found
        lines |= {name.replace("_", " "): figures for name, figures in final["floors"].items()}
    print(f"\n{'':26}" + "".join(f"{name:>13}" for name in headings))
    for name, figures in lines.items():
        values = [f"{figures['nats_per_token']:.5f}", _or_none(figures["nats_per_token_standard_error"], ".5f"),
                  f"{figures['perplexity']:.3f}", _or_none(figures["bits_per_byte"], ".4f")]  # fmt: skip
        if "ce_increase" in figures:
            values += [f"{figures['ce_increase']:+.4f}", f"{figures['kl']:.4f}"]
        print(f"{name:26}" + "".join(f"{value:>13}" for value in values))
    print(f"\n{final['tokens']:,} predictions, {final['bytes']:,} bytes of text; {final['seconds']:.0f} s")
    if found:
        print(
            f"{found['replaced_tokens']:,} positions replaced: FVU {found['fvu']:.4f}, L0 {found['l0']:.1f} of "
            f"{found['n_features']:,} features"
        )


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
