"""What `experiments.jacobian_sae` does with its flags, from top to bottom."""

import contextlib
import dataclasses
import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from experiments import command, run_folder
from experiments.data import Data, check_numbers, check_positive, load_data, resolve_bos, site_blocks, statistics_tokens
from experiments.jacobian_sae import Flags
from experiments.jacobian_sae_report import print_table, write_report
from experiments.measuring import eval_rows, in_float32
from experiments.train_sae_run import provenance
from experiments.training_run import training_bar
from sparse_jax.activations import RememberedBlocks, Statistics, collect_site_statistics, fit_normaliser
from sparse_jax.connectors.connection_counts import connection_counts
from sparse_jax.connectors.folded_mlp import folded_mlp
from sparse_jax.connectors.jacobian_curves import JacobianFigures, jacobian_figures
from sparse_jax.connectors.jacobian_sae import JacobianPair, jacobian_pair, joint_normaliser, trained_sides
from sparse_jax.connectors.scalar_functions import scalar_functions
from sparse_jax.dictionaries import Normalised, TopK, save
from sparse_jax.errors import InputError
from sparse_jax.numerics.allocator import keep_freed_memory
from sparse_jax.numerics.precision import fast_dtype
from sparse_jax.training import (
    Checkpoints,
    JsonLines,
    Pace,
    TrainState,
    adam,
    init_state,
    make_step,
    settings_for,
    total_rows,
)
from sparse_jax.training.loop import run as take_steps
from sparse_jax.training.state import steps_taken

# Held-out rows on which scalar functions are sampled: enough for the range of a feature that fires on 1 in 1,000.
FUNCTION_ROWS = 64
# An output feature's connections are counted where it fires on so many held-out tokens.
MIN_FIRED = 20
LOGS = {"trained": "metrics.jsonl", "step0": "metrics_step0.jsonl"}


@dataclass(frozen=True)
class Side:
    """One model, trained or random: its sites and the activations there."""

    name: str
    into: Data
    out: Data
    statistics: dict[str, Statistics]
    blocks: RememberedBlocks
    limits: dict[str, float]

    @property
    def sites(self) -> tuple[Data, Data]:
        return self.into, self.out


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    with contextlib.ExitStack() as held:
        return _run(flags, held)


