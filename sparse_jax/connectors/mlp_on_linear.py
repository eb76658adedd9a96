"""The MLP beside a linear connector that stays as it is: what its hidden layer adds is what no linear map gives.

    h     = ReLU(x W_enc + b_enc)
    y_hat = x W_skip + h W_dec + b_dec            W_skip: of a linear connector, frozen; W_dec starts at 0

A plain MLP of few units must also carry the linear part, and cannot: linear maps between the codes of two dictionaries
have a high rank (of one between 2,048 features, the best map of rank 256, which is what 512 units can hold, kept an R^2
of 0.26 of 0.38). Beside that linear map it then looks worse for lack of width, not of nonlinearity. This one starts at
the linear map, so that the difference between the two is the hidden layer's.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_jax.connectors.connector import Connector, Trained, register_connector
from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.sparse_product import Codes, times
from sparse_jax.dictionaries.protocol import Batch, Params


@register_connector("mlp-on-linear")
@dataclass(frozen=True)
class MLPOnLinear(MLP):
    """One hidden layer of ReLU units beside a frozen linear map.

    Attributes:
        n_features: hidden units.
    """

    reads_writes: ClassVar = {**MLP.reads_writes, "W_skip": ("input", "target")}

    @property
    def frozen(self) -> tuple[str, ...]:
        """The linear map, and the units."""
        return (*super().frozen, "W_skip")

    def init_weights(self, key: jax.Array) -> Params:
        """As in mlp.py but for W_dec, 0, so that training starts at the linear map; the map itself is 0."""
        params = super().init_weights(key)
        return {
            **params,
            "W_dec": jnp.zeros_like(params["W_dec"]),
            "W_skip": jnp.zeros((self.d_in, self.d_out), jnp.float32),
        }

    def decode(self, params: Params, codes: jax.Array, x: Codes | None = None) -> jax.Array:
        """`y_hat`; without `x` the hidden layer's part and the bias alone."""
        y_hat = super().decode(params, codes)
        return y_hat if x is None else y_hat + times(x, params["W_skip"])

    def squared_error(self, params: Params, hidden: jax.Array, batch: Batch) -> jax.Array:
        """From the predictions: what the linear map leaves over of sparse targets is not sparse."""
        return Connector.squared_error(self, params, hidden, batch)

    def start(self, linear: Trained, key: jax.Array) -> Trained:
        """This connector before training: it predicts what `linear` does, to rounding.

        Args:
            linear: of the kind "linear", with the units of the loss.
            key: of the hidden layer's weights.

        Raises:
            InputError: `linear` has no single matrix.
        """
        weights = linear.weights()
        sized = self.sized(*weights.shape)
        units = {name: linear.params[name] for name in ("input_norm", "target_scale")}
        params = sized.in_own_units(sized.init(key), **units)
        return Trained(sized, params | {"W_skip": weights} | ({"b_dec": linear.bias()} if self.with_bias else {}))
