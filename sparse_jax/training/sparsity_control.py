"""Sparsity on target: a controller that moves a sparsity coefficient until the mean L0 is the wished one.

The coefficient is multiplied by exp(u). With e = log(L0 / target), L0 averaged over the last steps, each step does

    u <- u + integral * e + proportional * (e - e_before)

a proportional-integral controller in its velocity form (Astrom & Hagglund 1995): in logarithms, as L0 falls by about a
fixed share where a coefficient rises by a fixed share, whatever the architecture. It starts where the run's coefficient
warm-up ends, or before, as soon as L0 has fallen to the target: some architectures (JumpReLU at a low learning rate)
would not come back from a coefficient that goes on rising. All times are shares of the run.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import Dictionary
from sparse_jax.errors import InputError

# The coefficient stays within this factor of where it began: past it nothing is to be gained.
MOST = 1e4


@dataclass(frozen=True)
class Controller:
    """How firmly L0 is held on its target (which is in the state: `Settings.target_l0`).

    Attributes:
        average: share of the run that the measured L0 is averaged over.
        integral: how far u moves over the whole run for a constant e of 1.
        proportional: how far u moves for a change of e by 1.
    """

    average: float = 0.005
    integral: float = 60.0
    proportional: float = 1.0

    def __post_init__(self):
        for name in ("average", "integral"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} {getattr(self, name)} of a sparsity controller: give a number above 0")
        if not self.proportional >= 0:
            raise InputError(f"proportional {self.proportional} of a sparsity controller: give 0 or more")


def check_target(dictionary: Dictionary, target_l0: float | None) -> None:
    """Check that a dictionary can be held at an L0 (None: no wish).

    Raises:
        InputError: the target is not positive, or the dictionary has no sparsity coefficient that could be moved.
    """
    if target_l0 is None:
        return
    if not target_l0 > 0:
        raise InputError(f"--target-l0 {target_l0}: give a number above 0, or none")
    if dictionary.sparsity_coefficient is None:
        raise InputError(
            f"--target-l0 {target_l0}: a {dictionary.kind} dictionary has no sparsity coefficient to move; "
            "its L0 is set by its own flags"
        )


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
    state: ControlState,
    controller: Controller,
    target_l0: jax.Array,
    l0: jax.Array,
    active: jax.Array,
    total_steps: int,
) -> ControlState:
    """The state after a step.

    Args:
        state: before it.
        controller: how firmly to hold.
        target_l0: the wished L0; 0 or less: none, the coefficient stays as it is.
        l0: mean active features per row in this step.
        active: whether control has begun.
        total_steps: length of the run.
    """
    keep = jnp.exp(-1.0 / jnp.maximum(controller.average * total_steps, 1.0))
    average = jnp.where(state.l0 < 0, l0, keep * state.l0 + (1 - keep) * l0)
    wished = target_l0 > 0
    # With no feature active at all the logarithm would be -inf; a tenth of a feature is as far below as it gets.
    error = jnp.log(jnp.maximum(average, 0.1) / jnp.where(wished, target_l0, 1.0))
    pull = controller.integral / total_steps * error
    change = pull + controller.proportional * (error - state.error)
    moved = state.log_factor + jnp.where(state.error == 0, pull, change)
    bound = math.log(MOST)
    active = active & wished
    return ControlState(
        jnp.where(active, jnp.clip(moved, -bound, bound), state.log_factor), average, jnp.where(active, error, 0.0)
    )
