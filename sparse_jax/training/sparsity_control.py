"""Sparsity on target: a controller that moves a sparsity coefficient until the mean L0 is the wished one.

The coefficient is multiplied by exp(u). With e = log(L0 / target), L0 averaged over the last steps, each step does

    u <- u + integral * e + proportional * (e - e_before)

a proportional-integral controller in its velocity form (Astrom & Hagglund 1995, ch. 3): in logarithms, as L0 falls by
about a fixed share where a coefficient rises by a fixed share, whatever the architecture. It starts where the
coefficient's warm-up ends. All times are shares of the run, so that a short run is controlled like a long one.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError

# The coefficient stays within this factor of where it began: past it nothing is to be gained.
MOST = 1e4


@dataclass(frozen=True)
class SparsityTarget:
    """What L0 is to be held at, and how firmly.

    Attributes:
        l0: the wished mean number of active features; None: the coefficient stays as it is given.
        average: share of the run that the measured L0 is averaged over.
        integral: how far u moves over the whole run for a constant e of 1.
        proportional: how far u moves for a change of e by 1.
    """

    l0: float | None = None
    average: float = 0.005
    integral: float = 25.0
    proportional: float = 0.3

    def __post_init__(self):
        if self.l0 is not None and not self.l0 > 0:
            raise InputError(f"--target-l0 {self.l0}: give a number above 0, or none")
        for name in ("average", "integral"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} {getattr(self, name)} of a sparsity target: give a number above 0")
        if not self.proportional >= 0:
            raise InputError(f"proportional {self.proportional} of a sparsity target: give 0 or more")


class ControlState(NamedTuple):
    """What the controller carries from step to step, float32 scalars.

    Attributes:
        log_factor: u; the coefficient is multiplied by its exponential.
        l0: the averaged L0; negative before the first step.
        error: log(l0 / target) of the step before; 0 before control begins.
    """

    log_factor: jax.Array
    l0: jax.Array
    error: jax.Array


def init_control() -> ControlState:
    """The state before the first step."""
    # Dtypes are given: a weak one would compile the step a second time. Three buffers: the step consumes each.
    return ControlState(*(jnp.full((), value, jnp.float32) for value in (0.0, -1.0, 0.0)))


def control(
    state: ControlState, target: SparsityTarget, l0: jax.Array, active: jax.Array, total_steps: int
) -> ControlState:
    """The state after a step.

    Args:
        state: before it.
        target: what is wished.
        l0: mean active features per row in this step.
        active: whether control has begun.
        total_steps: length of the run.
    """
    keep = jnp.exp(-1.0 / jnp.maximum(target.average * total_steps, 1.0))
    average = jnp.where(state.l0 < 0, l0, keep * state.l0 + (1 - keep) * l0)
    if target.l0 is None:
        return state._replace(l0=average)
    # With no feature active at all the logarithm would be -inf; a tenth of a feature is as far below as it gets.
    error = jnp.log(jnp.maximum(average, 0.1) / target.l0)
    change = target.integral / total_steps * error + target.proportional * (error - state.error)
    first = state.error == 0
    moved = state.log_factor + jnp.where(first, target.integral / total_steps * error, change)
    bound = math.log(MOST)
    return ControlState(
        jnp.where(active, jnp.clip(moved, -bound, bound), state.log_factor), average, jnp.where(active, error, 0.0)
    )
