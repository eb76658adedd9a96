"""The autoencoder connector: sparse hidden codes between inputs and targets, each a reading of what the module did.

    h     = ReLU(x W_enc + b_enc)
    y_hat = h W_dec + b_dec
    loss  = squared error + alpha * |W|_1 + hidden_l1 * mean over rows of sum_k h_k ||W_dec_k / s||

The penalty counts each hidden code times the norm of its row of W_dec in scaled units: otherwise small codes with
large rows would evade it (with alpha > 0 the l1 norm of the weights would hold them back, if less). `norm_weighted`
False is the plain sum of codes. Source: the norm weighting is that of Conerly et al. 2024.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.connectors.connector import register_connector
from sparse_jax.connectors.mlp import MLP
from sparse_jax.dictionaries.protocol import Batch, Context, Params, weighted_mean
from sparse_jax.errors import InputError
from sparse_jax.numerics import safe_norm


@register_connector("autoencoder")
@dataclass(frozen=True)
class AutoencoderConnector(MLP):
    """One hidden layer of sparse ReLU codes.

    Attributes:
        n_features: hidden codes.
        hidden_l1: weight of the l1 norm of the hidden codes.
        norm_weighted: count each code times the norm of what a unit of it adds to the scaled targets.
    """

    n_features: int = 1024
    hidden_l1: float = 0.1
    norm_weighted: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_l1 < 0:
            raise InputError(f"--hidden-l1 {self.hidden_l1}: the weight of a penalty cannot be negative")

    @property
    def coefficients(self) -> dict[str, float]:
        """`alpha` and `hidden_l1`."""
        return {**super().coefficients, "hidden_l1": self.hidden_l1}

    @property
    def sparsity_coefficient(self) -> str:
        return "hidden_l1"

    def smooth_terms(self, params: Params, hidden: jax.Array, batch: Batch, ctx: Context) -> dict[str, jax.Array]:
        """With "hidden_l1"."""
        norms = safe_norm(params["W_dec"] / params["target_scale"]) if self.norm_weighted else None
        codes = hidden if norms is None else hidden * norms
        penalty = ctx.coefficients["hidden_l1"] * weighted_mean(jnp.sum(codes, axis=-1), batch.weight)
        return {**super().smooth_terms(params, hidden, batch, ctx), "hidden_l1": penalty}