def _run(flags: Flags, held: contextlib.ExitStack) -> int:
    started = time.perf_counter()
    if flags.reuse_memory:
        keep_freed_memory()
    if flags.compute_dtype == "auto":
        flags = dataclasses.replace(flags, compute_dtype=fast_dtype())
    check(flags)
    earlier = run_folder.prepare(flags.out, resume=flags.resume, overwrite=flags.overwrite)
    flags = resolve_bos(flags)
    if earlier is not None:
        run_folder.check_same(earlier["flags"], run_folder.jsonable(flags), flags.out)
    loaded = load_models(flags)
    held.enter_context(run_folder.hold(flags.out))
    if not flags.resume:
        resolved = {name: data[0].identity() for name, data in loaded.items()}
        run_folder.begin(flags, resolved, also=(LOGS["step0"],))
    pace = Pace(flags.batch, flags.tokens // flags.batch, flags.log_every, flags.checkpoint_every)
    models = {}
    for name, data in loaded.items():
        print(f"{name}: {data[0].flags.model}, the MLP of layer {flags.layer}; {len(flags.coefficients)} pairs of "
              f"{flags.n_features:,} features, k {flags.k}, {flags.tokens:,} tokens", flush=True)  # fmt: skip
        side = measure_activations(flags, name, data)
        pair, states = train(flags, side, pace)
        if (done := steps_taken(states)) < pace.total:
            print(f"saved at step {done} of {pace.total}; continue with --resume")
            return command.EXIT_INTERRUPTED
        models[name] = finish(flags, side, pair, states)
    final = {
        "layer": flags.layer,
        "n_features": flags.n_features,
        "k": flags.k,
        "at": flags.at,
        "tokens_trained": pace.total * flags.batch,
        "control": "step0" if "step0" in models else None,
        "models": models,
        "seconds": time.perf_counter() - started,
    }
    write_report(flags, final)
    run_folder.write_json(flags.out / "metrics.json", jsonable(final))
    print_table(final)
    print(f"report: {flags.out / 'report.html'}   figures: {flags.out / 'metrics.json'}")
    return 0


def check(flags: Flags) -> None:
    """Raises InputError for flags that no run can use, before anything is loaded."""
    check_numbers(flags)
    check_positive(flags, "learning_rate", "n_features", "k", "every", "functions", "thresholds")
    if not flags.coefficients or min(flags.coefficients) < 0 or not all(map(math.isfinite, flags.coefficients)):
        raise InputError(f"--coefficients {flags.coefficients}: give one or more numbers of at least 0")
    if len({folder(c) for c in flags.coefficients}) < len(flags.coefficients):
        raise InputError(f"--coefficients {flags.coefficients}: each once")
    if not flags.thresholds:
        raise InputError("--thresholds: give at least one")
    if flags.k > flags.n_features:
        raise InputError(f"--k {flags.k} exceeds --n-features {flags.n_features}")
    if flags.every > flags.batch:
        raise InputError(f"--every {flags.every} exceeds --batch {flags.batch}: no row of a batch would be penalised")
    if flags.step0_revision and not flags.step0:
        raise InputError("--step0-revision is that of --step0: give --step0 too")
    if (flags.step0, flags.step0_revision) == (flags.model, flags.revision):
        raise InputError(f"--step0 {flags.step0} is --model itself: give the model before training")
    TopK(k=flags.k, aux_coefficient=flags.aux_coefficient)


def load_models(flags: Flags) -> dict[str, tuple[Data, Data]]:
    """name -> data of `mlp_in` and `mlp_out`, of the model and of its control; both read the same text.

    Raises:
        InputError: a model cannot be used, or the control is of another shape.
    """
    sites = [f"mlp_in.{flags.layer}", f"mlp_out.{flags.layer}"]
    models = {"trained": tuple(load_data(flags, *sites))}
    if flags.step0:
        given = dataclasses.replace(flags, model=flags.step0, revision=flags.step0_revision)
        models["step0"] = tuple(load_data(given, *sites))
        here, there = (models[name][0].lm.config for name in ("trained", "step0"))
        if here != there:
            raise InputError(f"--step0 {flags.step0} has another config than --model {flags.model}: give its step 0")
    return models


def measure_activations(flags: Flags, name: str, data: tuple[Data, Data]) -> Side:
    """Statistics of both sites over the first training blocks (kept in the run folder), and the blocks."""
    width = sum(each.width for each in data)
    blocks = RememberedBlocks(site_blocks(data, flags.seed, {}), width)
    paths = {str(each.site): flags.out / "dictionaries" / name / str(each.site) / "statistics.npz" for each in data}
    if flags.resume and all(path.exists() for path in paths.values()):
        statistics = {site: Statistics.load(path) for site, path in paths.items()}
    else:
        wanted = statistics_tokens(flags, data[0].train)
        statistics = collect_site_statistics(blocks, max(1, wanted // blocks.tokens_per_block))
        for site, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            statistics[site].save(path)
    limits = {}
    if flags.drop_outliers:
        limits = {str(each.site): each.outlier_ratio * statistics[str(each.site)].median_norm for each in data}
        blocks = RememberedBlocks(site_blocks(data, flags.seed, limits), width)
    return Side(name, *data, statistics, blocks, limits)


def train(flags: Flags, side: Side, pace: Pace) -> tuple[JacobianPair, tuple]:
    """The pair, and its states at the end (or where the run was asked to stop): one for each coefficient."""
    sides = [
        TopK(n_features=flags.n_features, k=flags.k, aux_coefficient=flags.aux_coefficient).sized(
            data.width, compute_dtype=flags.compute_dtype
        )
        for data in side.sites
    ]
    pair = jacobian_pair(*sides, side.into.lm.config.activation, at=flags.at, every=flags.every)
    optimisation, window = adam(flags.learning_rate), min(flags.dead_window, flags.tokens // 4)
    states = (tuple(start(flags, side, pair, optimisation, c) for c in flags.coefficients),)
    one = make_step(pair, optimisation, flags.schedule, pace.total, window)
    names = [str(data.site) for data in side.sites]

    def step(states, x, weight):
        both, counts = jnp.concatenate([x[name] for name in names], axis=-1), weight[names[0]] * weight[names[1]]
        stepped = [one(state, both, counts) for state in states[0]]
        return (tuple(state for state, _ in stepped),), [metrics for _, metrics in stepped]

    def rows(states, metrics):
        seen = [total_rows(state.rows_seen) for state in states[0]]
        fetched = jax.device_get(metrics)
        return [
            {"coefficient": c, "tokens": tokens, **{key: float(value) for key, value in own.items()}}
            for c, tokens, own in zip(flags.coefficients, seen, fetched)
        ]

    lines = JsonLines(flags.out / LOGS[side.name])
    about = {"config": run_folder.jsonable(flags), "identity": side.into.identity()}
    with Checkpoints(flags.out / "checkpoints" / side.name, **about) as checkpoints, command.StopRequest() as stop:
        if flags.resume and checkpoints.latest() is not None:
            states = checkpoints.restore(states)
            print(f"resumed at step {steps_taken(states)} of {pace.total}")
        first = steps_taken(states)
        lines.truncate_after(first)
        with training_bar(pace, first) as bar:
            states = take_steps(
                states,
                step,
                side.blocks,
                pace,
                log=lines.write,
                checkpoints=checkpoints,
                should_stop=stop,
                progress=bar.update,
                rows=rows,
            )
    return pair, states


def start(flags: Flags, side: Side, pair: JacobianPair, optimisation, coefficient: float) -> TrainState:
    """The state of one pair before the first step: all coefficients start with the same parameters."""
    normalisers = [
        fit_normaliser(flags.normalise, each.mean, each.variance)
        for each in (side.statistics[str(data.site)] for data in side.sites)
    ]
    settings = settings_for(pair, optimisation)
    settings = settings._replace(coefficients={**settings.coefficients, "jacobian": coefficient})
    state = init_state(pair, optimisation.transform, joint_normaliser(*normalisers), flags.seed, settings)
    mlp = folded_mlp(side.into.lm, flags.layer, *normalisers)
    return dataclasses.replace(state, params=pair.with_mlp(state.params, mlp))


def folder(coefficient: float) -> str:
    """The name of a pair's folders."""
    return f"jacobian-{coefficient:g}"


def finish(flags: Flags, side: Side, pair: JacobianPair, states: tuple) -> dict:
    """Save and measure every pair; returns what `metrics.json` says of this model."""
    members, numbers = [], eval_rows(side.into, flags.eval_tokens)
    lm = side.into.in_float32().lm
    max_norms = tuple(side.limits.get(str(data.site), float("inf")) for data in side.sites)
    for coefficient, state in zip(flags.coefficients, states[0]):
        coders = trained_sides(pair, state.params, state.normaliser)
        tokens = total_rows(state.rows_seen)
        for data, coder in zip(side.sites, coders):
            card = provenance(data, side.statistics[str(data.site)], tokens, flags.seed)
            card |= {"jacobian": coefficient, "jacobian_at": flags.at, "partner": partner(side, data, coefficient)}
            save(flags.out / "dictionaries" / side.name / str(data.site) / folder(coefficient), coder, card)
        coders = tuple(map(in_float32, coders))
        print(f"measuring {side.name}, coefficient {coefficient:g}", flush=True)
        figures = jacobian_figures(
            lm, flags.layer, coders, side.into.evaluation, numbers, where=flags.at, max_norms=max_norms
        )
        members.append(member(flags, side, lm, coders, figures, numbers, coefficient) | {"tokens_trained": tokens})
    return {"model": side.into.flags.model, "revision": side.into.flags.revision, "members": members}


def partner(side: Side, data: Data, coefficient: float) -> str:
    """The folder of a dictionary's other half, from the run's `dictionaries/`."""
    other = side.out if data is side.into else side.into
    return f"{side.name}/{other.site}/{folder(coefficient)}"


def member(
    flags: Flags,
    side: Side,
    lm,
    coders: tuple[Normalised, Normalised],
    figures: JacobianFigures,
    numbers,
    coefficient: float,
) -> dict:
    """The figures of one pair."""
    functions = scalar_functions(
        lm,
        flags.layer,
        coders,
        side.into.evaluation,
        numbers[:FUNCTION_ROWS],
        functions=flags.functions,
        where=flags.at,
        seed=flags.seed,
    )
    counts = None
    if figures.mean_slopes is not None:
        counts = connection_counts(figures.mean_slopes, alive=figures.fired_out >= MIN_FIRED)
    return {
        "coefficient": coefficient,
        "tokens_evaluated": figures.tokens,
        "fvu_in": figures.fvu_in,
        "fvu_out": figures.fvu_out,
        "ce_clean": figures.ce_clean,
        "ce_increase": figures.ce_increase,
        "l0_in": float(figures.fired_in.sum()) / figures.tokens,
        "l0_out": float(figures.fired_out.sum()) / figures.tokens,
        "dead_in": float((figures.fired_in == 0).mean()),
        "dead_out": float((figures.fired_out == 0).mean()),
        "mean_absolute": figures.mean_absolute,
        "mean_norm": figures.mean_norm,
        "concentration": figures.concentration,
        "share_above": {f"{t:g}": figures.share_above(t) for t in flags.thresholds},
        "share_above_relative": {f"{t:g}": figures.share_above(t, relative=True) for t in flags.thresholds},
        "functions": functions.shares(),
        "functions_strong": functions.shares(functions.strong),
        "strong": float(functions.strong.mean()),
        "connections": None if counts is None else {**counts.medians(), "outputs": int(counts.alive.sum())},
    }


def jsonable(value):
    """NaN as None: JSON has none."""
    if isinstance(value, dict):
        return {name: jsonable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [jsonable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
