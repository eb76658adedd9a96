"""What `experiments.train_sae` does with its flags, from top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Callable

from jax.sharding import Mesh

from experiments import run_folder, scale
from experiments.data import (
    Data,
    blocks_at,
    check_numbers,
    check_positive,
    load_data,
    passes,
    resolve_bos,
    statistics_tokens,
    summary,
)
from experiments.measuring import measure
from experiments.plan_report import print_plan
from experiments.stored import with_store
from experiments.train_sae import Flags
from experiments.train_sae_report import print_table, write_report
from experiments.training_flags import TrainingFlags
from experiments.training_run import (
    Resample,
    bias_start,
    kept_checkpoints,
    resampler,
    training_bar,
    warn_of_missed_l0,
    with_started_bias,
)
from sparse_jax.activations import Block, RememberedBlocks, Statistics, collect_statistics, fit_normaliser
from sparse_jax.activations.spread import Spread
from sparse_jax.dictionaries import Dictionary, Normalised, save, to_json
from sparse_jax.errors import InputError
from sparse_jax.metrics import Evaluation
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.numerics.precision import fast_dtype
from sparse_jax.training import (
    Pace,
    Resampling,
    TrainState,
    adam,
    check_bias_start,
    check_target,
    init_state,
    make_step,
    processes,
    settings_for,
    total_rows,
)
from sparse_jax.training.loop import run as take_steps
from sparse_jax.training.offload import made_on_host
from sparse_jax.training.step import Step

# What a floor is told of in `metrics.json`.
FLOOR_FIGURES = ("fvu", "l0", "ce_spliced", "ce_increase", "ce_recovered", "ce_recovered_mean", "kl", "shrinkage")

BIAS_STARTS = {"zero": "zero", "mean": "the mean", "geometric-median": "the geometric median"}


# (flags, sized dictionary, statistics, pace, dead window, mesh) -> (the state before the first step, on one device; the
# step for the mesh).
Start = Callable[[Flags, Dictionary, Statistics, Pace, int, Mesh | None], tuple[TrainState, Step]]


def by_adam(
    flags: Flags, dictionary: Dictionary, statistics: Statistics, pace: Pace, window: int, mesh: Mesh | None
) -> tuple[TrainState, Step]:
    """Random parameters that follow the gradient."""
    optimisation = adam(flags.learning_rate)
    normaliser = fit_normaliser(flags.normalise, statistics.mean, statistics.variance)
    settings = settings_for(dictionary, optimisation, flags.target_l0)
    with made_on_host(mesh):
        state = init_state(dictionary, optimisation.transform, normaliser, flags.seed, settings)
    memory = {"chunks": scale.chunks_of(flags), "offload": flags.offload}
    return state, make_step(dictionary, optimisation, flags.schedule, pace.total, window, mesh=mesh, **memory)


def run(flags: Flags, start: Start = by_adam) -> int:
    """Run the experiment; returns the exit code. `start` says where training starts and what a step is."""
    with contextlib.ExitStack() as held:
        return _run(flags, start, held)


def _run(flags: Flags, start: Start, held: contextlib.ExitStack) -> int:
    started = time.perf_counter()
    if flags.plan:
        return plan_only(flags)
    if flags.reuse_memory:
        keep_freed_memory()
    if flags.compute_dtype == "auto":  # config.json says what it came to: a resumed run must not choose anew
        flags = dataclasses.replace(flags, compute_dtype=fast_dtype())
    flags, store = with_store(flags)
    check_numbers(flags)
    check_positive(flags, "learning_rate")
    if flags.report_features < 0 or (flags.order_seed or 0) < 0:
        raise InputError("--report-features and --order-seed cannot be negative")
    Resampling(flags.resample_at)  # what cannot be is told before anything is loaded or removed
    check_target(flags.dictionary, flags.target_l0)
    check_bias_start(flags.dictionary, flags.decoder_bias_start)
    earlier = run_folder.prepare(flags.out, resume=flags.resume, overwrite=flags.overwrite)
    flags = resolve_bos(flags)
    if earlier is not None:
        run_folder.check_same(earlier["flags"], run_folder.jsonable(flags), flags.out)
    mesh = scale.mesh_of(flags)
    (data,) = load_data(flags, flags.site, store=store, mesh=mesh)
    dictionary = flags.dictionary.sized(data.width, compute_dtype=flags.compute_dtype)
    scale.check_sizes(mesh, flags.batch, [(dictionary.n_features, 1)])
    scale.check_same_data(flags, data)
    scale.check_memory(flags, mesh, [dictionary])
    held.enter_context(run_folder.hold(flags.out))
    pace = make_pace(flags)
    processes.first_alone(lambda: begin(flags, data, dictionary, pace))
    print(summary([data]), flush=True)
    statistics, blocks = measure_activations(flags, data)
    print(centring(flags, {str(data.site): statistics}), flush=True)
    training_started = time.perf_counter()
    state, tokens_here = train(flags, dictionary, blocks, statistics, pace, start, mesh, data.identity())
    train_seconds = time.perf_counter() - training_started
    if int(state.step) < pace.total:
        print(f"saved at step {int(state.step)} of {pace.total}; continue with --resume")
        return scale.exit_code_when_stopped()
    warn_of_missed_l0(state, f"the {dictionary.kind} dictionary")
    # On one device again, in one process: what follows is small beside training.
    trained = Normalised(dictionary, *scale.on_one_device((state.params, state.normaliser), mesh))
    block, data = scale.whole_block(blocks[0], data.spread), data.on_one_device()
    rate = tokens_here / train_seconds if train_seconds else None
    processes.first_alone(
        lambda: finish(flags, data, trained, statistics, block, total_rows(state.rows_seen), rate, started)
    )
    return 0


def plan_only(flags: Flags) -> int:
    """What `--plan` does in place of a run."""
    flags, _ = with_store(flags)
    check_numbers(flags)
    print_plan(flags, [(flags.site, flags.dictionary)])
    return 0


def begin(flags: Flags, data: Data, dictionary: Dictionary, pace: Pace) -> None:
    """Make the run folder; a resumed run's is left as it is."""
    if flags.overwrite:
        run_folder.clear(flags.out)
    if not flags.resume:
        write_config(flags, data, dictionary, pace)


