"""The linear connector: each target is a weighted sum of inputs.

    y_hat = x W_dec + b_dec

With the squared error and the l1 penalty it is the lasso of each target, see `linear_path.py` for its exact solution.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_jax.connectors.connector import Connector, register_connector
from sparse_jax.connectors.sparse_product import Codes, times
from sparse_jax.dictionaries.protocol import Params


@register_connector("linear")
@dataclass(frozen=True)
class Linear(Connector):
    """Each target a weighted sum of inputs."""

    reads_writes: ClassVar = {"W_dec": ("input", "target")}
    bias_sides: ClassVar = {"b_dec": "target"}

    def sized(self, d_in: int, d_out: int | None = None, compute_dtype: str = "float32"):
        """This connector for so many inputs and targets."""
        return Connector.sized(dataclasses.replace(self, n_features=d_in), d_in, d_out, compute_dtype)

    def init_weights(self, key: jax.Array) -> Params:
        """Zeros: the loss is convex."""
        return {"W_dec": jnp.zeros((self.d_in, self.d_out), jnp.float32)}

    def encode(self, params: Params, x: Codes) -> Codes:
        """The inputs themselves."""
        return x

    def decode(self, params: Params, codes: Codes, x: Codes | None = None) -> jax.Array:
        """`codes W_dec + b_dec`."""
        y_hat = times(codes, params["W_dec"])
        return y_hat + params["b_dec"] if self.with_bias else y_hat

    def weights(self, params: Params) -> jax.Array:
        return params["W_dec"]
