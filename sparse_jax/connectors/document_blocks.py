"""Blocks of whole documents: what a bootstrap draws, since tokens of one document are not independent.

Source: Kuensch 1989 (resampling blocks of dependent data); Efron & Tibshirani 1993, chapter 13 (percentile intervals).
"""

from typing import NamedTuple

import numpy as np

from sparse_jax.errors import InputError


class Interval(NamedTuple):
    """A figure with its bootstrap interval.

    Attributes:
        value: on the data as they are.
        low, high: percentiles of the figure on data drawn anew.
    """

    value: float
    low: float
    high: float


def document_blocks(document: np.ndarray, blocks: int, seed: int = 0) -> np.ndarray:
    """`[tokens]` int64, 0 to blocks - 1: documents in random order, cut into blocks of about as many tokens each.

    A document stands in one block as a whole. With fewer documents than blocks each is a block of its own.

    Args:
        document: `[tokens]` numbers of documents.
        blocks: how many, at most.
        seed: of the order.

    Raises:
        InputError: fewer than one block, or no tokens.
    """
    if blocks < 1 or not len(document):
        raise InputError(f"{blocks} blocks of the documents of {len(document)} tokens: give at least one of each")
    _, inverse, counts = np.unique(document, return_inverse=True, return_counts=True)
    if len(counts) <= blocks:
        return inverse.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(counts))
    # By the middle of each document, so that a long one does not push all others back.
    middle = np.cumsum(counts[order]) - counts[order] / 2
    block = np.empty(len(counts), np.int64)
    block[order] = np.minimum(middle * blocks / counts.sum(), blocks - 1).astype(np.int64)
    _, block = np.unique(block, return_inverse=True)  # a document longer than a block leaves a number unused
    return block[inverse].astype(np.int64)


def bootstrap_weights(blocks: int, replicates: int, seed: int = 0) -> np.ndarray:
    """`[replicates, blocks]` float64: how often each block is drawn, as many draws as there are blocks.

    Raises:
        InputError: fewer than two blocks, or no replicates.
    """
    if blocks < 2 or replicates < 1:
        raise InputError(f"{replicates} replicates of {blocks} blocks of documents: a bootstrap needs 2 blocks and 1")
    draws = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=replicates)
    return draws.astype(np.float64)


def interval(value: float, replicates: np.ndarray, level: float = 0.95) -> Interval:
    """The percentile interval of a figure, from its values `[replicates]`; those that are not numbers are left out."""
    drawn = np.asarray(replicates, np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return Interval(float(value), float("nan"), float("nan"))
    # "nearest": an interval of figures some of which are infinite has no interpolated ends.
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return Interval(float(value), float(low), float(high))
