"""The linear connector with a ReLU: target codes are never negative, so neither are its predictions.

y_hat = ReLU(x W_dec + b_dec)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.connectors.connector import register_connector
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.sparse_product import Codes, times
from sparse_jax.dictionaries.protocol import Params
from sparse_jax.errors import InputError

# Starting weights: small and positive, since a ReLU that is silent on all rows is never trained.
_START = 1e-3


@register_connector("relu-linear")
@dataclass(frozen=True)
class ReLULinear(Linear):
    """Each target the ReLU of a weighted sum of inputs."""

    def init_weights(self, key: jax.Array) -> Params:
        """Small and positive, uniform."""
        W = jax.random.uniform(key, (self.d_in, self.d_out), jnp.float32, 0, 2 * _START)
        return {"W_dec": W}

    def preactivations(self, params: Params, x: Codes) -> jax.Array:
        """`[rows, d_out]`, before the ReLU."""
        z = times(x, params["W_dec"])
        return z + params["b_dec"] if self.with_bias else z

    def decode(self, params: Params, codes: Codes, x: Codes | None = None) -> jax.Array:
        """`y_hat`."""
        return jax.nn.relu(self.preactivations(params, codes))

    def directions(self, params: Params) -> jax.Array:
        """Raises InputError: what an input adds depends on the others."""
        raise InputError("a relu_linear connector has no directions: its predictions are not sums over inputs")
