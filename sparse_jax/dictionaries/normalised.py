"""A dictionary together with its parameters and its normaliser: encodes and decodes raw activations."""

from dataclasses import dataclass
from functools import partial

import jax

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.protocol import Dictionary, Params


@partial(jax.tree_util.register_dataclass, data_fields=["params", "normaliser"], meta_fields=["dictionary"])
@dataclass(frozen=True)
class Normalised:
    """What is used after training. A pytree: pass it to jitted functions as it is.

    Attributes:
        dictionary: the static choices.
        params: its parameters.
        normaliser: what stood between the raw activations and the dictionary in training.
    """

    dictionary: Dictionary
    params: Params
    normaliser: Normaliser

    def encode(self, x: jax.Array) -> jax.Array:
        """Codes `[rows, n_features]` of raw activations `x [rows, d_in]`, in the dictionary's normalised units."""
        return self.dictionary.encode(self.params, self.normaliser.apply(x))

    def decode(self, codes: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """Raw reconstruction `[rows, d_out]` of codes."""
        x = None if x is None else self.normaliser.apply(x)
        return self.normaliser.undo(self.dictionary.decode(self.params, codes, x))

    def reconstruct(self, x: jax.Array) -> jax.Array:
        """`decode(encode(x))` of raw activations `[rows, d_in]`."""
        return self.decode(self.encode(x), x)

    def directions(self) -> jax.Array:
        """`[n_features, d_out]` in raw units: what a code of 1 adds to the activation."""
        return self.dictionary.directions(self.params) * self.normaliser.scale
