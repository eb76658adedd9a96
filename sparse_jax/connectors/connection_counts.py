"""How many connections an output feature has: the same counts for Jacobians and for the weights of connectors.

    table [n_out, n_in]     |weight| x typical size of the input, whatever the map: for a Jacobian the mean of |J|
                            (JacobianFigures.mean_slopes), for a linear connector |W|^T

    above       inputs with an entry above a threshold: of the row's largest entry (relative) or as it is
    holding     the fewest inputs that hold a share (0.9) of the row's sum: needs no threshold and no units

Two maps of other units are compared by `holding`, or by `above` with `relative`, each at the same ce_increase.
"""

from dataclasses import dataclass

import numpy as np

from sparse_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class ConnectionCounts:
    """Connections of each output feature; rows without any entry have 0.

    Attributes:
        above: `[n_out]` int64 inputs with an entry above the threshold.
        holding: `[n_out]` int64 the fewest inputs that hold the share of the row's sum.
        alive: `[n_out]` bool, which output features are counted.
    """

    above: np.ndarray
    holding: np.ndarray
    alive: np.ndarray

    def medians(self) -> dict[str, float]:
        """Medians over the output features that are alive; NaN where none is."""
        if not self.alive.any():
            return {"above": float("nan"), "holding": float("nan")}
        return {name: float(np.median(getattr(self, name)[self.alive])) for name in ("above", "holding")}


def connection_counts(
    table: np.ndarray,
    *,
    input_norms: np.ndarray | None = None,
    threshold: float = 0.1,
    relative: bool = True,
    share: float = 0.9,
    alive: np.ndarray | None = None,
) -> ConnectionCounts:
    """Count the connections of each output feature.

    Args:
        table: `[n_out, n_in]` weights or slopes of any sign; not changed.
        input_norms: `[n_in]` typical size of each input, which entries are multiplied by; None: 1.
        threshold: of `above`.
        relative: whether the threshold is a share of the row's largest entry.
        share: of `holding`.
        alive: `[n_out]` bool, which output features count; None: those with an entry that is not 0.

    Raises:
        InputError: a table that is not finite or no matrix, norms of another length, a share outside (0, 1].
    """
    table = np.asarray(table)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise InputError(f"a table of connections of shape {table.shape}: give finite numbers [n_out, n_in]")
    if not 0 < share <= 1 or threshold < 0:
        raise InputError(f"share {share}, threshold {threshold}: give a share of more than 0 up to 1, none below 0")
    if input_norms is not None and np.shape(input_norms) != table.shape[1:]:
        raise InputError(f"{len(input_norms)} input norms for {table.shape[1]} inputs: give one for each")
    above, holding = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
    for row, values in enumerate(table):  # a row at a time: the table may be large
        sizes = np.abs(values.astype(np.float64)) * (1.0 if input_norms is None else input_norms)
        largest = sizes.max(initial=0.0)
        if largest == 0:
            continue
        above[row] = np.count_nonzero(sizes > threshold * (largest if relative else 1.0))
        held = np.cumsum(np.sort(sizes)[::-1])
        # Rounding must not ask for one more input than hold all of it.
        holding[row] = np.searchsorted(held, share * held[-1] * (1 - 1e-12)) + 1
    return ConnectionCounts(above, holding, holding > 0 if alive is None else np.asarray(alive, bool))
