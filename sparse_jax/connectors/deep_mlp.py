"""The connector with two nonlinear layers.

g     = ReLU(x W_enc + b_enc)                    `first_width` units
h     = ReLU(g W_mid + b_mid)
y_hat = h W_dec + b_dec
"""

from dataclasses import dataclass
from typing import ClassVar

import jax

from sparse_jax.connectors.connector import register_connector
from sparse_jax.connectors.mlp import MLP, normal
from sparse_jax.connectors.sparse_product import Codes
from sparse_jax.dictionaries.protocol import Params
from sparse_jax.errors import InputError


@register_connector("deep-mlp")
@dataclass(frozen=True)
class DeepMLP(MLP):
    """Two layers of ReLU units.

    Attributes:
        n_features: units of the second.
        first_width: units of the first; 0: as many.
    """

    first_width: int = 0

    reads_writes: ClassVar = {
        "W_enc": ("input", "first"),
        "W_mid": ("first", "hidden"),
        "W_dec": ("hidden", "target"),
    }
    bias_sides: ClassVar = {"b_enc": "first", "b_mid": "hidden", "b_dec": "target"}

    def __post_init__(self):
        super().__post_init__()
        if self.first_width < 0:
            raise InputError(f"--first-width {self.first_width}: give a number of units, or 0 for --n-features")

    @property
    def sizes(self) -> dict[str, int]:
        return {**super().sizes, "first": self.first_width or self.n_features}

    def init_weights(self, key: jax.Array) -> Params:
        """Normal, as in mlp.py."""
        first = self.sizes["first"]
        return {
            "W_enc": normal(jax.random.fold_in(key, 0), self.d_in, first, 2 / self.d_in),
            "W_mid": normal(jax.random.fold_in(key, 1), first, self.n_features, 2 / first),
            "W_dec": normal(jax.random.fold_in(key, 2), self.n_features, self.d_out, 1 / self.n_features),
        }

    def encode(self, params: Params, x: Codes) -> jax.Array:
        """`h`."""
        z = super().encode(params, x) @ params["W_mid"]
        return jax.nn.relu(z + params["b_mid"] if self.with_bias else z)
