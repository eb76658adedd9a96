"""Schedules over a run's steps, as multipliers: learning-rate warm-up and decay, coefficient warm-up.

All lengths are shares of the run, so that a short run goes through the same phases as a long one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError

# step -> multiplier, as an Optax schedule is.
Multiplier = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Schedule:
    """Shares of the run.

    Attributes:
        lr_warmup: the learning rate rises linearly from 0 over this share.
        lr_decay: it falls linearly to 0 over this last share.
        coefficient_warmup: sparsity coefficients rise linearly from 0 over this share.
    """

    lr_warmup: float = 0.02
    lr_decay: float = 0.2
    coefficient_warmup: float = 0.05

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--schedule.{name.replace('_', '-')} {getattr(self, name)}: give a share from 0 to 1")
        if self.lr_warmup + self.lr_decay > 1:
            raise InputError(f"lr-warmup {self.lr_warmup} + lr-decay {self.lr_decay} exceed the whole run")


def learning_rate(schedule: Schedule, total_steps: int) -> Multiplier:
    """step -> multiplier of the learning rate, in (0, 1]; step 0 already moves."""
    warmup = max(1, round(schedule.lr_warmup * total_steps))
    decay = max(1, round(schedule.lr_decay * total_steps))

    def multiplier(step):
        step = jnp.asarray(step, jnp.float32)
        up = jnp.minimum(1.0, (step + 1) / warmup)
        down = jnp.minimum(1.0, (total_steps - step) / decay)
        return jnp.minimum(up, down)

    return multiplier


def coefficient(schedule: Schedule, total_steps: int) -> Multiplier:
    """step -> multiplier of the sparsity coefficients, in (0, 1]."""
    warmup = max(1, round(schedule.coefficient_warmup * total_steps))
    return lambda step: jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1) / warmup)
