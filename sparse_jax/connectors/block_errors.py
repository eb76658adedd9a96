"""Squared errors of connectors on held-out tokens, for each block of documents, and the R^2 that follow.

    R^2_j = 1 - sum over tokens (F2_j - prediction)^2 / sum over tokens (F2_j - mean F2_j)^2

summed over all held-out tokens before dividing; kept for each block of documents, so that a bootstrap weighs blocks.
The mean predictor has 0; a bad one is negative. A target is alive where it fires on at least `MIN_FIRINGS` held-out
tokens: of the others R^2 says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_jax.connectors.document_blocks import document_blocks
from sparse_jax.connectors.document_errors import Predictor, document_errors
from sparse_jax.connectors.linear_path import LinearMaps
from sparse_jax.connectors.moments import Moments, csr
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes

MIN_FIRINGS, BLOCKS = 10, 64
# Share of weights that are not 0 from which a product with all of them is taken.
_DENSE = 0.1


@dataclass(frozen=True, eq=False)
class BlockErrors:
    """Squared errors of some connectors ("points") on held-out tokens, for each block of documents; float64.

    Attributes:
        error: `[points, blocks, n2]` sums of squared errors.
        sum, square: `[blocks, n2]` sums of F2_j and F2_j^2.
        fired: `[blocks, n2]` int64 tokens where the target is not 0.
        count: `[blocks]` int64 tokens.
    """

    error: np.ndarray
    sum: np.ndarray
    square: np.ndarray
    fired: np.ndarray
    count: np.ndarray

    def r2(self, weights: np.ndarray | None = None) -> np.ndarray:
        """`[points, n2]`; NaN where a target does not vary. With `weights` `[blocks]`, each block counts so often."""
        weights = np.ones(len(self.count)) if weights is None else np.asarray(weights, np.float64)
        total, square, tokens = weights @ self.sum, weights @ self.square, weights @ self.count
        spread = square - total**2 / max(tokens, 1)
        varies = spread > 1e-12 * square
        error = np.tensordot(self.error, weights, axes=([1], [0]))
        return np.where(varies, 1 - error / np.where(varies, spread, 1), np.nan)

    def alive(self, min_firings: int = MIN_FIRINGS) -> np.ndarray:
        """`[n2]` bool: targets that fire on so many of these tokens and vary."""
        varies = self.square.sum(axis=0) - self.sum.sum(axis=0) ** 2 / max(self.count.sum(), 1) > 0
        return (self.fired.sum(axis=0) >= min_firings) & varies

    def of_targets(self, kept: np.ndarray) -> "BlockErrors":
        """Those of some targets alone."""
        sums = (self.sum, self.square, self.fired)
        return BlockErrors(self.error[:, :, kept], *(each[:, kept] for each in sums), self.count)

    def joined(self, other: "BlockErrors") -> "BlockErrors":
        """The points of both, on the same tokens.

        Raises:
            InputError: they are of other tokens.
        """
        if not (np.array_equal(self.count, other.count) and np.array_equal(self.fired, other.fired)):
            raise InputError("errors on other tokens or blocks cannot stand beside each other: give those of one pair")
        both = np.concatenate([self.error, other.error])
        return BlockErrors(both, self.sum, self.square, self.fired, self.count)


def linear_predictors(maps: LinearMaps) -> list[Predictor]:
    """A predictor of each, by sparse products on the host."""

    def of(W, b):
        full = W.nnz > _DENSE * W.shape[0] * W.shape[1]
        W, b = W.toarray() if full else W.tocsr(), np.asarray(b, np.float32)

        def predict(codes: SparseCodes) -> np.ndarray:
            made = csr(codes, W.shape[0]) @ W
            return (made if full else made.toarray()) + b

        return predict

    return [of(W, b) for W, b in zip(maps.weights, maps.bias)]


def block_errors(
    pair: Pair, predictors: Sequence[Predictor] | LinearMaps, blocks: int = BLOCKS, seed: int = 0
) -> BlockErrors:
    """Errors on the tokens of a pair. Memory: points x blocks x n2 x 8 bytes, and 2,048 dense rows.

    Args:
        pair: held-out tokens.
        predictors: see `document_errors.py`; or linear connectors.
        blocks, seed: of documents, see `document_blocks`.

    Raises:
        InputError: no predictors, no tokens.
    """
    predictors = linear_predictors(predictors) if isinstance(predictors, LinearMaps) else list(predictors)
    if not predictors:
        raise InputError("no connectors: give at least one predictor")
    block = document_blocks(pair.tokens.document, blocks, seed)
    found = document_errors(pair, {str(point): each for point, each in enumerate(predictors)}, groups=block)
    error = np.stack([found.errors[str(point)] for point in range(len(predictors))])
    return BlockErrors(error, found.total, found.squares, found.fired, found.tokens)


def moment_errors(given: Moments, maps: LinearMaps) -> BlockErrors:
    """The same of linear connectors from held-out moments, whose blocks it keeps (exact where those are float64)."""
    error = np.zeros((len(maps.weights), given.blocks, given.n_targets))
    for number in range(given.blocks):
        gram, cross = given.gram[number].astype(np.float64), given.cross[number].astype(np.float64)
        for point, (W, b) in enumerate(zip(maps.weights, maps.bias)):
            W = W.astype(np.float64)
            product = W.T @ gram - 2 * cross.T
            quadratic = np.asarray(W.T.multiply(product).sum(axis=1)).reshape(-1)
            offset = b * (given.count[number] * b - 2 * (given.target_sum[number] - W.T @ given.input_sum[number]))
            error[point, number] = given.target_square[number] + quadratic + offset
    error = np.maximum(error, 0)
    return BlockErrors(error, given.target_sum, given.target_square, given.target_fired, given.count)
