"""How sparse codes are: L0, L1, and how often each feature fires."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A feature that fires on a smaller share of tokens than RARE, or a larger than DENSE, is counted apart.
RARE, DENSE = 1e-5, 0.1


class SparsitySums(NamedTuple):
    """Sums over the tokens that count; they add up over batches.

    Attributes:
        tokens: how many tokens count.
        l1: sum over tokens of sum_i |c_i| ||d_i||, raw units.
        fired: `[n_features]` on how many tokens each feature is not zero.
    """

    tokens: jax.Array
    l1: jax.Array
    fired: jax.Array


def sparsity_sums(codes: jax.Array, weight: jax.Array, lengths: jax.Array) -> SparsitySums:
    """Sums for one batch.

    Args:
        codes: `[tokens, n_features]`.
        weight: `[tokens]` 1 where the token counts, else 0.
        lengths: `[n_features]` raw length of each feature's direction.
    """
    counts = (weight > 0)[:, None]
    return SparsitySums(
        tokens=jnp.sum(counts, dtype=jnp.int32),
        l1=jnp.sum(jnp.where(counts, jnp.abs(codes), 0) * lengths),
        fired=jnp.sum((codes != 0) & counts, axis=0, dtype=jnp.int32),
    )


def l0(sums: SparsitySums) -> float:
    """Mean number of active features per token."""
    return float(sums.fired.sum()) / float(sums.tokens)


def l1(sums: SparsitySums) -> float:
    """Mean over tokens of sum_i |c_i| ||d_i||, in raw units."""
    return float(sums.l1) / float(sums.tokens)


def density(sums: SparsitySums) -> np.ndarray:
    """`[n_features]` share of tokens on which each feature fires."""
    return np.asarray(sums.fired, np.float64) / float(sums.tokens)


def density_shares(sums: SparsitySums) -> dict[str, float]:
    """Shares of features that never fire (dead), fire on fewer than 1e-5 of tokens, or on more than 0.1 of them."""
    shares = density(sums)
    return {
        "dead_fraction": float(np.mean(shares == 0)),
        "rare_fraction": float(np.mean(shares < RARE)),
        "dense_fraction": float(np.mean(shares > DENSE)),
    }
