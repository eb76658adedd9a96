"""The L1 sparse autoencoder. Source: Cunningham et al. 2023 (tied); Bricken et al. 2023 (untied, decoder bias).

    c     = ReLU((x - b_dec) W_enc + b_enc)          tied: W_enc = W_dec^T
    x_hat = c W_dec + b_dec                          rows of W_dec have norm 1
    loss  = ||x - x_hat||^2 + l1 * sum_i c_i         mean over rows

Without `decoder_bias` there is no b_dec at all; without `centring` it is not subtracted from the input.
Cunningham et al. write MSE as a mean over d and call the coefficient alpha: l1 = alpha * d here (times the scale of the
activations, where theirs are not normalised).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import (
    Batch,
    Context,
    Dictionary,
    Losses,
    Params,
    firings,
    reconstruction_loss,
    register,
    weighted_mean,
)
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul, unit_rows


@register("l1")
@dataclass(frozen=True)
class L1(Dictionary):
    """Sparse autoencoder with an l1 penalty and unit-norm features (Cunningham et al. 2023).

    Attributes:
        l1: coefficient of sum |c|, in units of normalised activations; larger is sparser.
        tied: use the transposed decoder as the encoder.
        decoder_bias: learn b_dec.
        centring: subtract b_dec from the input before encoding.
    """

    l1: float = 2.1
    tied: bool = False
    decoder_bias: bool = True
    centring: bool = True

    def __post_init__(self):
        if self.l1 < 0:
            raise InputError(f"--l1 {self.l1}: the l1 coefficient cannot be negative")

    @property
    def coefficients(self) -> dict[str, float]:
        return {"l1": self.l1}

    def init(self, key: jax.Array) -> Params:
        W_dec = unit_rows(jax.random.normal(key, (self.n_features, self.d_out), jnp.float32))
        params = {"W_dec": W_dec, "b_enc": jnp.zeros(self.n_features, jnp.float32)}
        if not self.tied:
            params["W_enc"] = W_dec.T
        if self.decoder_bias:
            params["b_dec"] = jnp.zeros(self.d_out, jnp.float32)
        return params

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        if self.decoder_bias and self.centring:
            x = x - params["b_dec"]
        W_enc = params["W_dec"].T if self.tied else params["W_enc"]
        return jax.nn.relu(matmul(x, W_enc, self.compute_dtype) + params["b_enc"])

    def decode(self, params: Params, codes: jax.Array, x: jax.Array | None = None) -> jax.Array:
        y_hat = matmul(codes, params["W_dec"], self.compute_dtype)
        return y_hat + params["b_dec"] if self.decoder_bias else y_hat

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        codes = self.encode(params, batch.x)
        y_hat = self.decode(params, codes)
        terms = {
            "reconstruction": reconstruction_loss(y_hat, batch),
            "l1": ctx.coefficients["l1"] * weighted_mean(jnp.sum(codes, axis=-1), batch.weight),
        }
        return Losses(terms, y_hat, firings(codes, batch.weight), {})

    def tangent(self, params: Params, grads: Params) -> Params:
        # A step along a unit row only changes its length, which `project` undoes: Adam's moments would hold noise.
        W, g = params["W_dec"], grads["W_dec"]
        return {**grads, "W_dec": g - jnp.sum(g * W, axis=-1, keepdims=True) * W}

    def project(self, params: Params) -> Params:
        return {**params, "W_dec": unit_rows(params["W_dec"])}

    def directions(self, params: Params) -> jax.Array:
        return params["W_dec"]
