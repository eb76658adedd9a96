"""LISTA: some iterations of shrinkage, their matrices and thresholds learned. Source: Gregor & LeCun 2010 (LISTA); Chen
et al. 2018 (weights coupled to the dictionary, their eq. 10).

    c_0 = 0,   c_{t+1} = ReLU(c_t + (x - b_dec - c_t W_dec) W_enc - theta_t)        t < steps, theta_t >= 0
    x_hat = c W_dec + b_dec                                                          rows of W_dec have norm 1
    loss  = ||x - x_hat||^2 + l1 sum_j c_j                                           mean over rows

Gregor and LeCun learn the two matrices of c_{t+1} = h(x W_enc + c_t S - theta) freely; with S = I - W_dec W_enc, which
Chen et al. show that they must come to, no matrix of n x n is needed, and the first iteration is a ReLU autoencoder.
One W_enc serves all iterations, each has thresholds of its own. It is trained as an autoencoder, without solved codes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import (
    Batch,
    Context,
    Losses,
    Params,
    firings,
    reconstruction_loss,
    register,
    weighted_mean,
)
from sparse_jax.dictionaries.unit_norm import UnitNormDecoder
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul


@register("lista")
@dataclass(frozen=True)
class Lista(UnitNormDecoder):
    """Unrolled and learned shrinkage (Gregor & LeCun 2010).

    Attributes:
        l1: coefficient of the penalty, as in L1.
        steps: iterations; 1 is a ReLU autoencoder whose bias cannot be positive.
    """

    l1: float = 2.1
    steps: int = 3

    def __post_init__(self):
        super().__post_init__()
        if not self.l1 >= 0:
            raise InputError(f"--l1 {self.l1}: the l1 coefficient cannot be negative")
        if self.steps < 1:
            raise InputError(f"--steps {self.steps}: give at least one iteration")

    @property
    def sparsity_coefficient(self) -> str | None:
        return "l1"

    @property
    def coefficients(self) -> dict[str, float]:
        return {"l1": self.l1}

    def init(self, key: jax.Array) -> Params:
        """`init_linear`, and thresholds of 0.01: none of them is held at 0 from the start."""
        thresholds = jnp.full((self.steps, self.n_features), 0.01, jnp.float32)
        return self.init_linear(key) | {"thresholds": thresholds}

    def centred(self, params: Params, x: jax.Array) -> jax.Array:
        """`x - b_dec`: what codes are to explain; whatever `centring` says, the decoder adds b_dec."""
        return x - params["b_dec"] if self.decoder_bias else x

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """Codes after `steps` iterations."""
        x, W_enc, W_dec = self.centred(params, x), params["W_enc"], params["W_dec"]
        codes = jax.nn.relu(matmul(x, W_enc, self.compute_dtype) - params["thresholds"][0])
        for t in range(1, self.steps):
            left = x - matmul(codes, W_dec, self.compute_dtype)
            codes = jax.nn.relu(codes + matmul(left, W_enc, self.compute_dtype) - params["thresholds"][t])
        return codes

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" and "l1"."""
        codes = self.encode(params, batch.x)
        y_hat = self.decode(params, codes)
        size = weighted_mean(jnp.sum(codes, axis=-1), batch.weight)
        terms = {"reconstruction": reconstruction_loss(y_hat, batch), "l1": ctx.coefficients["l1"] * size}
        return Losses(terms, y_hat, firings(codes, batch.weight), {})

    def project(self, params: Params) -> Params:
        """Rows of W_dec of norm 1, thresholds not below 0."""
        params = super().project(params)
        return {**params, "thresholds": jnp.maximum(params["thresholds"], 0)}
