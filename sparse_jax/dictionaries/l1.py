"""The L1 sparse autoencoder. Source: Cunningham et al. 2023 (tied); Bricken et al. 2023 (untied, decoder bias);
Conerly et al. 2024, "Update on how we train SAEs" (the penalty weighted by decoder norms).

    z     = (x - b_dec) W_enc + b_enc                tied: W_enc = W_dec^T
    c     = ReLU(z)                                  or softplus(z) = log(1 + exp(z))
    x_hat = c W_dec + b_dec                          rows d_i of W_dec have norm 1
    loss  = ||x - x_hat||^2 + l1 * sum_i c_i         mean over rows

With `norm_weighted` the penalty is l1 * sum_i c_i ||d_i|| and the rows of W_dec are free: the penalty can no longer be
evaded by long rows, so nothing need be projected. Conerly et al. start with ||d_i|| between 0.05 and 1 (0.1 in
SAELens), W_enc = W_dec^T and l1 about 5 on activations scaled to a mean norm of sqrt(d), nearly as here
(E||x||^2 = d), and warm l1 up over the first 5 % of the run.

Softplus has a gradient everywhere, so no feature can die, but its codes are never 0. They are left whole in training;
`encode`, and with it every count of firing features, takes codes up to SOFTPLUS_SILENT (0.01) for 0. Leaving those out
changes the reconstruction by at most 0.01 sqrt(n_features) or so in norm, where ||x|| is about sqrt(d).

Without `decoder_bias` there is no b_dec at all; without `centring` it is not subtracted from the input.
The code of Cunningham et al. takes the squared error as a mean over d and calls the coefficient alpha: l1 = alpha * d
here (times the scale of the activations, where theirs are not normalised).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries import chunked_gradient, l1_gradient
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
from sparse_jax.numerics import matmul, safe_norm

# A softplus code up to this counts as silent: a hundredth of an activation's standard deviation.
SOFTPLUS_SILENT = 0.01


@register("l1")
@dataclass(frozen=True)
class L1(UnitNormDecoder):
    """Sparse autoencoder with an l1 penalty and unit-norm features (Cunningham et al. 2023).

    Attributes:
        l1: coefficient of sum |c|, in units of normalised activations; larger is sparser.
        tied: use the transposed decoder as the encoder.
        activation: relu, or softplus, which leaves a gradient to silent features.
        norm_weighted: weigh each code in the penalty by its decoder row's norm, in place of the unit-norm constraint.
        decoder_norm: norm of the decoder's rows at the start; other than 1 only with norm_weighted.
    """

    l1: float = 2.1
    tied: bool = False
    activation: Literal["relu", "softplus"] = "relu"
    norm_weighted: bool = False
    decoder_norm: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.l1 < 0:
            raise InputError(f"--l1 {self.l1}: the l1 coefficient cannot be negative")
        if self.activation not in ("relu", "softplus"):
            raise InputError(f"--activation {self.activation}: give relu or softplus")
        if not self.decoder_norm > 0:
            raise InputError(f"--decoder-norm {self.decoder_norm}: give a positive number")
        if self.decoder_norm != 1 and not self.norm_weighted:
            raise InputError(f"--decoder-norm {self.decoder_norm}: rows are held at norm 1 without --norm-weighted")

    @property
    def constrained(self) -> bool:
        """Unless the penalty weighs codes by the norms of their rows."""
        return not self.norm_weighted

    @property
    def sparsity_coefficient(self) -> str | None:
        return "l1"

    @property
    def coefficients(self) -> dict[str, float]:
        return {"l1": self.l1}

    def init(self, key: jax.Array) -> Params:
        """`init_linear` with rows of W_dec at `decoder_norm`, and b_enc = 0; without W_enc where it is tied."""
        params = self.init_linear(key) | {"b_enc": jnp.zeros(self.n_features, jnp.float32)}
        params["W_dec"] = self.decoder_norm * params["W_dec"]
        if self.tied:
            del params["W_enc"]
        return params

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """Training codes; of softplus', those up to SOFTPLUS_SILENT are 0."""
        return self.silenced(self.training_codes(params, x))

    def training_codes(self, params: Params, x: jax.Array) -> jax.Array:
        """Codes as the loss has them: softplus' are never 0."""
        W_enc = params["W_dec"].T if self.tied else params["W_enc"]
        z = matmul(self.centred(params, x), W_enc, self.compute_dtype) + params["b_enc"]
        return self.activated(z)

    def activated(self, z: jax.Array) -> jax.Array:
        """The activation function of pre-activations."""
        return jax.nn.relu(z) if self.activation == "relu" else jax.nn.softplus(z)

    def silenced(self, codes: jax.Array) -> jax.Array:
        """Training codes without those that count as silent."""
        return codes if self.activation == "relu" else jnp.where(codes > SOFTPLUS_SILENT, codes, 0)

    def penalised(self, params: Params, codes: jax.Array) -> jax.Array:
        """`[rows, n_features]`: what the penalty is a sum over."""
        return codes * safe_norm(params["W_dec"]) if self.norm_weighted else codes

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" and "l1", both of the training codes; features fire where `encode` is not 0."""
        codes = self.training_codes(params, batch.x)
        y_hat = self.decode(params, codes)
        penalty = weighted_mean(jnp.sum(self.penalised(params, codes), axis=-1), batch.weight)
        terms = {"reconstruction": reconstruction_loss(y_hat, batch), "l1": ctx.coefficients["l1"] * penalty}
        return Losses(terms, y_hat, firings(self.silenced(codes), batch.weight), {})

    def value_and_grad(self, params: Params, batch: Batch, ctx: Context) -> tuple[jax.Array, Losses, Params]:
        """By hand (l1_gradient.py) for this loss; for a subclass with a loss of its own by autodiff."""
        if type(self).loss is not L1.loss:  # the gradient written by hand is that of this loss alone
            return super().value_and_grad(params, batch, ctx)
        return l1_gradient.value_and_grad(self, params, batch, ctx)

    @property
    def in_feature_chunks(self) -> bool:
        """Whether there is a step in chunks of features: for this loss."""
        return type(self).loss is L1.loss

    def chunked_value_and_grad(
        self, params: Params, batch: Batch, ctx: Context, chunks: int
    ) -> tuple[jax.Array, Losses, Params]:
        """`value_and_grad` in chunks of features (chunked_gradient.py); only where `in_feature_chunks`."""
        return chunked_gradient.chunked_value_and_grad(self, params, batch, ctx, chunks)
