"""Train a dictionary on one site of a language model, measure it beside its floors, and write a report.

    python -m experiments.train_sae --out runs/demo l1

On two CPU cores the defaults take some minutes. See the README for the figures to expect.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import command, run_folder
from experiments.data import Data, check_numbers, load_data
from experiments.measuring import measure
from sparse_jax.activations import Blocks, Statistics, collect_statistics, fit_normaliser
from sparse_jax.activations.normalise import Rule
from sparse_jax.dictionaries import L1, Dictionary, Normalised, save, to_json
from sparse_jax.metrics import Evaluation
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.training import (
    Checkpoints,
    JsonLines,
    Pace,
    Schedule,
    TrainState,
    adam,
    init_state,
    make_step,
    run,
    total_rows,
)

# What a floor is told of in `metrics.json`.
FLOOR_FIGURES = ("fvu", "l0", "ce_spliced", "ce_increase", "ce_recovered", "ce_recovered_mean", "kl", "shrinkage")

Trainable = tyro.extras.subcommand_type_from_defaults({"l1": L1()})


@dataclass(frozen=True)
class Flags:
    """Train a dictionary on one site of a language model, measure it beside its floors, and write a report.

    The dictionary is the subcommand; its own flags come after it: `... --out runs/a l1 --l1 4`.
    """

    dictionary: Trainable  # type: ignore[valid-type]
    model: str = "novel-neox"
    """Embedded name (novel-neox), folder in Hugging Face's layout, or hub id (EleutherAI/pythia-70m)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    site: str = "resid_post.3"
    """Where activations are taken: NAME.LAYER, or TransformerLens' name."""
    text: str = "embedded"
    """What to train on: embedded, austen, state-of-the-union, a .txt(.gz) or .jsonl(.gz) file, or hub:owner/dataset."""
    eval_text: str | None = None
    """What to evaluate on; by default whole documents of --text that are held out and never trained on."""
    holdout: float = 0.05
    """Share of documents held out, where --text is not embedded and there is no --eval-text."""
    text_field: str = "text"
    """Field that holds the text in .jsonl files and hub datasets."""
    tokens: int = 3_000_000
    """Tokens to train on; more than the text holds means several epochs (said)."""
    eval_tokens: int = 262_144
    """Held-out tokens to evaluate on, at most; a feature is called dead on these."""
    context: int = 256
    """Tokens in a row of text."""
    skip_positions: int = 1
    """Positions at the start of each row that are masked: attention sinks stand there."""
    drop_outliers: bool = False
    """Mask tokens whose activation norm exceeds 10 times the median (they are counted either way)."""
    bos: Literal["none", "row"] = "none"
    """Whether each row begins with the begin-of-text token; as the model was trained (the embedded one: none)."""
    batch: int = 2048
    """Tokens in a training step."""
    learning_rate: float = 1e-3
    """Adam's peak learning rate."""
    schedule: Schedule = field(default_factory=Schedule)
    """Warm-ups and decay, as shares of the run."""
    normalise: Rule = "centre-scale"
    """What is done to activations before the dictionary: scale means E||x||^2 = d."""
    statistics_tokens: int = 1_000_000
    """Training tokens from which the normaliser and the floors are fitted, at most."""
    dead_window: int = 500_000
    """A feature silent for more training tokens counts as dead in the curves; at most a quarter of the run."""
    seed: int = 0
    """Decides initial parameters, the order of the data and what the report samples."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Inputs of matrix products in model and training; sums, parameters and the final measures stay float32."""
    block_rows: int = 256
    """Rows of text that are harvested and shuffled together."""
    report_features: int = 30
    """Features shown in the report, drawn uniformly from those that fire."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    out: Path = Path("runs/train_sae")
    """Run folder."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint; the flags must be the same."""
    overwrite: bool = False
    """Remove the run in --out first."""
    reuse_memory: bool = True
    """Keep freed memory in the process (glibc): faster on CPU, but the peak is never given back."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    if flags.reuse_memory:
        keep_freed_memory()
    check_numbers(flags)
    run_folder.prepare(flags.out, flags, resume=flags.resume, overwrite=flags.overwrite)
    data = load_data(flags)
    if flags.overwrite:
        run_folder.clear(flags.out)
    dictionary = flags.dictionary.sized(data.width, compute_dtype=flags.compute_dtype)
    pace = make_pace(flags, data)
    if not flags.resume:
        write_config(flags, data, dictionary, pace)
    print(data.summary(), flush=True)
    statistics, blocks = measure_activations(flags, data)
    training_started = time.perf_counter()
    state, tokens_here = train(flags, dictionary, blocks, statistics, pace)
    train_seconds = time.perf_counter() - training_started
    if int(state.step) < pace.total:
        print(f"saved at step {int(state.step)} of {pace.total}; continue with --resume")
        return command.EXIT_INTERRUPTED
    trained = Normalised(dictionary, state.params, state.normaliser)
    tokens_trained = total_rows(state.rows_seen)
    save(flags.out / "dictionaries" / str(data.site), trained, provenance(flags, data, tokens_trained))
    evaluation, floors_k = measure(
        data, trained, statistics, blocks, eval_tokens=flags.eval_tokens, seed=flags.seed, drop=flags.drop_outliers
    )
    final = final_figures(flags, data, dictionary, evaluation, tokens_trained, floors_k)
    final |= {
        "tokens_per_second": tokens_here / train_seconds if train_seconds else None,
        "seconds": time.perf_counter() - started,
    }
    from experiments.train_sae_report import print_table, write_report

    write_report(flags.out, data, trained, evaluation, final, flags)
    run_folder.write_json(flags.out / "metrics.json", final)
    print_table(final)
    print(f"report: {flags.out / 'report.html'}   figures: {flags.out / 'metrics.json'}")
    return 0


def make_pace(flags: Flags, data: Data) -> Pace:
    """Steps of the run; the batch divides a block of rows."""
    total = flags.tokens // flags.batch
    return Pace(flags.batch, total, flags.log_every, flags.checkpoint_every)


def write_config(flags: Flags, data: Data, dictionary: Dictionary, pace: Pace) -> None:
    """`config.json`: every flag, what they resolved to, versions and device."""
    resolved = {"dictionary": to_json(dictionary), "steps": pace.total, **data.identity()}
    content = {"flags": run_folder.jsonable(flags), "resolved": resolved, "environment": run_folder.environment()}
    run_folder.write_json(flags.out / "config.json", content)


def measure_activations(flags: Flags, data: Data) -> tuple[Statistics, Blocks]:
    """Statistics of the first training blocks (kept in the run folder), and the blocks with the mask they decide."""
    blocks = Blocks(data.lm, data.train, data.site, flags.seed, flags.block_rows)
    path = flags.out / "statistics.npz"
    if flags.resume and path.exists():
        statistics = Statistics.load(path)
    else:
        wanted = min(flags.statistics_tokens, flags.tokens, data.train.n_tokens)
        statistics = collect_statistics(blocks, max(1, wanted // blocks.tokens_per_block))
        statistics.save(path)
    if flags.drop_outliers:
        blocks = dataclasses.replace(blocks, max_norm=data.outlier_ratio * statistics.median_norm)
    return statistics, blocks


def train(
    flags: Flags, dictionary: Dictionary, blocks: Blocks, statistics: Statistics, pace: Pace
) -> tuple[TrainState, int]:
    """The state at the end, or where the run was asked to stop; and the tokens that this call trained on."""
    from tqdm import tqdm

    optimisation = adam(flags.learning_rate)
    normaliser = fit_normaliser(flags.normalise, statistics.mean, statistics.variance)
    state = init_state(dictionary, optimisation.transform, normaliser, flags.seed)
    window = min(flags.dead_window, flags.tokens // 4)
    step = make_step(dictionary, optimisation, flags.schedule, pace.total, window)
    lines = JsonLines(flags.out / "metrics.jsonl")
    with Checkpoints(flags.out / "checkpoints") as checkpoints, command.StopRequest() as stop:
        if flags.resume and checkpoints.latest() is not None:
            state = checkpoints.restore(state)
            print(f"resumed at step {int(state.step)} of {pace.total}")
        first = int(state.step)
        lines.truncate_after(first)
        with tqdm(
            total=pace.total * pace.batch,
            initial=first * pace.batch,
            unit="tok",
            unit_scale=True,
            desc="training",
            mininterval=0.5,
        ) as bar:
            state = run(
                state,
                step,
                blocks,
                pace,
                log=lambda row: (lines.write(row), bar.set_postfix(fvu=f"{row['fvu']:.3f}", l0=f"{row['l0']:.1f}")),
                checkpoints=checkpoints,
                should_stop=stop,
                progress=bar.update,
            )
    return state, (int(state.step) - first) * pace.batch


def provenance(flags: Flags, data: Data, tokens_trained: int) -> dict:
    """Where a dictionary came from, for its card."""
    return {**data.identity(), "site": str(data.site), "tokens_trained": tokens_trained, "seed": flags.seed}


def final_figures(
    flags: Flags, data: Data, dictionary: Dictionary, evaluation: Evaluation, tokens_trained: int, floors_k: int
) -> dict:
    """What goes into `metrics.json`."""
    floors = {
        name: {key: figures[key] for key in FLOOR_FIGURES} for name, figures in evaluation.floors.items()
    }
    return {
        "model": flags.model,
        "revision": flags.revision,
        "site": str(data.site),
        "dictionary": dictionary.kind,
        "n_features": dictionary.n_features,
        "tokens_trained": tokens_trained,
        "distinct_tokens_trained": min(tokens_trained, data.train.n_tokens),
        "epochs": flags.tokens / data.train.n_tokens,
        **evaluation.figures,
        "floors_k": floors_k,
        "floors": floors,
        "unmasked": evaluation.unmasked,
        "mask": evaluation.mask,
    }


if __name__ == "__main__":
    command.main(Flags, main)
