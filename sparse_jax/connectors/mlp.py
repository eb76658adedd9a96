"""The connector with one hidden layer.

    h     = ReLU(x W_enc + b_enc)
    y_hat = h W_dec + b_dec

A width of 512 by default: twice the 256 directions that features of the widest model bundled here stand in, which
bounds what one linear map can carry, and a quarter of 2,048 targets, where the error is had from moments of the hidden
codes (squared_error.py) and a step takes about as long as a linear connector's. `n_features` sweeps it.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_jax.connectors.connector import Connector, register_connector
from sparse_jax.connectors.sparse_product import Codes, times
from sparse_jax.connectors.squared_error import readout_error
from sparse_jax.dictionaries.protocol import Batch, Params


@register_connector("mlp")
@dataclass(frozen=True)
class MLP(Connector):
    """One hidden layer of ReLU units.

    Attributes:
        n_features: hidden units.
    """

    n_features: int = 512

    reads_writes: ClassVar = {"W_enc": ("input", "hidden"), "W_dec": ("hidden", "target")}
    bias_sides: ClassVar = {"b_enc": "hidden", "b_dec": "target"}

    def init_weights(self, key: jax.Array) -> Params:
        """Normal. He et al. 2015 for what has a root mean square of 1: hidden codes start with a mean square of 1."""
        return {
            "W_enc": normal(jax.random.fold_in(key, 0), self.d_in, self.n_features, 2 / self.d_in),
            "W_dec": normal(jax.random.fold_in(key, 1), self.n_features, self.d_out, 1 / self.n_features),
        }

    def encode(self, params: Params, x: Codes) -> jax.Array:
        """`h`."""
        z = times(x, params["W_enc"])
        return jax.nn.relu(z + params["b_enc"] if self.with_bias else z)

    def decode(self, params: Params, codes: jax.Array, x: Codes | None = None) -> jax.Array:
        """`y_hat`."""
        y_hat = times(codes, params["W_dec"])
        return y_hat + params["b_dec"] if self.with_bias else y_hat

    def squared_error(self, params: Params, hidden: jax.Array, batch: Batch) -> jax.Array:
        """Where targets are sparse, without making the predictions."""
        b = params["b_dec"] if self.with_bias else None
        return readout_error(hidden, params["W_dec"], b, batch.target, params["target_scale"], batch.weight)


def normal(key: jax.Array, n_in: int, n_out: int, variance: float) -> jax.Array:
    """`[n_in, n_out]` normal weights."""
    return variance**0.5 * jax.random.normal(key, (n_in, n_out), jnp.float32)
