"""Resampling: features that have fallen silent start again on inputs that are reconstructed badly.

Source: Bricken et al. 2023, "Neuron Resampling" (appendix). For each feature that was silent for the window one input
is drawn, with probability proportional to the square of its reconstruction loss ||x - x_hat||^2 (here without drawing
one input twice, where there are enough): the decoder row becomes (x - b_dec) / ||x - b_dec||, the encoder column the
same direction at 0.2 of the mean norm of the alive encoders, biases and thresholds are as at the start, and the
optimiser's moments of these rows and columns are zero.

Bricken et al. renormalise the input itself; here b_dec is subtracted first. They draw from 819,200 inputs (here from
16,384 by default), and a feature of theirs is resampled if it was silent for 12,500 steps (here for the dead window).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparse_jax.dictionaries.protocol import Dictionary, Params
from sparse_jax.errors import InputError
from sparse_jax.numerics import safe_norm, unit_rows
from sparse_jax.training.state import TrainState
from sparse_jax.training.step import compiled_step

# Of the mean norm of alive encoders: a new feature should not disturb what is learned.
ENCODER_SHARE = 0.2


@dataclass(frozen=True)
class Resampling:
    """When features are resampled.

    Attributes:
        at: shares of the run; the default ones are this library's own choice. Bricken et al. resample four times, after
            25,000, 50,000, 75,000 and 100,000 steps.
        rows: inputs from which new directions are drawn.
    """

    at: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5)
    rows: int = 16_384

    def __post_init__(self):
        object.__setattr__(self, "at", tuple(self.at))
        if not all(0 < share < 1 for share in self.at):
            raise InputError(f"--resample-at {' '.join(map(str, self.at))}: give shares of the run between 0 and 1")
        if self.rows < 1:
            raise InputError(f"rows {self.rows} to resample from: give a positive number")

    def steps(self, total_steps: int) -> frozenset[int]:
        """The numbers of finished steps after which features are resampled."""
        return frozenset(max(1, round(share * total_steps)) for share in self.at)


def feature_axis(dictionary: Dictionary, name: str, shape: tuple[int, ...]) -> int | None:
    """Which axis of a parameter counts features; None for one that has none (b_dec, a scalar)."""
    if name == "W_enc":
        return 1
    if name == "W_dec":
        return 0
    return 0 if shape == (dictionary.n_features,) and name != "b_dec" else None


def make_resample(
    dictionary: Dictionary, dead_window: int, mesh: Mesh | None = None
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]:
    """The compiled `(state, x [rows, d] raw, weight [rows]) -> (state, how many features were resampled)`.

    The old state is consumed. A feature is resampled if it was silent for more than `dead_window` rows; its age is 0
    afterwards. Where no row counts nothing changes. `mesh` as for `make_step`.

    Raises:
        InputError: the dictionary has no decoder rows, or reconstructs something else than its input.
    """
    if dictionary.d_in != dictionary.d_out or "W_dec" not in jax.eval_shape(dictionary.init, jax.random.key(0)):
        raise InputError(
            f"features of this {dictionary.kind} dictionary cannot be resampled: an input is no decoder row of it"
        )

    def resample(state: TrainState, x: jax.Array, weight: jax.Array) -> tuple[TrainState, jax.Array]:
        x = jnp.where(weight[:, None] > 0, state.normaliser.apply(x), 0)
        dead = (state.age > dead_window) & jnp.any(weight > 0)
        # No step draws with this key: `step` is that of a step to come, folded once more.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        centre = state.params.get("b_dec", jnp.zeros((), x.dtype))
        drawn = _draw_inputs(dictionary, state.params, x, weight, dead, key)
        directions = unit_rows(drawn - centre)
        params = _started_again(dictionary, state.params, directions, dead, key)
        return replace(
            state,
            params=params,
            opt_state=_without_moments(dictionary, state.opt_state, dead),
            age=jnp.where(dead, 0, state.age),
        ), jnp.sum(dead, dtype=jnp.int32)

    return compiled_step(resample, mesh)


def _draw_inputs(dictionary, params, x, weight, dead, key) -> jax.Array:
    """`[n_features, d]` an input for each dead feature (something for the others too)."""
    y_hat = dictionary.decode(params, dictionary.encode(params, x), x)
    loss = jnp.sum((y_hat - x) ** 2, axis=-1)
    # The largest log p + Gumbel noise: draws without replacement (Kool et al. 2019).
    log_p = jnp.where(weight > 0, 2 * jnp.log(jnp.maximum(loss, 1e-30)), -jnp.inf)
    order = jnp.argsort(-(log_p + jax.random.gumbel(key, loss.shape)))
    rank = jnp.cumsum(dead.astype(jnp.int32)) - 1
    return x[order[rank % jnp.maximum(jnp.sum(weight > 0, dtype=jnp.int32), 1)]]


def _started_again(dictionary, params: Params, directions, dead, key) -> Params:
    """Parameters with the dead features' parts new."""
    fresh = dictionary.init(key)
    if "W_enc" in params:
        alive = jnp.where(dead, 0, safe_norm(params["W_enc"].T))
        mean = jnp.sum(alive) / jnp.maximum(jnp.sum((~dead).astype(alive.dtype)), 1)
        # With nothing alive there is no norm to go by.
        length = jnp.where(mean > 0, ENCODER_SHARE * mean, 1.0)
        fresh = {**fresh, "W_enc": (length * directions).T}
    fresh = {**fresh, "W_dec": directions}
    return {name: _where(dictionary, name, dead, fresh[name], value) for name, value in params.items()}


def _without_moments(dictionary, opt_state: Any, dead) -> Any:
    """The optimiser's state with zeros for the dead features, wherever it holds something of a parameter's shape."""

    def reset(path, leaf):
        name = next((p.key for p in reversed(path) if isinstance(p, jax.tree_util.DictKey)), None)
        return leaf if name is None else _where(dictionary, name, dead, jnp.zeros_like(leaf), leaf)

    return jax.tree_util.tree_map_with_path(reset, opt_state)


def _where(dictionary, name: str, dead, new, old):
    axis = feature_axis(dictionary, name, old.shape)
    if axis is None:
        return old
    return jnp.where(dead[None, :] if axis == 1 else dead.reshape(-1, *[1] * (old.ndim - 1)), new, old)