def finish(
    flags: Flags,
    data: Data,
    trained: Normalised,
    statistics: Statistics,
    block: Block,
    tokens_trained: int,
    tokens_per_second: float | None,
    started: float,
) -> None:
    """Save and measure the dictionary, and write the report. `block`: the first one of training."""
    save(flags.out / "dictionaries" / str(data.site), trained, provenance(data, statistics, tokens_trained, flags.seed))
    evaluation, floors_k = measure(
        data, trained, statistics, block, eval_tokens=flags.eval_tokens, seed=flags.seed, drop=flags.drop_outliers
    )
    final = final_figures(flags, data, trained.dictionary, evaluation, tokens_trained, floors_k)
    final |= {
        "mean_over_std": statistics.mean_over_std,
        "tokens_per_second": tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    write_report(flags.out, data, trained, evaluation, final, flags)
    run_folder.write_json(flags.out / "metrics.json", final)
    print_table(final)
    print(f"report: {flags.out / 'report.html'}   figures: {flags.out / 'metrics.json'}")


def make_pace(flags: TrainingFlags) -> Pace:
    """Steps of the run; the batch divides a block of rows."""
    total = flags.tokens // flags.batch
    return Pace(flags.batch, total, flags.log_every, flags.checkpoint_every)


def write_config(flags: Flags, data: Data, dictionary: Dictionary, pace: Pace) -> None:
    """`config.json`: every flag, what they resolved to, versions and device."""
    resolved = {"dictionary": to_json(dictionary), "steps": pace.total, **data.identity()}
    flags.out.mkdir(parents=True, exist_ok=True)
    content = {"flags": run_folder.jsonable(flags), "resolved": resolved, "environment": run_folder.environment()}
    run_folder.write_json(flags.out / "config.json", content)


def measure_activations(flags: Flags, data: Data) -> tuple[Statistics, RememberedBlocks]:
    """Statistics of the first training blocks (kept in the run folder), and the blocks with the mask they decide."""
    order = flags.seed if flags.order_seed is None else flags.order_seed
    # Training starts with the blocks that the statistics are made of.
    blocks = RememberedBlocks(blocks_at(data, order), data.width)
    path = flags.out / "statistics.npz"
    if flags.resume and path.exists():
        statistics = Statistics.load(path)
    else:
        wanted = statistics_tokens(flags, data.train)
        statistics = collect_statistics(blocks, max(1, wanted // blocks.tokens_per_block))
        if processes.is_first():
            statistics.save(path)
    if flags.drop_outliers:
        limit = data.outlier_ratio * statistics.median_norm
        blocks = RememberedBlocks(blocks_at(data, order, limit), data.width)
    return statistics, blocks


def centring(flags: TrainingFlags, statistics: dict[str, Statistics]) -> str:
    """How far the activations of each site are from being centred, and what is done about it, in a line each."""
    return "\n".join(
        f"activations at {site}: ||mean|| / ||std|| {each.mean_over_std:.3f} over {each.tokens:,} training tokens; "
        f"normaliser {flags.normalise}, decoder bias starts at {BIAS_STARTS[flags.decoder_bias_start]}"
        for site, each in statistics.items()
    )


def train(
    flags: Flags,
    dictionary: Dictionary,
    blocks: RememberedBlocks,
    statistics: Statistics,
    pace: Pace,
    start: Start,
    mesh: Mesh | None,
    identity: dict,
) -> tuple[TrainState, int]:
    """The state at the end, or where the run was asked to stop; and the tokens that this call trained on.

    A checkpoint of another model or text than `identity` is refused.
    """
    window = min(flags.dead_window, flags.tokens // 4)
    state, step = start(flags, dictionary, statistics, pace, window, mesh)
    lines = scale.lines_of(flags)
    with kept_checkpoints(flags, flags.out / "checkpoints", identity) as checkpoints:
        if flags.resume and checkpoints.latest() is not None:
            state = checkpoints.restore(scale.placed(state, mesh))
            print(f"resumed at step {int(state.step)} of {pace.total}")
        else:
            if flags.decoder_bias_start != "zero":
                block = scale.whole_block(blocks[0], blocks.spread)
                state = with_started_bias(dictionary, state, bias_start(flags, block, state.normaliser))
            state = scale.placed(state, mesh)
        first = int(state.step)
        lines.truncate_after(first)
        with scale.stop_request(first) as stop, training_bar(pace, first) as bar:
            state = take_steps(
                state,
                step,
                blocks,
                pace,
                log=lambda row: (lines.write(row), bar.set_postfix(fvu=f"{row['fvu']:.3f}", l0=f"{row['l0']:.1f}")),
                checkpoints=checkpoints,
                after_step=resampled(flags, dictionary, pace, window, lines.write, blocks.spread),
                should_stop=stop,
                progress=bar.update,
            )
    return state, (int(state.step) - first) * pace.batch


def resampled(
    flags: Flags,
    dictionary: Dictionary,
    pace: Pace,
    window: int,
    log: Callable[[dict], None],
    spread: Spread | None = None,
) -> Callable[[TrainState, Block, int], TrainState]:
    """The `resampler` of one dictionary, with a line in the log each time."""

    def change(state: TrainState, block: Block, done: int, resample: Resample) -> TrainState:
        state, count = resample(dictionary, state, block.x, block.weight)
        log({"step": done, "tokens": total_rows(state.rows_seen), "resampled": count})
        return state

    return resampler(flags, [dictionary], pace, window, change, spread)


def provenance(data: Data, statistics: Statistics, tokens_trained: int, seed: int) -> dict:
    """Where a dictionary came from, for its card. `max_norm`: tokens above it were masked; None if none was."""
    max_norm = data.outlier_ratio * statistics.median_norm if data.flags.drop_outliers else None
    return {**data.identity(), "max_norm": max_norm, "tokens_trained": tokens_trained, "seed": seed}


def final_figures(
    flags: Flags, data: Data, dictionary: Dictionary, evaluation: Evaluation, tokens_trained: int, floors_k: int
) -> dict:
    """What goes into `metrics.json`."""
    floors = {name: {key: figures[key] for key in FLOOR_FIGURES} for name, figures in evaluation.floors.items()}
    return {
        "model": flags.model,
        "revision": flags.revision,
        "site": str(data.site),
        "dictionary": dictionary.kind,
        "n_features": dictionary.n_features,
        "tokens_trained": tokens_trained,
        "distinct_tokens_trained": min(tokens_trained, data.train.n_tokens or tokens_trained),
        "epochs": passes(flags.tokens, data.train),
        **evaluation.figures,
        "floors_k": floors_k,
        "floors": floors,
        "unmasked": evaluation.unmasked,
        "mask": evaluation.mask,
    }
