"""What L1, Gated and JumpReLU share: a linear decoder with rows of norm 1, and an encoder that starts as its transpose.

    x_hat = c W_dec + b_dec                rows of W_dec have norm 1
    at the start: W_enc = encoder_scale * W_dec^T with encoder_scale = min(1, d_in / n_features), all biases 0
                  (L1 with a decoder_norm other than 1 then scales W_dec alone, not W_enc)

Without the constraint a penalty on the codes could be evaded: smaller codes, longer rows. Bricken et al. 2023 keep it
by two steps around the optimiser: the part of a gradient along its row is removed, and rows are rescaled afterwards.

The start. With encoder_scale 1 half of the n features fire on a row of x, and their overlapping directions add up to
about n / (2 d) times x, plus noise: with n = 8 d the reconstruction has an FVU of about 13. Scaling the encoder by
d / n starts near the best multiple, below an FVU of 1. The norms of W_enc = W_dec^T at the start are 0.05 to 1 in
Conerly et al. 2024, 0.1 in SAELens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import Dictionary, Params
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul, unit_rows


def unit_norm_tangent(params: Params, grads: Params) -> Params:
    """Gradients without the part of W_dec's that points along its (unit) rows."""
    # A step along a unit row only changes its length, which the projection undoes: Adam's moments would hold noise.
    W, g = params["W_dec"], grads["W_dec"]
    return {**grads, "W_dec": g - jnp.sum(g * W, axis=-1, keepdims=True) * W}


def unit_norm_project(params: Params) -> Params:
    """Parameters with the rows of W_dec scaled back to norm 1; a zero row stays zero."""
    return {**params, "W_dec": unit_rows(params["W_dec"])}


@dataclass(frozen=True)
class UnitNormDecoder(Dictionary):
    """A linear decoder whose rows have norm 1.

    Attributes:
        decoder_bias: learn b_dec.
        centring: subtract b_dec from the input before encoding.
        encoder_scale: norm of the encoder's columns at the start, where the encoder has weights of its own; 0 means
            d_in / n_features.
    """

    decoder_bias: bool = True
    centring: bool = True
    encoder_scale: float = 0.0

    def __post_init__(self):
        if not self.encoder_scale >= 0:
            raise InputError(
                f"--encoder-scale {self.encoder_scale}: give a positive number, or 0 for d_in / n_features"
            )

    @property
    def constrained(self) -> bool:
        """Whether the rows of W_dec are held at norm 1."""
        return True

    def init_linear(self, key: jax.Array) -> Params:
        """W_dec with random unit rows, W_enc as its scaled transpose, and b_dec = 0 where there is one."""
        W_dec = unit_rows(jax.random.normal(key, (self.n_features, self.d_out), jnp.float32))
        scale = self.encoder_scale or min(1.0, self.d_in / self.n_features)
        params = {"W_dec": W_dec, "W_enc": scale * W_dec.T}
        if self.decoder_bias:
            params["b_dec"] = jnp.zeros(self.d_out, jnp.float32)
        return params

    def centred(self, params: Params, x: jax.Array) -> jax.Array:
        """What the encoder sees: `x - b_dec` with centring, else x."""
        return x - params["b_dec"] if self.decoder_bias and self.centring else x

    def decode(self, params: Params, codes: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """`codes W_dec + b_dec`, the bias where there is one."""
        y_hat = matmul(codes, params["W_dec"], self.compute_dtype)
        return y_hat + params["b_dec"] if self.decoder_bias else y_hat

    def tangent(self, params: Params, grads: Params) -> Params:
        """Without the part of W_dec's gradient along its rows, where these are held at norm 1."""
        return unit_norm_tangent(params, grads) if self.constrained else grads

    def project(self, params: Params) -> Params:
        """Rows of W_dec back at norm 1, where they are held there."""
        return unit_norm_project(params) if self.constrained else params

    def directions(self, params: Params) -> jax.Array:
        """The rows of W_dec."""
        return params["W_dec"]
