"""The training step: a pure function of state and batch, compiled once, its state donated."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_jax.dictionaries.protocol import Batch, Context, Dictionary
from sparse_jax.training.schedules import Schedule, coefficient, learning_rate
from sparse_jax.training.state import TrainState, count_rows

# Ages stop here: int32 must not wrap.
OLDEST = 2**30


class Optimisation(NamedTuple):
    """How parameters are moved.

    Attributes:
        transform: an Optax chain without a learning rate.
        learning_rate: of the group "main".
        group_rates: learning rates of the other groups that a dictionary labels.
    """

    transform: optax.GradientTransformation
    learning_rate: float
    group_rates: dict[str, float] = {}  # noqa: RUF012  never written to


def adam(rate: float, b1: float = 0.9, b2: float = 0.999, clip: float | None = None) -> Optimisation:
    """Adam (Kingma & Ba 2015), with the gradient's global norm clipped at `clip` if given."""
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    return Optimisation(optax.chain(*chain, optax.scale_by_adam(b1, b2)), rate)


def make_step(
    dictionary: Dictionary, optimisation: Optimisation, schedule: Schedule, total_steps: int, dead_window: int
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict]]:
    """The compiled step `(state, x [rows, d] raw, weight [rows]) -> (state, metrics)`; the old state is consumed.

    Args:
        dictionary: what is trained.
        optimisation: how.
        schedule: multipliers over the run.
        total_steps: length of the run.
        dead_window: a feature that was silent for more rows counts as dead in the metrics.

    Metrics are scalars on the device: loss, each term, fvu of the batch (normalised units), l0, dead (share),
    grad_norm, learning_rate.
    """
    rate_at, coefficient_at = learning_rate(schedule, total_steps), coefficient(schedule, total_steps)
    defaults, labels = dictionary.coefficients, dictionary.labels

    def step(state: TrainState, x: jax.Array, weight: jax.Array) -> tuple[TrainState, dict]:
        x = state.normaliser.apply(x)
        batch = Batch(x, x, weight)
        now = coefficient_at(state.step)
        context = Context(
            coefficients={name: now * value for name, value in defaults.items()},
            age=state.age,
            key=jax.random.fold_in(state.key, state.step),
            step=state.step,
        )
        value, losses, grads = dictionary.value_and_grad(state.params, batch, context)
        grads = dictionary.tangent(state.params, grads)
        # Optax mixes dtypes in its bias corrections; the library's own code does not.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimisation.transform.update(grads, state.opt_state)
        rate = rate_at(state.step)
        moved = {
            name: state.params[name] - rate * group_rate(labels.get(name, "main"), optimisation) * update
            for name, update in updates.items()
        }
        params = dictionary.project({**state.params, **moved, **losses.frozen})
        rows = jnp.sum(weight > 0, dtype=jnp.int32)
        age = jnp.where(losses.fired > 0, 0, jnp.minimum(state.age, OLDEST) + rows)
        metrics = {
            "loss": value,
            **losses.terms,
            "fvu": _batch_fvu(batch, losses.y_hat),
            "l0": jnp.sum(losses.fired) / rows,
            "dead": jnp.mean((age > dead_window).astype(jnp.float32)),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate * optimisation.learning_rate,
        }
        seen = count_rows(state.rows_seen, rows)
        state = replace(state, params=params, opt_state=opt_state, step=state.step + 1, age=age, rows_seen=seen)
        return state, metrics

    return jax.jit(step, donate_argnums=0)


def group_rate(group: str, optimisation: Optimisation) -> float:
    """Peak learning rate of a group of parameters; that of "main" where the group has none of its own."""
    return optimisation.group_rates.get(group, optimisation.learning_rate)


def _batch_fvu(batch: Batch, y_hat: jax.Array) -> jax.Array:
    """FVU within the batch: the variance is taken about the batch's own mean."""
    weight = batch.weight[:, None]
    mean = jnp.sum(batch.target * weight, axis=0) / jnp.maximum(jnp.sum(weight), 1)
    return jnp.sum(weight * (batch.target - y_hat) ** 2) / jnp.sum(weight * (batch.target - mean) ** 2)
