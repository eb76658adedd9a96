"""Basis updates in place of gradients: the step of a FISTA dictionary whose atoms a learner moves (`coding/learn.py`).

    codes are solved -> the learner moves W_dec -> atoms that were silent for the dead window start again (`refresh`)

b_dec stays where it was started. Everything around it (normaliser, schedules, the controller of L0, counts,
checkpoints) is as in any other training.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparse_jax.coding.learn import Learner, refresh
from sparse_jax.dictionaries.fista import Fista
from sparse_jax.dictionaries.protocol import Batch, Context, Params
from sparse_jax.training.schedules import Schedule
from sparse_jax.training.sparsity_control import Controller
from sparse_jax.training.state import TrainState
from sparse_jax.training.step import Moved, Step, Update, compiled_step, stepping


class LearnerAsOptimiser(NamedTuple):
    """A learner where a state's optimiser is asked for: `init_state(dictionary, LearnerAsOptimiser(learner), ...)`."""

    learner: Learner

    def init(self, trained: Params) -> Any:
        """The learner's state for W_dec."""
        return {"W_dec": self.learner.init(trained["W_dec"])}


def frozen() -> Learner:
    """The learner that leaves atoms as they are: only the penalty moves, to hold L0."""
    return Learner(lambda W: (), lambda state, W, x, codes, weight: (state, W), lambda state, which: state)


def by_learner(dictionary: Fista, learner: Learner, restart_dead: bool = True) -> Update:
    """The update that a learner makes with solved codes."""

    def update(state: TrainState, batch: Batch, ctx: Context, scheduled: jax.Array) -> Moved:
        params, penalty = state.params, ctx.coefficients["l1"]
        codes = dictionary.training_codes(params, batch, penalty)
        losses = dictionary.losses(params, batch, penalty, codes)
        target = jnp.where(batch.weight[:, None] > 0, dictionary.centred(params, batch.x), 0)
        opt_state, W = learner.update(state.opt_state["W_dec"], params["W_dec"], target, codes, batch.weight)
        dead = (ctx.age > ctx.dead_window) & (losses.fired == 0) & restart_dead
        # The codes are those of the atoms before the update, which are near enough to say what is left.
        W, opt_state = jax.lax.cond(
            jnp.any(dead),
            lambda: (refresh(W, dead, target, codes, batch.weight, ctx.key), learner.reset(opt_state, dead)),
            lambda: (W, opt_state),
        )
        moved = jnp.sqrt(jnp.sum((W - params["W_dec"]) ** 2))
        params = params | {"W_dec": W} | losses.frozen
        metrics = {"moved": moved, "refreshed": jnp.sum(dead, dtype=jnp.int32)}
        return Moved(sum(losses.terms.values()), losses, params, {"W_dec": opt_state}, dead, metrics)

    return update


def make_basis_step(
    dictionary: Fista,
    learner: Learner,
    schedule: Schedule,
    total_steps: int,
    dead_window: int,
    controller: Controller = Controller(),  # noqa: B008  frozen
    restart_dead: bool = True,
    mesh: Mesh | None = None,
) -> Step:
    """As `make_step`, with a learner in place of an optimiser; the schedule of learning rates does not matter to it.

    Metrics have "moved" (the Frobenius norm of what W_dec moved) and "refreshed" (atoms that started again) in place of
    "grad_norm" and "learning_rate".
    """
    update = by_learner(dictionary, learner, restart_dead)
    return compiled_step(stepping(update, dictionary, schedule, total_steps, dead_window, controller), mesh)
