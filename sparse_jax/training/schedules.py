"""Schedules over a run's steps, as multipliers: learning-rate warm-up and decay, coefficient warm-up.

All lengths are shares of the run, so that a short run goes through the same phases as a long one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import Dictionary, Ramp
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
    coefficient_warmup: float = 0.25

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a share from 0 to 1")
        if self.lr_warmup + self.lr_decay > 1:
            raise InputError(f"--lr-warmup {self.lr_warmup} + --lr-decay {self.lr_decay} exceed the whole run")


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


def coefficients(
    dictionary: Dictionary, schedule: Schedule, total_steps: int
) -> Callable[[jax.Array, dict[str, jax.Array]], dict[str, jax.Array]]:
    """(step, peak values) -> the dictionary's coefficients, each on its ramp; ramps are static, values traced."""
    ramps = {name: dictionary.ramps.get(name, Ramp(0.0)) for name in dictionary.coefficients}

    def at(step, peaks):
        step = jnp.asarray(step, jnp.float32)
        return {name: _on_ramp(ramp, peaks[name], schedule, total_steps, step) for name, ramp in ramps.items()}

    return at


def _on_ramp(ramp: Ramp, peak: jax.Array, schedule: Schedule, total_steps: int, step: jax.Array) -> jax.Array:
    peak = jnp.asarray(peak, jnp.float32)
    if ramp.start is None:
        return peak
    first = round(ramp.begin * total_steps)
    length = max(1, round((schedule.coefficient_warmup if ramp.end is None else ramp.end) * total_steps) - first)
    # Step 0 of a warm-up has a part of the value already.
    share = jnp.clip((step + 1 - first) / length, 0.0, 1.0)
    return ramp.start + share * (peak - ramp.start)
