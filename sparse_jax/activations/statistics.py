"""Mean, covariance, norms and per-token means of activations, from one pass over a stated sample of training blocks.

Sums of a block come from the device in float32, of activations shifted by the first block's mean so that nothing
cancels; they are added up in float64 on the host.
"""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.blocks import Block, Blocks, RememberedBlocks, SiteBlocks
from sparse_jax.errors import InputError
from sparse_jax.numerics.whole import to_host


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
    def mean_over_std(self) -> float:
        """||mean|| / ||std||, the root of ||mean||^2 / variance: how far the activations are from being centred.

        Of raw activations; 0 where the mean is 0, inf where they do not vary. A bias could learn the mean, but a
        dictionary that is not given it spends features and training on it: well above 0 the activations want a
        centre, from the normaliser ("centre-scale", the default) or from where the decoder bias starts.
        """
        return float(np.linalg.norm(self.mean)) / math.sqrt(self.variance) if self.variance > 0 else math.inf

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
    first = blocks[0]
    totals = _Totals(first, blocks.vocab_size)
    for index in range(n_blocks):
        totals.add(blocks[index] if index else first)
    return totals.statistics()


def collect_site_statistics(blocks: SiteBlocks | RememberedBlocks, n_blocks: int) -> dict[str, Statistics]:
    """`collect_statistics` at every site of the blocks, each block harvested once.

    Raises:
        InputError: no token counts (the mask drops them all), or an activation is not finite.
    """
    totals = {}
    for index in range(n_blocks):
        block = blocks[index]
        for site in block.x:
            if index == 0:
                totals[site] = _Totals(block.at(site), blocks.vocab_size)
            totals[site].add(block.at(site))
    return {site: total.statistics() for site, total in totals.items()}


class _Totals:
    """Sums over blocks, in float64 on the host."""

    def __init__(self, first: Block, vocab: int):
        weight, x = to_host((first.weight, first.x))
        counted = weight > 0
        if not counted.any():
            raise InputError("the mask drops every token of the first block; see --skip-positions and --context")
        x = x[counted]
        self._shift, self._median_norm = x.mean(axis=0), float(np.median(np.linalg.norm(x, axis=1)))
        self._device_shift, self._vocab = jnp.array(self._shift), vocab
        self._total, self._square, self._by_token, self._counts = 0.0, 0.0, 0.0, np.zeros(vocab, np.int64)

    def add(self, block: Block) -> None:
        total, square, by_token, counts = to_host(_sums(block, self._device_shift, self._vocab))
        self._total = self._total + np.asarray(total, np.float64)
        self._square = self._square + np.asarray(square, np.float64)
        self._by_token = self._by_token + np.asarray(by_token, np.float64)
        self._counts += np.asarray(counts, np.int64)

    def statistics(self) -> Statistics:
        tokens = int(self._counts.sum())
        offset = self._total / tokens
        return Statistics(
            tokens=tokens,
            mean=self._shift + offset,
            covariance=self._square / tokens - np.outer(offset, offset),
            median_norm=self._median_norm,
            token_sum=(self._by_token + self._counts[:, None] * self._shift).astype(np.float32),
            token_count=self._counts,
        )
