"""Squared errors of predictors of target codes, summed by document: all that any R^2 and its interval are made of.

    errors = document_errors(held_out, {"linear/0": trained, "mlp/0": other, "own": function, "done": array})
    errors.mse("linear/0")        [targets]
    errors.r2("linear/0")         [targets]

Every token is looked at once. Documents are what is drawn in a bootstrap, since tokens of one are not independent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes

# A trained connector, a function of input codes [rows], or predictions of all tokens that are there already.
Predictor = Trained | Callable[[SparseCodes], jax.Array] | np.ndarray


@dataclass(frozen=True, eq=False)
class DocumentErrors:
    """Sums over the tokens of each document, or of each group of documents. Numpy, float64.

    Attributes:
        tokens: `[groups]` int64.
        fired: `[groups, targets]` int64, tokens on which the target fires (is not 0, where it is a raw site).
        total, squares: `[groups, targets]` sums of the target and of its square.
        errors: predictor's name -> `[groups, targets]` sums of (prediction - target)^2.
        documents: how many documents there were; as many as groups unless they were put together.
    """

    tokens: np.ndarray
    fired: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    errors: dict[str, np.ndarray]
    documents: int

    @property
    def n_tokens(self) -> int:
        """Of all documents."""
        return int(self.tokens.sum())

    @property
    def variance(self) -> np.ndarray:
        """`[targets]` of the target over these tokens; exactly 0 for one that never fires, or is constant."""
        return variance_of(self.total.sum(axis=0) / self.n_tokens, self.squares.sum(axis=0) / self.n_tokens)

    @property
    def density(self) -> np.ndarray:
        """`[targets]` share of the tokens on which the target fires."""
        return self.fired.sum(axis=0) / self.n_tokens

    def mse(self, name: str) -> np.ndarray:
        """`[targets]` mean squared error over the tokens."""
        return self.errors[name].sum(axis=0) / self.n_tokens

    def r2(self, name: str) -> np.ndarray:
        """`[targets]` 1 - MSE / variance; NaN for a target that does not vary."""
        return _r2(self.mse(name), self.variance)

    def constant(self, value: np.ndarray) -> "DocumentErrors":
        """With the predictor "constant" that says `value [targets]` of every token, whatever the inputs are.

        Give the means over training tokens: those over these tokens would have an R^2 of exactly 0.
        """
        value = np.asarray(value, np.float64)
        squared = self.squares - 2 * value * self.total + value**2 * self.tokens[:, None]
        errors = {**self.errors, "constant": np.maximum(squared, 0)}
        return DocumentErrors(self.tokens, self.fired, self.total, self.squares, errors, self.documents)


def variance_of(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Variance of numbers with this mean and this mean square; 0 where it is not above the rounding of the sums."""
    variance = square - mean**2
    return np.where(variance > 1e-12 * square, variance, 0)


def document_errors(
    pair: Pair,
    predictors: Mapping[str, Predictor],
    *,
    chunk_rows: int = 2048,
    max_groups: int = 1024,
    groups: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
) -> DocumentErrors:
    """One pass over the tokens of a pair.

    Memory: `8 x groups x targets x (3 + predictors)` bytes, and `16 x chunk_rows x targets`.

    Args:
        pair: held-out tokens.
        predictors: name -> predictor. A function is called with codes of `chunk_rows` rows each time (the last ones
            filled up with empty rows), as NumPy arrays, and gives `[chunk_rows, targets]`.
        chunk_rows: tokens at once.
        max_groups: with more documents than that, every so many of them are summed together.
        groups: `[tokens]` int, the group of each token, in place of that: numbers from 0, none left out.
        progress: is told of the tokens of each chunk.

    Raises:
        InputError: no token, predictions of another shape, or a prediction that is not finite.
    """
    if not len(pair) or min(chunk_rows, max_groups) < 1:
        raise InputError(f"{len(pair)} tokens, {chunk_rows} at once, {max_groups} groups: give at least one of each")
    for name, each in predictors.items():
        if isinstance(each, np.ndarray) and each.shape != (len(pair), pair.targets.n_features):
            raise InputError(
                f"predictions {name} have shape {list(each.shape)}; there are {len(pair)} tokens and "
                f"{pair.targets.n_features} targets"
            )
    found, document = np.unique(pair.tokens.document, return_inverse=True)
    group = document % max_groups if groups is None else groups
    order, tokens = np.argsort(group, kind="stable"), np.bincount(group)
    shape = (len(tokens), pair.targets.n_features)
    fired, total, squares = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
    errors = {name: np.zeros(shape) for name in predictors}
    for begin in range(0, len(order), chunk_rows):
        rows = order[begin : begin + chunk_rows]
        parts = _parts(group[rows])
        codes, y = _filled(pair.inputs.at(rows), chunk_rows), pair.targets.dense(rows)
        for at, part in parts:
            fired[at] += np.count_nonzero(y[part], axis=0)
            total[at] += y[part].sum(axis=0, dtype=np.float64)
            squares[at] += np.square(y[part], dtype=np.float64).sum(axis=0)
        for name, each in predictors.items():
            y_hat = np.asarray(each[rows] if isinstance(each, np.ndarray) else _predict(each, codes))[: len(rows)]
            _check(name, y_hat, y)
            squared = np.square(y_hat - y)
            for at, part in parts:
                errors[name][at] += squared[part].sum(axis=0, dtype=np.float64)
        if progress is not None:
            progress(len(rows))
    return DocumentErrors(tokens, fired, total, squares, errors, len(found))


def _parts(group) -> list[tuple[int, slice]]:
    """(group, where its rows stand) of rows in the order of the groups."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return [(int(group[a]), slice(a, b)) for a, b in zip(starts, [*starts[1:], len(group)], strict=True)]


def _filled(codes: SparseCodes, rows: int) -> SparseCodes:
    """With empty rows behind, so that every chunk has one shape."""
    return SparseCodes(*(np.pad(part, ((0, rows - len(part)), (0, 0))) for part in codes))


def _predict(predictor, codes: SparseCodes) -> jax.Array:
    return _trained(predictor, codes) if isinstance(predictor, Trained) else predictor(codes)


@jax.jit
def _trained(trained: Trained, codes: SparseCodes) -> jax.Array:
    return trained.predict(codes)


def _check(name, y_hat, y) -> None:
    if y_hat.shape != y.shape:
        raise InputError(f"predictor {name} gives {list(y_hat.shape)} for targets {list(y.shape)}")
    if not np.isfinite(y_hat.sum(dtype=np.float64)):
        raise InputError(f"predictor {name} gives numbers that are not finite: its training has failed")


def _r2(mse, variance) -> np.ndarray:
    varies = variance > 0
    return np.where(varies, 1 - mse / np.where(varies, variance, 1), np.nan)
