"""The training step: a pure function of state and batch, compiled once, its state donated."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax.dictionaries.protocol import Batch, Context, Dictionary
from sparse_jax.errors import InputError
from sparse_jax.training.schedules import Schedule, coefficients, learning_rate
from sparse_jax.training.sparsity_control import SparsityTarget, control
from sparse_jax.training.state import TrainState, count_rows

# Ages stop here: int32 must not wrap.
OLDEST = 2**30


class Optimisation(NamedTuple):
    """How parameters are moved.

    Attributes:
        transform: an Optax chain without a learning rate.
        learning_rate: of the group "main".
        group_rates: learning rates of the other groups that a dictionary labels, in place of its own choice.
    """

    transform: optax.GradientTransformation
    learning_rate: float
    group_rates: dict[str, float] = {}  # noqa: RUF012  never written to


def adam(rate: float, b1: float = 0.9, b2: float = 0.999, clip: float | None = None) -> Optimisation:
    """Adam (Kingma & Ba 2015), with the gradient's global norm clipped at `clip` if given."""
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    return Optimisation(optax.chain(*chain, optax.scale_by_adam(b1, b2)), rate)


def make_step(
    dictionary: Dictionary,
    optimisation: Optimisation,
    schedule: Schedule,
    total_steps: int,
    dead_window: int,
    target: SparsityTarget = SparsityTarget(),  # noqa: B008  frozen
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict]]:
    """The compiled step `(state, x [rows, d] raw, weight [rows]) -> (state, metrics)`; the old state is consumed.

    Args:
        dictionary: what is trained.
        optimisation: how.
        schedule: multipliers over the run.
        total_steps: length of the run.
        dead_window: a feature that was silent for more rows counts as dead in the metrics.
        target: the L0 at which the dictionary's sparsity coefficient is to hold it, if any.

    Raises:
        InputError: a target for a dictionary without a sparsity coefficient.

    Metrics are scalars on the device: loss, each term, fvu of the batch (normalised units), l0, dead (share),
    grad_norm, learning_rate, and with a target the coefficient that holds it.
    """
    check_target(dictionary, target)
    moved_by_control = dictionary.sparsity_coefficient if target.l0 is not None else None
    rate_at, coefficients_at = learning_rate(schedule, total_steps), coefficients(dictionary, schedule, total_steps)

    def step(state: TrainState, x: jax.Array, weight: jax.Array) -> tuple[TrainState, dict]:
        x = state.normaliser.apply(x)
        batch = Batch(x, x, weight)
        context = Context(
            coefficients=with_factor(coefficients_at(state.step), moved_by_control, state.control.log_factor),
            age=state.age,
            key=jax.random.fold_in(state.key, state.step),
            step=state.step,
            dead_window=jnp.array(dead_window, jnp.int32),
        )
        value, losses, grads = dictionary.value_and_grad(state.params, batch, context)
        grads = dictionary.tangent(state.params, grads)
        # Optax mixes dtypes in its bias corrections; the library's own code does not.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimisation.transform.update(grads, state.opt_state)
        rate = rate_at(state.step)
        moved = {
            name: state.params[name] - rate * rate_of(dictionary, name, optimisation) * update
            for name, update in updates.items()
        }
        params = dictionary.project({**state.params, **moved, **losses.frozen})
        rows = jnp.sum(weight > 0, dtype=jnp.int32)
        l0 = jnp.sum(losses.fired) / jnp.maximum(rows, 1)
        begun = state.step >= round(schedule.coefficient_warmup * total_steps)
        age = jnp.where(losses.fired > 0, 0, jnp.minimum(state.age, OLDEST) + rows)
        metrics = {
            "loss": value,
            **losses.terms,
            "fvu": _batch_fvu(batch, losses.y_hat),
            "l0": l0,
            "dead": jnp.mean((age > dead_window).astype(jnp.float32)),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate * optimisation.learning_rate,
            **({} if moved_by_control is None else {"coefficient": context.coefficients[moved_by_control]}),
        }
        seen = count_rows(state.rows_seen, rows)
        state = replace(
            state,
            params=params,
            opt_state=opt_state,
            step=state.step + 1,
            age=age,
            rows_seen=seen,
            control=control(state.control, target, l0, begun, total_steps),
        )
        return state, metrics

    return jax.jit(step, donate_argnums=0)


def check_target(dictionary: Dictionary, target: SparsityTarget) -> None:
    """Raises InputError for a target where the dictionary has no sparsity coefficient that could be moved."""
    if target.l0 is not None and dictionary.sparsity_coefficient is None:
        raise InputError(
            f"--target-l0 {target.l0}: a {dictionary.kind} dictionary has no sparsity coefficient to move; "
            "its L0 is set by its own flags"
        )


def with_factor(values: dict[str, jax.Array], name: str | None, log_factor: jax.Array) -> dict[str, jax.Array]:
    """The coefficients with the one called `name` multiplied by exp(log_factor)."""
    return values if name is None else {**values, name: values[name] * jnp.exp(log_factor)}


def rate_of(dictionary: Dictionary, name: str, optimisation: Optimisation) -> float:
    """Peak learning rate of a parameter: its group's where one was given, else the dictionary's share of "main"."""
    group = dictionary.labels.get(name, "main")
    factor = dictionary.group_factors.get(group, 1.0)
    return optimisation.group_rates.get(group, factor * optimisation.learning_rate)


def _batch_fvu(batch: Batch, y_hat: jax.Array) -> jax.Array:
    """FVU within the batch: the variance is taken about the batch's own mean."""
    weight = batch.weight[:, None]
    mean = jnp.sum(batch.target * weight, axis=0) / jnp.maximum(jnp.sum(weight), 1)
    return jnp.sum(weight * (batch.target - y_hat) ** 2) / jnp.sum(weight * (batch.target - mean) ** 2)
