"""The training step: a pure function of state and batch, compiled once, its state donated."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sparse_jax.dictionaries.protocol import Batch, Context, Dictionary, Losses, Params
from sparse_jax.training.accumulation import WHOLE, Chunks, gradient_of
from sparse_jax.training.mesh_step import OnMesh
from sparse_jax.training.offload import check_host_memory
from sparse_jax.training.schedules import Schedule, coefficients, learning_rate
from sparse_jax.training.sparsity_control import Controller, control
from sparse_jax.training.state import TrainState, count_rows

# Ages stop here: int32 must not wrap.
OLDEST = 2**30


class Optimisation(NamedTuple):
    """How parameters are moved.

    Attributes:
        transform: an Optax chain without a learning rate.
        learning_rate: of the group "main", where the settings do not say otherwise (see `settings_for`).
        group_rates: learning rates of the other groups that a dictionary labels, in place of its own choice.
    """

    transform: optax.GradientTransformation
    learning_rate: float
    group_rates: dict[str, float] = {}  # noqa: RUF012  never written to


def adam(rate: float, b1: float = 0.9, b2: float = 0.999, clip: float | None = None) -> Optimisation:
    """Adam (Kingma & Ba 2015), with the gradient's global norm clipped at `clip` if given."""
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    return Optimisation(optax.chain(*chain, optax.scale_by_adam(b1, b2)), rate)


# (state, x [rows, d] raw, weight [rows]) -> (state, metrics)
Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


class Moved(NamedTuple):
    """What an update makes of a batch.

    Attributes:
        value: the objective, before parameters moved.
        losses: its terms and what goes with them.
        params, opt_state: after the update.
        restarted: `[n_features]` bool, features that begin anew: their age is 0. None: none did.
        metrics: what is to be logged of it, scalars.
    """

    value: jax.Array
    losses: Losses
    params: Params
    opt_state: Any
    restarted: jax.Array | None
    metrics: dict[str, jax.Array]


# (state, batch, context, the schedule's multiplier of learning rates) -> Moved
Update = Callable[[TrainState, Batch, Context, jax.Array], Moved]


def by_gradient(dictionary: Dictionary, optimisation: Optimisation, chunks: Chunks = WHOLE) -> Update:
    """The update that follows the gradient of the dictionary's objective."""
    value_and_grad = gradient_of(dictionary, chunks)

    def update(state: TrainState, batch: Batch, ctx: Context, scheduled: jax.Array) -> Moved:
        value, losses, grads = value_and_grad(state.params, batch, ctx)
        grads = dictionary.tangent(state.params, grads)
        params, opt_state = _moved(dictionary, optimisation, state, grads, losses.frozen, scheduled)
        metrics = {"grad_norm": optax.tree.norm(grads), "learning_rate": scheduled * state.settings.learning_rate}
        return Moved(value, losses, params, opt_state, None, metrics)

    return update


def make_step(
    dictionary: Dictionary,
    optimisation: Optimisation,
    schedule: Schedule,
    total_steps: int,
    dead_window: int,
    controller: Controller = Controller(),  # noqa: B008  frozen
    mesh: Mesh | None = None,
    chunks: Chunks = WHOLE,
    offload: bool = False,
) -> Step:
    """The compiled step `(state, x [rows, d] raw, weight [rows]) -> (state, metrics)`; the old state is consumed.

    Peak values of coefficients, the learning rate of the group "main" and the wished L0 are those of the state's
    settings; their schedules are static.

    Args:
        dictionary: what is trained.
        optimisation: how; its own `learning_rate` is not read here.
        schedule: multipliers over the run.
        total_steps: length of the run.
        dead_window: a feature that was silent for more rows counts as dead in the metrics.
        controller: how firmly the state's target L0 is held, if it has one.
        mesh: devices that share the work (mesh.py); give the step a state that `place` has laid out over it.
        chunks: how a batch is cut for less memory at a time (accumulation.py).
        offload: the optimiser's moments stay in the host's memory between steps (offload.py); on a mesh only.

    Raises:
        InputError: moments are to be offloaded and cannot be; when called, a batch that cannot be cut so.

    Metrics are scalars on the device: loss, each term, fvu of the batch (normalised units), l0, dead (share),
    grad_norm, learning_rate, and of a dictionary whose L0 can be held the coefficient that holds it.
    """
    function = step_function(dictionary, optimisation, schedule, total_steps, dead_window, controller, chunks)
    return compiled_step(function, mesh, offload=offload)


def compiled_step(
    function: Callable, mesh: Mesh | None = None, members: bool = False, offload: bool = False
) -> Callable:
    """A function of state, x and weight compiled for one device or, where a mesh is given, for that; state donated."""
    if mesh is None and offload:
        check_host_memory(mesh)
    return jax.jit(function, donate_argnums=0) if mesh is None else OnMesh(function, mesh, members, offload)


