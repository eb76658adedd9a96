"""The loop: blocks of activations through the step, with logs, checkpoints and a way to stop in between.

`run` is the loop of a single dictionary and of an ensemble alike; `run_ensemble` calls it with all groups as one state.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
from jax import lax

from sparse_jax.activations.ahead import Ahead, worth_it
from sparse_jax.activations.blocks import Block, Blocks, RememberedBlocks, SiteBlock, SiteBlocks
from sparse_jax.errors import InputError
from sparse_jax.numerics.whole import to_host
from sparse_jax.training.checkpoints import Checkpoints
from sparse_jax.training.ensemble import Group, States, check_harvested
from sparse_jax.training.state import TrainState, steps_taken, total_rows


@dataclass(frozen=True)
class Pace:
    """When things happen, in steps.

    Attributes:
        batch: tokens in a step; divides the tokens of a block.
        total: steps of the run.
        log_every: metrics are fetched and logged.
        checkpoint_every: the state is saved.
    """

    batch: int
    total: int
    log_every: int
    checkpoint_every: int


def _fetched(tree: Any) -> Any:
    """The arrays on the host; those of several processes' devices are put together."""
    return jax.device_get(tree) if jax.process_count() == 1 else to_host(tree)


State = TypeVar("State", bound=Any)


def one_row(state: TrainState, metrics: dict) -> list[dict]:
    """What is logged of a single dictionary: one row."""
    metrics, seen = _fetched((metrics, state.rows_seen))
    return [{"tokens": total_rows(seen), **{name: float(value) for name, value in metrics.items()}}]


def run(
    state: State,
    step: Callable[[State, Any, Any], tuple[State, Any]],
    blocks: Blocks | SiteBlocks | RememberedBlocks,
    pace: Pace,
    *,
    log: Callable[[dict], None],
    checkpoints: Checkpoints | None,
    after_step: Callable[[State, Block | SiteBlock, int], State] = lambda state, block, done: state,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda tokens: None,
    rows: Callable[[State, Any], list[dict]] = one_row,
) -> State:
    """Take steps until `pace.total`, or until `should_stop()`; a checkpoint is saved at the end either way.

    The position in the data is the state's own step: step i takes batch i modulo the batches of a block, of block
    i // that number.

    Args:
        step: gets the state, and of a batch x and weight: arrays, or dicts by site as the blocks have them.
        log: gets {"step", "tokens", metrics...}, as Python numbers.
        after_step: gets the state, the block of activations at hand and the number of steps taken, and returns the
            state to go on with; called before a checkpoint is saved.
        progress: gets the number of tokens of each finished step.
        rows: state and metrics -> what is logged, without the step.

    Raises:
        InputError: activations are not finite, or every loss is not at a step that is logged or after which a
            checkpoint would be saved (said where). That checkpoint is not saved; earlier ones stay.
    """
    per_block = blocks.tokens_per_block // pace.batch
    start = steps_taken(state)
    block = metrics = None
    spread = getattr(blocks, "spread", None)
    with contextlib.ExitStack() as stack:
        if worth_it(blocks):
            blocks = stack.enter_context(Ahead(blocks, (pace.total - 1) // per_block))
        for number in range(start, pace.total):
            if should_stop():
                break
            index, offset = divmod(number, per_block)
            if block is None or offset == 0:
                block = blocks[index]
            if spread is None:
                x, weight = _slice((block.x, block.weight), offset * pace.batch, pace.batch)
            else:
                x, weight = spread.batch_at((block.x, block.weight), offset)
            state, metrics = step(state, x, weight)
            progress(pace.batch)
            done = number + 1
            state = after_step(state, block, done)
            if done % pace.log_every == 0 or done == pace.total or number == start:
                _log(log, rows(state, metrics), done)
            if checkpoints and done % pace.checkpoint_every == 0 and done < pace.total:
                logged = rows(state, metrics)
                _check_losses(logged, done)
                checkpoints.save(state, logged)
    if checkpoints:
        logged = []
        if metrics is not None:  # a step was taken: logs may be further apart than checkpoints
            logged = rows(state, metrics)
            _check_losses(logged, steps_taken(state))
        checkpoints.save(state, logged)
        checkpoints.wait()  # here, where a signal that comes again does not end the process
    return state


def _check_losses(rows: list[dict], done: int) -> None:
    if not any(math.isfinite(row["loss"]) for row in rows):
        raise InputError(f"the loss is {rows[0]['loss']} at step {done}: lower the learning rate or the coefficients")


def _log(log: Callable[[dict], None], rows: list[dict], done: int) -> None:
    _check_losses(rows, done)
    for row in rows:
        log({"step": done, **row})


@partial(jax.jit, static_argnums=2)
def _slice(values: Any, start: int, size: int) -> Any:
    return jax.tree.map(lambda each: lax.dynamic_slice_in_dim(each, start, size), values)


def run_ensemble(
    states: tuple[States, ...],
    steps: Sequence[Callable[[States, jax.Array, jax.Array], tuple[States, dict[str, jax.Array]]]],
    groups: Sequence[Group],
    blocks: SiteBlocks | RememberedBlocks,
    pace: Pace,
    **options: Any,
) -> tuple[States, ...]:
    """`run` for an ensemble: every group steps on the same batch, in one pass over the blocks.

    Args:
        states, steps: one for each group (`init_ensemble`, `make_ensemble_step`).
        groups: what `group` made.
        blocks: of all sites of the groups.
        pace, options: as for `run`. The state that `after_step` gets and returns is `states`; `log` gets a row for
            each member, with its name as "member".

    Raises:
        InputError: a group's site is not harvested; activations are not finite; the loss of no member is. A member
            whose loss alone is not finite is logged so, and does not stop the others.
    """
    check_harvested(groups, getattr(blocks, "blocks", blocks).sites)

    def step(states, x, weight):
        stepped = [each(state, x[of.site], weight[of.site]) for each, state, of in zip(steps, states, groups)]
        return tuple(state for state, _ in stepped), [metrics for _, metrics in stepped]

    def rows(states, metrics):
        return [row for of, state, each in zip(groups, states, metrics) for row in _member_rows(of, state, each)]

    return run(states, step, blocks, pace, rows=rows, **options)


def _member_rows(of: Group, states: States, metrics: dict[str, jax.Array]) -> list[dict]:
    seen = states.rows_seen if isinstance(states, TrainState) else [state.rows_seen for state in states]
    metrics, seen = _fetched((metrics, seen))
    return [
        {"member": member.name, "tokens": total_rows(seen[i])}
        | {name: float(values[i]) for name, values in metrics.items()}
        for i, member in enumerate(of.members)
    ]
