"""How well activations are reconstructed: FVU, explained variance, shrinkage.

Every measure here is a ratio of sums over tokens. The sums of a batch are made on the device, added up in float64 on
the host, and divided once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ReconstructionSums(NamedTuple):
    """Sums over the tokens that count; they add up over batches.

    Attributes:
        tokens: how many tokens count.
        error: sum of ||x - x_hat||^2.
        x: `[d]` sum of x - shift.
        x_squared: sum of ||x - shift||^2.
        y_squared: sum of ||x_hat - shift||^2.
        x_dot_y: sum of (x - shift) . (x_hat - shift).
    """

    tokens: jax.Array
    error: jax.Array
    x: jax.Array
    x_squared: jax.Array
    y_squared: jax.Array
    x_dot_y: jax.Array


def reconstruction_sums(x: jax.Array, x_hat: jax.Array, weight: jax.Array, shift: jax.Array) -> ReconstructionSums:
    """Sums for one batch.

    Args:
        x, x_hat: `[tokens, d]` raw activations and their reconstruction.
        weight: `[tokens]` 1 where the token counts, else 0.
        shift: `[d]` anything near the mean of x, the same for every batch: without it the variance would be a small
            difference of large float32 sums.
    """
    weighted, y = (x - shift) * weight[:, None], (x_hat - shift) * weight[:, None]
    return ReconstructionSums(
        tokens=jnp.sum(weight > 0, dtype=jnp.int32),
        error=jnp.sum((weighted - y) ** 2),
        x=jnp.sum(weighted, axis=0),
        x_squared=jnp.sum(weighted**2),
        y_squared=jnp.sum(y**2),
        x_dot_y=jnp.sum(weighted * y),
    )


def fvu(sums: ReconstructionSums) -> float:
    """Fraction of variance unexplained: sum (x - x_hat)^2 / sum (x - mean x)^2, over tokens and dimensions.

    0 is perfect, predicting the mean gives 1. x = [[2,0],[0,4]] with x_hat = [[2,1],[0,3]] gives 0.2.
    """
    spread = float(sums.x_squared) - float((sums.x**2).sum()) / float(sums.tokens)
    return float(sums.error) / spread


def explained_variance(sums: ReconstructionSums) -> float:
    """1 - FVU."""
    return 1.0 - fvu(sums)


def shrinkage(sums: ReconstructionSums) -> float:
    """Relative reconstruction bias: E||x_hat||^2 / E[x_hat . x], both taken about the training mean.

    1 is unbiased; below 1 the reconstruction is systematically too short, as an l1 penalty makes it: dividing x_hat
    by this number would minimise the squared error.

    Source: Rajamanoharan et al. 2024 (Gated SAEs), eq. 10.
    """
    return float(sums.y_squared) / float(sums.x_dot_y)