def step_function(
    dictionary: Dictionary,
    optimisation: Optimisation,
    schedule: Schedule,
    total_steps: int,
    dead_window: int,
    controller: Controller = Controller(),  # noqa: B008  frozen
    chunks: Chunks = WHOLE,
) -> Step:
    """`make_step`'s function before it is compiled."""
    update = by_gradient(dictionary, optimisation, chunks)
    return stepping(update, dictionary, schedule, total_steps, dead_window, controller)


def stepping(
    update: Update,
    dictionary: Dictionary,
    schedule: Schedule,
    total_steps: int,
    dead_window: int,
    controller: Controller = Controller(),  # noqa: B008  frozen
) -> Step:
    """What every step does around an update: normalise, schedule, hold L0, count."""
    rate_at, coefficients_at = learning_rate(schedule, total_steps), coefficients(dictionary, schedule, total_steps)
    held = dictionary.sparsity_coefficient
    control_begins = round(schedule.coefficient_warmup * total_steps)
    # Features that are silent at the very start are not the coefficient's doing.
    may_begin = min(control_begins, max(1, round(schedule.lr_warmup * total_steps)))

    def step(state: TrainState, x: jax.Array, weight: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        x = state.normaliser.apply(x)
        batch = Batch(x, x, weight)
        values = coefficients_at(state.step, state.settings.coefficients)
        values = with_factor(values, held, state.control.log_factor)
        moved = update(state, batch, _context(state, values, dead_window), rate_at(state.step))
        losses = moved.losses
        rows = jnp.sum(weight > 0, dtype=jnp.int32)
        l0 = jnp.sum(losses.fired) / jnp.maximum(rows, 1)
        begun_anew = losses.fired > 0 if moved.restarted is None else (losses.fired > 0) | moved.restarted
        age = jnp.where(begun_anew, 0, jnp.minimum(state.age, OLDEST) + rows)
        fallen = (state.step >= may_begin) & (state.control.l0 >= 0) & (state.control.l0 < state.settings.target_l0)
        begun = (state.step >= control_begins) | fallen
        metrics = {
            "loss": moved.value,
            **losses.terms,
            "fvu": _batch_fvu(batch, losses.y_hat),
            "l0": l0,
            "dead": jnp.mean((age > dead_window).astype(jnp.float32)),
            **moved.metrics,
            **({} if held is None else {"coefficient": values[held]}),
        }
        state = replace(
            state,
            params=moved.params,
            opt_state=moved.opt_state,
            step=state.step + 1,
            age=age,
            rows_seen=count_rows(state.rows_seen, rows),
            control=control(state.control, controller, state.settings.target_l0, l0, begun, total_steps),
        )
        return state, metrics

    return step


def _context(state: TrainState, values: dict[str, jax.Array], dead_window: int) -> Context:
    """What the loss may depend on in this step, `values` being the coefficients as they stand now."""
    return Context(
        coefficients=values,
        age=state.age,
        key=jax.random.fold_in(state.key, state.step),
        step=state.step,
        dead_window=jnp.array(dead_window, jnp.int32),
    )


def _moved(
    dictionary: Dictionary, optimisation: Optimisation, state: TrainState, grads: Params, frozen: Params, scheduled
) -> tuple[Params, Any]:
    """(parameters, optimiser's state) after a step, at peak rates times `scheduled`."""
    # Optax mixes dtypes in its bias corrections; the library's own code does not.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimisation.transform.update(grads, state.opt_state)
    peak = state.settings.learning_rate
    moved = {
        name: state.params[name] - scheduled * rate_of(dictionary, name, optimisation.group_rates, peak) * update
        for name, update in updates.items()
    }
    return dictionary.project({**state.params, **moved, **frozen}), opt_state


def with_factor(values: dict[str, jax.Array], name: str | None, log_factor: jax.Array) -> dict[str, jax.Array]:
    """The coefficients with the one called `name` multiplied by exp(log_factor)."""
    return values if name is None else {**values, name: values[name] * jnp.exp(log_factor)}


def rate_of(dictionary: Dictionary, name: str, group_rates: dict[str, float], learning_rate: Any) -> Any:
    """Peak learning rate of a parameter: its group's where one was given, else the dictionary's share of "main"'s."""
    group = dictionary.labels.get(name, "main")
    factor = dictionary.group_factors.get(group, 1.0)
    return group_rates.get(group, factor * learning_rate)


def _batch_fvu(batch: Batch, y_hat: jax.Array) -> jax.Array:
    """FVU within the batch: the variance is taken about the batch's own mean."""
    weight = batch.weight[:, None]
    mean = jnp.sum(batch.target * weight, axis=0) / jnp.maximum(jnp.sum(weight), 1)
    return jnp.sum(weight * (batch.target - y_hat) ** 2) / jnp.sum(weight * (batch.target - mean) ** 2)
