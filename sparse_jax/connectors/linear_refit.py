"""Linear connectors without shrinkage, from moments: least squares on a given support, and on all inputs.

The l1 penalty that finds a support also pulls its weights towards 0. Fitted again on the support alone,

    A_SS v_S = B_S        for each target, S the inputs with a weight (in the units of `standardised.py`)

they are the least-squares weights. Source: Belloni & Chernozhukov 2013 (least squares after the lasso).
"""

import numpy as np
from scipy import linalg, sparse

from sparse_jax.connectors.linear_path import LinearMaps
from sparse_jax.connectors.moments import Moments
from sparse_jax.connectors.standardised import Standardised, standardised
from sparse_jax.errors import InputError

# Below this share of the largest, a direction of a support is taken for dependent on the others.
_DEPENDENT = 1e-9


def refit_linear(maps: LinearMaps, given: Moments | Standardised, *, with_bias: bool = True) -> LinearMaps:
    """The same supports with their least-squares weights; of dependent inputs the solution of least norm.

    Args:
        maps: connectors whose supports are taken, a `LinearPath` say.
        given: moments of the tokens to fit on, or the problem made of them (then `with_bias` stands in it).
        with_bias: fit a bias.

    Raises:
        InputError: moments of other codes, or of no tokens.
    """
    problem = standardised(given, with_bias=with_bias) if isinstance(given, Moments) else given
    shape = (len(problem.A), len(problem.B))
    for W in maps.weights:
        if W.shape != shape:
            raise InputError(
                f"weights of shape {W.shape}, moments of {shape} (inputs, targets): give those of one pair"
            )
    fitted = [_refitted(problem, sparse.csc_array(W)) for W in maps.weights]
    weights = [problem.weights(v) for v in fitted]
    bias = np.stack([problem.bias(W) for W in weights])
    return LinearMaps(tuple(W.astype(np.float32) for W in weights), bias)


def _refitted(problem: Standardised, W: sparse.csc_array) -> sparse.csr_array:
    """`[n2, n1]` v, float64."""
    values = np.zeros(W.nnz)
    for target, (start, stop) in enumerate(zip(W.indptr[:-1], W.indptr[1:])):
        support = W.indices[start:stop]
        if len(support):
            values[start:stop] = _solve(problem.A[np.ix_(support, support)], problem.B[target, support])
    return sparse.csr_array((values, W.indices, W.indptr), shape=(len(problem.B), len(problem.A)))


def _solve(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The solution of least norm of `A v = b` for positive semidefinite A."""
    try:
        factor, lower = linalg.cho_factor(A, lower=True, check_finite=False)
        pivots = np.diagonal(factor) ** 2
        if pivots.min() > _DEPENDENT * pivots.max():
            return linalg.cho_solve((factor, lower), b, check_finite=False)
    except linalg.LinAlgError:
        pass
    return linalg.pinvh(A, rtol=_DEPENDENT) @ b


def dense_linear(given: Moments | Standardised, ridge: float = 1e-4, *, with_bias: bool = True) -> LinearMaps:
    """Weights from all inputs to every target: the least squares that sparse connectors are held against.

        (A + ridge I) v_j = B_j

    `ridge` is in units in which each input has norm 1, so that it shrinks an input by its share of variance lost to
    the others; 0 is plain least squares (of least norm where inputs are dependent).

    Args:
        given: moments, or the problem made of them (then `with_bias` stands in it).
        ridge: as above.
        with_bias: fit a bias.

    Raises:
        InputError: a negative ridge, moments of no tokens.
    """
    if not ridge >= 0:
        raise InputError(f"ridge {ridge}: give 0 or more")
    problem = standardised(given, with_bias=with_bias) if isinstance(given, Moments) else given
    v = np.zeros_like(problem.B)
    alive = problem.norms > 0
    v[:, alive] = _solve_all(problem.A[np.ix_(alive, alive)] + ridge * np.eye(alive.sum()), problem.B[:, alive])
    W = problem.weights(sparse.csr_array(v))
    return LinearMaps((W.astype(np.float32),), problem.bias(W)[None])


def _solve_all(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """`[n2, n1]` v with A v_j = B_j."""
    return _solve(A, B.T).T if len(A) else np.zeros_like(B)
