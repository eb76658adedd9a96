"""What runs that train dictionaries, one or many, have in common around the loop."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax

from experiments import run_folder
from experiments.scale import first_rows
from experiments.training_flags import TrainingFlags
from sparse_jax.activations import Block, Normaliser
from sparse_jax.activations.spread import Spread
from sparse_jax.dictionaries import Dictionary
from sparse_jax.training import (
    Checkpoints,
    Pace,
    Resampling,
    TrainState,
    centre_of_rows,
    first_counted,
    make_resample,
    with_decoder_bias,
)
from sparse_jax.training.processes import is_first

State = TypeVar("State", bound=Any)
# (dictionary, its state, raw x [rows, d], weight [rows]) -> (state, how many features were started again).
Resample = Callable[[Dictionary, TrainState, jax.Array, jax.Array], tuple[TrainState, int]]


def bias_start(flags: TrainingFlags, block: Block, normaliser: Normaliser) -> jax.Array:
    """`[d]` where the decoder biases of a site start, in normalised units, found from the site's first block."""
    x, weight = first_counted(block.x, block.weight)
    return centre_of_rows(normaliser.apply(x), weight, flags.decoder_bias_start)


def with_started_bias(dictionary: Dictionary, state: TrainState, centre: jax.Array) -> TrainState:
    """The state before the first step with its decoder bias at a centre."""
    return dataclasses.replace(state, params=with_decoder_bias(dictionary, state.params, centre))


def resampler(
    flags: TrainingFlags,
    dictionaries: Iterable[Dictionary],
    pace: Pace,
    window: int,
    change: Callable[[State, Any, int, Resample], State],
    spread: Spread | None = None,
) -> Callable[[State, Any, int], State]:
    """What is done after each step: nothing, but at the steps where silent features are started again.

    Args:
        flags: say at which shares of the run.
        dictionaries: of the run.
        pace: of the run.
        window: a feature silent for more rows is started again.
        change: gets the run's state, the block at hand, the number of steps taken and `resample`, which it calls for
            each dictionary with the rows of the block; returns the state to go on with.
        spread: how blocks lie over a mesh, that of the states; None: on one device.
    """
    resampling = Resampling(flags.resample_at)
    steps = resampling.steps(pace.total)
    mesh = None if spread is None else spread.sharding.mesh
    compiled = {dictionary: make_resample(dictionary, window, mesh) for dictionary in dictionaries} if steps else {}

    def resample(dictionary: Dictionary, state: TrainState, x: jax.Array, weight: jax.Array) -> tuple[TrainState, int]:
        x, weight = (first_rows(each, spread, resampling.rows) for each in (x, weight))
        state, count = compiled[dictionary](state, x, weight)
        return state, int(count)

    def after_step(state: State, block: Any, done: int) -> State:
        return change(state, block, done, resample) if done in steps else state

    return after_step


# A run that ends this far from the wished L0 (as a share of it: 2 of 32) says so.
MISSED = 1 / 16


def warn_of_missed_l0(state: TrainState, name: str) -> None:
    """Print a warning where a controller has not brought L0 (over the last steps of training) to its target."""
    wished, reached = float(state.settings.target_l0), float(state.control.l0)
    if wished > 0 and abs(reached / wished - 1) > MISSED:
        print(
            f"warning: {name} ended at L0 {reached:.1f}, not at --target-l0 {wished:g}: give more tokens, another "
            "learning rate, or a coefficient nearer to the one that is needed (metrics.jsonl shows it)"
        )


def kept_checkpoints(flags: Any, folder: Path, identity: dict) -> Checkpoints:
    """The checkpoints of a run: its flags and the `identity` of its model and text are kept with each."""
    return Checkpoints(
        folder,
        flags.keep_checkpoints,
        best=flags.keep_best,
        config=run_folder.jsonable(flags),
        identity=identity,
    )


def training_bar(pace: Pace, first: int) -> Any:
    """A tqdm bar of the run's tokens, from step `first`; a context manager."""
    from tqdm import tqdm

    return tqdm(
        total=pace.total * pace.batch,
        initial=first * pace.batch,
        unit="tok",
        unit_scale=True,
        desc="training",
        mininterval=0.5,
        disable=not is_first(),
    )
