"""The normaliser: a centre and one scale, estimated once from training rows and saved with the dictionary."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.errors import InputError

Rule = Literal["centre-scale", "scale", "none"]


@partial(jax.tree_util.register_dataclass, data_fields=["centre", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Normaliser:
    """x -> (x - centre) / scale.

    Attributes:
        centre: `[d]`.
        scale: scalar, one for all dimensions, so that angles and the FVU are those of the raw activations.
    """

    centre: jax.Array
    scale: jax.Array

    def apply(self, x: jax.Array) -> jax.Array:
        """Raw activations `[..., d]` to normalised ones."""
        return (x - self.centre) / self.scale

    def undo(self, x: jax.Array) -> jax.Array:
        """Normalised activations `[..., d]` to raw ones."""
        return x * self.scale + self.centre


def fit_normaliser(rule: Rule, mean: np.ndarray, variance: float) -> Normaliser:
    """The normaliser after which E||x||^2 = d.

    Args:
        rule: "centre-scale" subtracts the mean first, "scale" does not, "none" is the identity.
        mean: `[d]` mean of training activations.
        variance: mean of ||x - mean||^2 over training activations.

    Raises:
        InputError: an unknown rule, or activations that do not vary.
    """
    d = mean.shape[0]
    if rule not in ("centre-scale", "scale", "none"):
        raise InputError(f"--normalise {rule!r}: choose centre-scale, scale or none")
    mean_power = float(np.sum(np.asarray(mean, np.float64) ** 2))
    # Below this a spread is what rounding to float32 leaves of a constant.
    if not variance > 1e-12 * mean_power:
        raise InputError("the activations are the same on every token; there is nothing to learn at this site")
    if rule == "none":
        return Normaliser(jnp.zeros(d, jnp.float32), jnp.ones((), jnp.float32))
    power = variance if rule == "centre-scale" else variance + mean_power
    centre = mean if rule == "centre-scale" else np.zeros(d)
    return Normaliser(jnp.array(centre, jnp.float32), jnp.array(np.sqrt(power / d), jnp.float32))
