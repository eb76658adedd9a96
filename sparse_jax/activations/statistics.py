"""Mean, covariance, norms and per-token means of activations, from one pass over a stated sample of training blocks.

Sums of a block come from the device in float32, of activations shifted by the first block's mean so that nothing
cancels; they are added up in float64 on the host.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.blocks import Block, Blocks, RememberedBlocks
from sparse_jax.errors import InputError


@dataclass(frozen=True)
class Statistics:
    """What the normaliser and the floors are fitted from. All arrays float64 unless said.

    Attributes:
        tokens: how many tokens counted.
        mean: `[d]`.
        covariance: `[d, d]`.
        median_norm: median of ||x|| over the first block's tokens that counted.
        token_sum: `[vocab, d]` float32, sum of the activations of each token id.
        token_count: `[vocab]` int64.
    """

    tokens: int
    mean: np.ndarray
    covariance: np.ndarray
    median_norm: float
    token_sum: np.ndarray
    token_count: np.ndarray

    @property
    def variance(self) -> float:
        """Mean of ||x - mean||^2."""
        return float(np.trace(self.covariance))

    @property
    def token_mean(self) -> np.ndarray:
        """`[vocab, d]` float32: mean activation of each token id; the overall mean for ids that were not seen."""
        seen = self.token_count[:, None]
        means = np.where(seen > 0, self.token_sum / np.maximum(seen, 1), self.mean)
        return means.astype(np.float32)

    def save(self, path: Path) -> None:
        """Write as `.npz`, whole or not at all."""
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **{name: getattr(self, name) for name in self.__dataclass_fields__})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote."""
        with np.load(path) as saved:
            fields = {name: saved[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "tokens": int(fields["tokens"]), "median_norm": float(fields["median_norm"])})


@partial(jax.jit, static_argnames=("vocab",))
def _sums(block: Block, shift: jax.Array, vocab: int):
    x = (block.x - shift) * block.weight[:, None]
    by_token = jnp.zeros((vocab, x.shape[1]), jnp.float32).at[block.token].add(x)
    counts = jnp.zeros(vocab, jnp.int32).at[block.token].add((block.weight > 0).astype(jnp.int32))
    return jnp.sum(x, axis=0), x.T @ x, by_token, counts


def collect_statistics(blocks: Blocks | RememberedBlocks, n_blocks: int) -> Statistics:
    """Statistics of blocks 0 to `n_blocks - 1`: the first that training will see.

    Raises:
        InputError: no token counts (the mask drops them all), or an activation is not finite.
    """
    vocab = blocks.lm.config.vocab_size
    totals = None
    for index in range(n_blocks):
        block = blocks[index]
        if totals is None:
            counted = np.asarray(block.weight) > 0
            if not counted.any():
                raise InputError("the mask drops every token of the first block; see --skip-positions and --context")
            x = np.asarray(block.x)[counted]
            shift, median_norm = x.mean(axis=0), float(np.median(np.linalg.norm(x, axis=1)))
            device_shift = jnp.array(shift)
            totals = [0.0, 0.0, 0.0, np.zeros(vocab, np.int64)]
        for i, part in enumerate(_sums(block, device_shift, vocab)):
            totals[i] = totals[i] + np.asarray(part, np.int64 if i == 3 else np.float64)
    total, square, by_token, counts = totals
    tokens = int(counts.sum())
    offset = total / tokens
    return Statistics(
        tokens=tokens,
        mean=shift + offset,
        covariance=square / tokens - np.outer(offset, offset),
        median_norm=median_norm,
        token_sum=(by_token + counts[:, None] * shift).astype(np.float32),
        token_count=counts,
    )
