"""Which part of each batch one of several processes takes: consecutive tokens, none twice, none left out.

The order of the whole does not depend on how many processes there are: batch i of a run holds the same tokens, and the
processes' parts of it, one after the other, are that batch.
"""

from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

from sparse_jax.errors import InputError

Array = TypeVar("Array", jax.Array, np.ndarray)


@dataclass(frozen=True)
class Share:
    """One process's share.

    Attributes:
        process: which, from 0.
        processes: of how many.
        batch: tokens in a batch of the whole run.

    Raises:
        InputError: no such process, or a batch that does not divide.
    """

    process: int
    processes: int
    batch: int

    def __post_init__(self):
        if not 0 <= self.process < self.processes:
            raise InputError(f"process {self.process} of {self.processes}: give 0 to {self.processes - 1}")
        if self.batch < 1 or self.batch % self.processes:
            raise InputError(f"a batch of {self.batch} does not divide among {self.processes} processes")

    def of(self, values: Array) -> Array:
        """Its part of a block's `[tokens, ...]`, whose tokens are whole batches one after the other.

        Raises:
            InputError: the block has no whole number of batches.
        """
        if len(values) % self.batch:
            raise InputError(f"a block of {len(values)} tokens holds no whole number of batches of {self.batch}")
        parts = values.reshape(-1, self.processes, self.batch // self.processes, *values.shape[1:])
        return parts[:, self.process].reshape(-1, *values.shape[1:])
