"""Floor 1: sparse inference on a fixed dictionary, and classical dictionary learning.

Which solver: `lasso` for the exact codes of many rows, fastest where codes are sparse; `fista` with a fixed number of
iterations where gradients must flow through it, or codes need not be exact; `fista_until` on accelerators that gather
slowly, and where codes are dense. Pursuits take a number of active features in place of a penalty.
"""

from sparse_jax.coding.code_gradient import code_gradient
from sparse_jax.coding.fista import fista, fista_until, ista
from sparse_jax.coding.gradient_pursuit import gradient_pursuit
from sparse_jax.coding.implicit import differentiable_lasso
from sparse_jax.coding.iterative_hard_thresholding import iterative_hard_thresholding
from sparse_jax.coding.lasso import Solution, duality_gap, kkt_violation, objective, spectral_bound
from sparse_jax.coding.least_squares_on_support import least_squares_on_support
from sparse_jax.coding.matching_pursuit import matching_pursuit
from sparse_jax.coding.orthogonal_matching_pursuit import orthogonal_matching_pursuit
from sparse_jax.coding.tuning import penalty_for_l0
from sparse_jax.coding.working_set import lasso

__all__ = [
    "Solution",
    "code_gradient",
    "differentiable_lasso",
    "duality_gap",
    "fista",
    "fista_until",
    "gradient_pursuit",
    "ista",
    "iterative_hard_thresholding",
    "kkt_violation",
    "lasso",
    "least_squares_on_support",
    "matching_pursuit",
    "objective",
    "orthogonal_matching_pursuit",
    "penalty_for_l0",
    "spectral_bound",
]
