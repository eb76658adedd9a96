"""The Multi-TopK sparse autoencoder. Source: Gao et al. 2024 (Multi-TopK).

    loss = ||x - x_hat_k||^2 + wide_coefficient * ||x - x_hat_{4k}||^2 + AuxK on what x_hat_k leaves

x_hat_k is TopK's reconstruction; x_hat_{4k} is by the 4k largest features of each row. A dictionary trained at one k
reconstructs badly with more features than that; with the second term, weighted 1/8, it is a progressive code: it may
be used with any number of features or with a threshold. Encoding is TopK's, with k.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import Batch, Context, Losses, Params, firings, reconstruction_loss, register
from sparse_jax.dictionaries.topk import TopK, current_k
from sparse_jax.errors import InputError
from sparse_jax.numerics.topk import top_k_mask


@register("multi-topk")
@dataclass(frozen=True)
class MultiTopK(TopK):
    """TopK that also reconstructs from several times k features (Gao et al. 2024).

    Attributes:
        wide: how many times k the second reconstruction uses.
        wide_coefficient: weight of its error.
    """

    wide: int = 4
    wide_coefficient: float = 1 / 8

    def __post_init__(self):
        super().__post_init__()
        if self.wide < 2:
            raise InputError(f"--wide {self.wide}: the second reconstruction must use at least 2 times k features")
        if self.wide_coefficient < 0:
            raise InputError(f"--wide-coefficient {self.wide_coefficient}: the coefficient cannot be negative")

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" (k features), "wide" (`wide` times k) and "aux_k"."""
        values = self.preactivations(params, batch.x)
        positive = jax.nn.relu(values)
        k = current_k(ctx)
        codes = jnp.where(top_k_mask(positive, self.k_bound, k), positive, 0)
        wide_codes = jnp.where(top_k_mask(positive, self.wide * self.k_bound, self.wide * k), positive, 0)
        y_hat = self.decode(params, codes)
        wide = reconstruction_loss(self.decode(params, wide_codes), batch)
        terms = {
            "reconstruction": reconstruction_loss(y_hat, batch),
            "wide": self.wide_coefficient * wide,
            "aux_k": self.aux_k_term(params, values, batch.target - y_hat, batch, ctx),
        }
        return Losses(terms, y_hat, firings(codes, batch.weight), {})
