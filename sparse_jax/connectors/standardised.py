"""A linear connector's least-squares problem in units where every input has norm 1 and every target scale 1.

    v_ij = W_ij r_i / s_j        r_i: norm of input i (root mean square of F1_i), s_j: scale of target j (std of F2_j)
    A    = cov(F1 / r) [n1, n1]      B = cov(F2 / s, F1 / r) [n2, n1]      without a bias: of uncentred products

    (1/N) ||F2_j - F1 w_j - b_j||^2 / s_j^2  =  v_j A v_j - 2 B_j v_j + constant        b_j = mean F2_j - w_j . mean F1

so that one A serves all targets. Silent inputs and targets have rows of 0, and get weights of 0.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from sparse_jax.connectors.moments import Moments, mean_square, one_block
from sparse_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Standardised:
    """The problem, float64.

    Attributes:
        A: `[n1, n1]`.
        B: `[n2, n1]`, a row for each target.
        norms: `[n1]` r, 0 for a silent input.
        scales: `[n2]` s, 0 for a constant target.
        input_mean, target_mean: `[n1]`, `[n2]`; zeros without a bias.
        square: `[n2]` mean of (F2_j - mean)^2 / s_j^2: the error of weights of 0.
    """

    A: np.ndarray
    B: np.ndarray
    norms: np.ndarray
    scales: np.ndarray
    input_mean: np.ndarray
    target_mean: np.ndarray
    square: np.ndarray

    def of_targets(self, kept: np.ndarray) -> "Standardised":
        """The problem of some targets alone."""
        per_target = {name: getattr(self, name)[kept] for name in ("B", "scales", "target_mean", "square")}
        return dataclasses.replace(self, **per_target)

    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """(`[n1]` 1 / r, `[n2]` s): W = (1 / r) v s; 0 for what is silent."""
        return np.divide(1, self.norms, out=np.zeros_like(self.norms), where=self.norms > 0), self.scales

    def weights(self, v: sparse.csr_array) -> sparse.csc_array:
        """`[n1, n2]` W of `v [n2, n1]`, float64."""
        inverse, scales = self.units()
        made = sparse.csc_array(v.T.astype(np.float64))
        made.data *= inverse[made.indices] * np.repeat(scales, np.diff(made.indptr))
        return made

    def bias(self, W: sparse.csc_array | np.ndarray) -> np.ndarray:
        """`[n2]` b that goes with W `[n1, n2]`."""
        return self.target_mean - W.T @ self.input_mean

    def error(self, v: sparse.csr_array) -> np.ndarray:
        """`[n2]` mean squared error over s_j^2 of `v [n2, n1]`."""
        quadratic = v.multiply(v @ self.A - 2 * self.B).sum(axis=1)
        return self.square + np.asarray(quadratic).reshape(-1)


def standardised(
    given: Moments, *, scales: np.ndarray | None = None, norms: np.ndarray | None = None, with_bias: bool = True
) -> Standardised:
    """The problem of some moments.

    Args:
        given: moments; blocks are added up.
        scales: `[n2]` of the targets; None: the standard deviation of each. 0: the target gets weights of 0.
        norms: `[n1]` of the inputs; None: the root mean square of each. 0: the input gets weights of 0.
        with_bias: fit a bias.

    Raises:
        InputError: no tokens; scales or norms that are negative, not finite or not as many.
    """
    whole = one_block(given)
    squares, variance = mean_square(whole)
    norms = _checked("norms of inputs", np.sqrt(squares) if norms is None else norms, whole.n_inputs)
    scales = _checked("scales of targets", np.sqrt(variance) if scales is None else scales, whole.n_targets)
    tokens, zero = float(whole.count[0]), 0.0 if not with_bias else 1.0
    input_mean, target_mean = zero * whole.input_sum[0] / tokens, zero * whole.target_sum[0] / tokens
    # A code that is (nearly) constant has no variance beyond the rounding of its sums.
    scales = np.where(variance > 1e-12 * whole.target_square[0] / tokens, scales, 0)
    over_norms = np.divide(1, norms, out=np.zeros_like(norms), where=(norms > 0) & (squares > 0))
    over_scales = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    A = whole.gram[0] / tokens - np.outer(input_mean, input_mean)
    A = (A + A.T) / 2 * over_norms[:, None] * over_norms
    B = (whole.cross[0] / tokens - np.outer(input_mean, target_mean)).T * over_scales[:, None] * over_norms
    square = (whole.target_square[0] / tokens - target_mean**2) * over_scales**2
    norms = np.where(over_norms > 0, norms, 0)
    return Standardised(A, B, norms, scales, input_mean, target_mean, square)


def _checked(what: str, values: np.ndarray, count: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.shape != (count,) or not np.isfinite(values).all() or (values < 0).any():
        raise InputError(f"{what} of shape {values.shape}: give {count} finite numbers, none below 0")
    return values
