"""The Gated sparse autoencoder. Source: Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse
Autoencoders" (arXiv 2404.16014), sections 3.2.1 (encoder) and 3.2.2 (loss), appendix G (pseudo-code).

    pi_gate = (x - b_dec) W_enc + b_gate
    pi_mag  = exp(r_mag) * ((x - b_dec) W_enc) + b_mag       weights shared, up to a scale for each feature
    c       = 1[pi_gate > 0] * ReLU(pi_mag)
    x_hat   = c W_dec + b_dec                                rows of W_dec have norm 1
    loss    = ||x - x_hat||^2 + l1 * sum_i ReLU(pi_gate_i)
              + ||x - (ReLU(pi_gate) stop(W_dec) + stop(b_dec))||^2          mean over rows

The penalty acts on the gate alone, so magnitudes are not shrunk. The step has no gradient: the gate learns from the
penalty and from the last, auxiliary term, in which the decoder is a constant (stop). b_dec still learns there through
the centring of pi_gate, as in the paper's pseudo-code.

All biases and r_mag start at 0. The paper trains by Adam with b1 = 0 and resamples dead features. SAELens' trainer
differs: no stop in the auxiliary term, a penalty weighed by decoder norms.
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


@register("gated")
@dataclass(frozen=True)
class Gated(UnitNormDecoder):
    """Sparse autoencoder that decides apart which features fire and how strongly (Rajamanoharan et al. 2024).

    Attributes:
        l1: coefficient of sum ReLU(pi_gate), in units of normalised activations; larger is sparser.
    """

    l1: float = 2.1

    def __post_init__(self):
        super().__post_init__()
        if self.l1 < 0:
            raise InputError(f"--l1 {self.l1}: the l1 coefficient cannot be negative")

    @property
    def sparsity_coefficient(self) -> str | None:
        return "l1"

    @property
    def coefficients(self) -> dict[str, float]:
        return {"l1": self.l1}

    def init(self, key: jax.Array) -> Params:
        """`init_linear`, and b_gate, b_mag and r_mag `[n_features]` of 0."""
        return self.init_linear(key) | {
            name: jnp.zeros(self.n_features, jnp.float32) for name in ("b_gate", "b_mag", "r_mag")
        }

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """`1[pi_gate > 0] * ReLU(pi_mag)`, in training too."""
        return self.gates_and_codes(params, x)[1]

    def gates_and_codes(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`pi_gate` and codes, both `[rows, n_features]`."""
        shared = matmul(self.centred(params, x), params["W_enc"], self.compute_dtype)
        gate = shared + params["b_gate"]
        magnitude = jax.nn.relu(jnp.exp(params["r_mag"]) * shared + params["b_mag"])
        return gate, jnp.where(gate > 0, magnitude, 0)

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction", "l1" (of the gate alone) and "auxiliary" (the gate through a constant decoder)."""
        gate, codes = self.gates_and_codes(params, batch.x)
        y_hat = self.decode(params, codes)
        opened = jax.nn.relu(gate)
        constant = {name: jax.lax.stop_gradient(params[name]) for name in ("W_dec", "b_dec") if name in params}
        terms = {
            "reconstruction": reconstruction_loss(y_hat, batch),
            "l1": ctx.coefficients["l1"] * weighted_mean(jnp.sum(opened, axis=-1), batch.weight),
            "auxiliary": reconstruction_loss(self.decode(constant, opened), batch),
        }
        return Losses(terms, y_hat, firings(codes, batch.weight), {})
