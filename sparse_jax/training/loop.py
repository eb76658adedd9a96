"""The loop: blocks of activations through the step, with logs, checkpoints and a way to stop in between."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from jax import lax

from sparse_jax.activations.blocks import Block, Blocks, RememberedBlocks
from sparse_jax.errors import InputError
from sparse_jax.training.checkpoints import Checkpoints
from sparse_jax.training.state import TrainState, total_rows


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


def run(
    state: TrainState,
    step: Callable,
    blocks: Blocks | RememberedBlocks,
    pace: Pace,
    *,
    log: Callable[[dict], None],
    checkpoints: Checkpoints | None,
    after_step: Callable[[TrainState, Block, int], TrainState] = lambda state, block, done: state,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> TrainState:
    """Take steps until `pace.total`, or until `should_stop()`; a checkpoint is saved at the end either way.

    The position in the data is the state's own step: step i takes batch i modulo the batches of a block, of block
    i // that number.

    Args:
        log: gets {"step", "tokens", metrics...}, as Python numbers.
        after_step: gets the state, the block of activations at hand and the number of steps taken, and returns the
            state to go on with; called before a checkpoint is saved.
        progress: gets the number of tokens of each finished step.

    Raises:
        InputError: activations or the loss are not finite (said where); nothing is saved then.
    """
    per_block = blocks.tokens_per_block // pace.batch
    start = int(state.step)
    block = None
    for number in range(start, pace.total):
        if should_stop():
            break
        index, offset = divmod(number, per_block)
        if block is None or offset == 0:
            block = blocks[index]
        x, weight = _slice(block.x, block.weight, offset * pace.batch, pace.batch)
        state, metrics = step(state, x, weight)
        progress(pace.batch)
        done = number + 1
        state = after_step(state, block, done)
        if done % pace.log_every == 0 or done == pace.total or number == start:
            row = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if row["loss"] != row["loss"] or abs(row["loss"]) == float("inf"):
                raise InputError(
                    f"the loss is {row['loss']} at step {done}: lower the learning rate or the coefficients"
                )
            log({"step": done, "tokens": total_rows(jax.device_get(state.rows_seen)), **row})
        if checkpoints and done % pace.checkpoint_every == 0 and done < pace.total:
            checkpoints.save(state)
    if checkpoints:
        checkpoints.save(state)
    return state


@partial(jax.jit, static_argnums=3)
def _slice(x: jax.Array, weight: jax.Array, start: int, size: int) -> tuple[jax.Array, jax.Array]:
    return lax.dynamic_slice_in_dim(x, start, size), lax.dynamic_slice_in_dim(weight, start, size)
