"""Supports that nothing was fitted for: of each target the inputs to which other weights give the largest part.

    part_ij = |W_ij| r_i        r_i the root mean square of input i: how far it moves the target when it moves

With W the mean Jacobian of a module (`mean_jacobian.py`) the module's own derivative chooses the connections. Least
squares on the support (`linear_refit.py`) then gives the weights, so that a choice can be held against the lasso's at
as many connections: only the choice differs.
"""

import numpy as np
from scipy import sparse

from sparse_jax.connectors.linear_path import LinearMaps
from sparse_jax.errors import InputError


def strongest_inputs(weights: np.ndarray, norms: np.ndarray, counts: np.ndarray) -> LinearMaps:
    """The weights without all but the strongest inputs of each target; biases are 0.

    Args:
        weights: `[n1, n2]`, target units per unit of input.
        norms: `[n1]` root mean square of the inputs.
        counts: `[points, n2]` how many inputs each target keeps, at each point; weights of 0 are never kept.

    Raises:
        InputError: shapes that do not fit each other.
    """
    weights = np.asarray(weights)
    if weights.ndim != 2 or norms.shape != weights.shape[:1] or counts.shape[1:] != weights.shape[1:]:
        raise InputError(
            f"weights {weights.shape}, norms {norms.shape}, counts {counts.shape}: give [inputs, targets], [inputs] "
            "and [points, targets]"
        )
    part = np.abs(weights) * norms[:, None]
    # rank[i, j]: how many inputs are stronger than i for j; of equal ones the first.
    rank = np.empty(part.shape, np.int64)
    np.put_along_axis(rank, np.argsort(-part, axis=0, kind="stable"), np.arange(len(part))[:, None], axis=0)
    kept = tuple(
        sparse.csc_array(np.where((rank < each) & (part > 0), weights, 0).astype(np.float32)) for each in counts
    )
    return LinearMaps(kept, np.zeros(counts.shape))
