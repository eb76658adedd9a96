"""Floor 1: sparse inference on a fixed dictionary, and classical dictionary learning.

Which solver: `lasso` for the exact codes of many rows, fastest where codes are sparse; `fista` with a fixed number of
iterations where gradients must flow through it, or codes need not be exact; `fista_until` on accelerators that gather
slowly, and where codes are dense.
"""

from sparse_jax.coding.fista import fista, fista_until, ista
from sparse_jax.coding.lasso import Solution, duality_gap, kkt_violation, objective, spectral_bound
from sparse_jax.coding.working_set import lasso

__all__ = [
    "Solution",
    "duality_gap",
    "fista",
    "fista_until",
    "ista",
    "kkt_violation",
    "lasso",
    "objective",
    "spectral_bound",
]
