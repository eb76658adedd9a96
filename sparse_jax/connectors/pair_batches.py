"""Shuffled batches of a pair in scaled units: a function of (seed, step)."""

from dataclasses import dataclass, field

import numpy as np

from sparse_jax.connectors.paired_codes import Pair, SiteCodes
from sparse_jax.connectors.scaling import Scales
from sparse_jax.connectors.sparse_product import TwoWayCodes, gather_is_faster, two_way
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes


@dataclass(eq=False)
class PairBatches:
    """Batches of x / input_norm and y / target_scale, on the host.

    Each pass over the tokens has an order of its own; tokens that do not fill a pass's last batch are left out.

    Attributes:
        pair: the tokens.
        scales: units.
        batch: tokens in a batch.
        seed: of the order.
        by_feature: list codes by feature too, where that makes gathers faster than dense products.

    Raises:
        InputError: a batch that the tokens do not fill.
    """

    pair: Pair
    scales: Scales
    batch: int
    seed: int
    by_feature: bool = True
    _order: tuple[int, np.ndarray] | None = field(default=None, init=False)

    def __post_init__(self):
        if not 0 < self.batch <= len(self.pair):
            raise InputError(f"batches of {self.batch} of {len(self.pair)} tokens: give a number from 1 to that")

    @property
    def per_pass(self) -> int:
        """Batches in a pass over all tokens."""
        return len(self.pair) // self.batch

    def rows(self, step: int) -> np.ndarray:
        """`[batch]` which tokens step `step` takes, ascending: memory maps are read in order."""
        number, offset = divmod(step, self.per_pass)
        if self._order is None or self._order[0] != number:
            self._order = number, np.random.default_rng((self.seed, number)).permutation(len(self.pair))
        return np.sort(self._order[1][offset * self.batch : (offset + 1) * self.batch])

    def __getitem__(self, step: int) -> tuple[SparseCodes | TwoWayCodes, SparseCodes | TwoWayCodes]:
        """Inputs and targets of a step."""
        rows = self.rows(step)
        return (
            self._scaled(self.pair.inputs, rows, self.scales.input_norm),
            self._scaled(self.pair.targets, rows, self.scales.target_scale),
        )

    def _scaled(self, site: SiteCodes, rows: np.ndarray, units: np.ndarray) -> SparseCodes | TwoWayCodes:
        values, indices = site.at(rows)
        codes = SparseCodes(values / units[indices], indices)
        gathers = self.by_feature and gather_is_faster(site.n_features, site.slots)
        return two_way(codes, site.n_features) if gathers else codes
