"""Intervals of figures that are made of sums over tokens, by drawing documents with replacement.

    sums     = document_sums(document, values)                            [documents, k] of [tokens, k]
    interval = bootstrap(lambda s: s[..., 1] / s[..., 0], sums)

A figure must be a function of the sums over all tokens: it is taken of the sums of each drawn set of documents. Source:
Efron & Tibshirani 1993, chapter 13 (percentile intervals); Field & Welsh 2007 (whole clusters are drawn).
"""

from collections.abc import Callable

import numpy as np

from sparse_jax.connectors.document_blocks import Interval, bootstrap_weights, interval
from sparse_jax.errors import InputError


def document_sums(document: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`[documents, k]` float64: sums of `values [tokens, k]` over the tokens of each document that has any.

    Args:
        document: `[tokens]` numbers.
    """
    _, inverse = np.unique(document, return_inverse=True)
    values = np.asarray(values, np.float64)
    counts = inverse.max(initial=-1) + 1
    return np.stack([np.bincount(inverse, column, minlength=counts) for column in values.T], axis=1)


def bootstrap(
    figure: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """The figure of all documents and its 95 % interval; of a single document NaN are its bounds.

    Args:
        figure: sums `[..., k]` -> `[...]`.
        sums: `[documents, k]`.
        resamples: how many sets of documents are drawn.
        seed: decides the draw; the same draw for the same seed, so that figures may be compared.

    Raises:
        InputError: no document, or no resample.
    """
    if not len(sums) or resamples < 1:
        raise InputError(f"{len(sums)} documents, {resamples} resamples: give at least one of each")
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(figure(sums.sum(axis=0)))
        if len(sums) == 1:
            return Interval(value, float("nan"), float("nan"))
        return interval(value, figure(bootstrap_weights(len(sums), resamples, seed) @ sums))
