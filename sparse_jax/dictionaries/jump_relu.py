"""The JumpReLU sparse autoencoder. Source: Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity
with JumpReLU Sparse Autoencoders"; the tanh penalty: Anthropic's "Circuits Updates", January 2025.

    z     = x W_enc + b_enc                          with `centring`: x - b_dec in place of x
    c     = ReLU(z) * H(ReLU(z) - theta)             H(u) = 1 for u > 0, else 0; theta_i = exp(log_threshold_i)
    x_hat = c W_dec + b_dec                          d_i: row i of W_dec
    loss  = ||x - x_hat||^2 + penalty                mean over rows

    step:       l0 * sum_i H(z_i - theta_i)                   the paper's; rows d_i held at norm 1 as in Gemma Scope
    quadratic:  l0 * (L0 / target_l0 - 1)^2                   L0 = mean over rows of the sum of steps; the same norms
    tanh:       l0 * sum_i tanh(tanh_scale c_i ||d_i||) + pre_act * sum_i ReLU(theta_i - z_i) ||d_i||       d_i free

Thresholds only have a pseudo-gradient, straight through the jump, as in the paper: with K the rectangle,
K(u) = 1 for |u| < 1/2, else 0, and e the bandwidth,

    d JumpReLU / d theta = -(theta / e) K((z - theta) / e)        d JumpReLU / d z = H(z - theta)
    d H / d theta        = -(1 / e)     K((z - theta) / e)        d H / d z        = 0

so that an average over rows is a kernel estimate, from the z near theta, of the derivative of the expected loss. The
ReLU before the jump makes values below 0 equal to 0; those are no estimate of anything and K leaves them out, which
matters only once theta < e / 2.

Anthropic (January 2025) let the straight-through gradient flow into all parameters, not into thresholds alone. SAELens
writes that (`jumprelu_ste_to_input`) as d JumpReLU / d z = H(z - theta) + (theta / e) K((z - theta) / e); here, as in
Rajamanoharan et al., the second term is missing.

Units. The paper has E||x||^2 = 1, here it is d: `threshold` and `bandwidth` are in the paper's units, and are
multiplied by sqrt(d_in). The paper starts at 0.001 with a bandwidth of 0.001, for runs of 10^9 tokens and more. There,
few rows fall within a kernel, and Adam moves a log threshold by at most its learning rate a step: in a short run nearly
all features stay on. So the defaults are 0.02 for both, and thresholds learn 3 times as fast as the rest. The
coefficients are in this library's units as everywhere (the paper's lambda times d_in). Anthropic's activations are
scaled to a mean norm of sqrt(d), nearly as here: their first threshold 0.1 and bandwidth 2 are 0.1 / sqrt(d_in) and
2 / sqrt(d_in) in these fields; tanh_scale 4 and pre_act 3e-6 are theirs; l0 rises over the whole run, as theirs does;
their learning rate falls over the last 20 %, as by this library's default schedule. What they also do and this does
not: encoder biases that start with every feature at the same rate; entries of W_dec uniform in +-1 / sqrt(n), so that
rows start with a norm of about 0.58, and W_enc = (n / m) W_dec^T, for n inputs and m features (that factor is the
default here too).

Where sources differ: quadratic takes the mean L0 of the batch as dictionary_learning does, not that of each row, which
would hold every row to the same count. The related penalty of Gemma Scope 2 (eq. 5), which SAELens 6.54 has, is of each
row: l0 * (2 / target_l0) * (||c||_0 - target_l0)^2; for one coefficient it is 2 target_l0 times as large as ours.
SAELens adds pre_act for dead features only; here, as in the update, for all. Neither library puts a ReLU before the
jump.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import (
    HELD,
    Batch,
    Context,
    Losses,
    Params,
    Ramp,
    firings,
    reconstruction_loss,
    register,
    weighted_mean,
)
from sparse_jax.dictionaries.unit_norm import UnitNormDecoder
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul, safe_norm

# Coefficient of each penalty where none is given.
DEFAULT_L0 = {"step": 1.0, "tanh": 1.0, "quadratic": 10.0}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump_relu(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """`z` where it exceeds its threshold, else 0; with the pseudo-gradient of the header for the threshold.

    Args:
        z: `[rows, n]`, not negative.
        threshold: `[n]`.
        bandwidth: width of the rectangle kernel, in the units of z.
    """
    return jnp.where(z > threshold, z, 0)


def _jump_relu_forward(z, threshold, bandwidth):
    return jump_relu(z, threshold, bandwidth), (z, threshold)


def _jump_relu_backward(bandwidth, saved, g):
    z, threshold = saved
    near = jnp.sum(jnp.where(_near(z, threshold, bandwidth), g, 0), axis=0)
    return jnp.where(z > threshold, g, 0), -threshold / bandwidth * near


jump_relu.defvjp(_jump_relu_forward, _jump_relu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """1 where `z` exceeds its threshold, else 0, in z's dtype; arguments and pseudo-gradient as `jump_relu`'s."""
    return (z > threshold).astype(z.dtype)


def _step_forward(z, threshold, bandwidth):
    return step(z, threshold, bandwidth), (z, threshold)


def _step_backward(bandwidth, saved, g):
    z, threshold = saved
    near = jnp.sum(jnp.where(_near(z, threshold, bandwidth), g, 0), axis=0)
    return jnp.zeros_like(z), -near / bandwidth


step.defvjp(_step_forward, _step_backward)


def _near(z, threshold, bandwidth):
    """Where the rectangle kernel about the threshold is not 0."""
    return (jnp.abs(z - threshold) < bandwidth / 2) & (z > 0)


@register("jump-relu")
@dataclass(frozen=True)
class JumpReLU(UnitNormDecoder):
    """Sparse autoencoder with a learned threshold for each feature (Rajamanoharan et al. 2024).

    Attributes:
        penalty: step (the count), quadratic (its distance from target_l0) or tanh (Anthropic, January 2025).
        l0: coefficient of the penalty; by default 1 for step and tanh, 10 for quadratic.
        target_l0: wished mean number of active features, for quadratic.
        threshold: where thresholds start, for activations with E||x||^2 = 1.
        bandwidth: width of the kernel that estimates their gradients, for activations with E||x||^2 = 1.
        threshold_rate: learning rate of the log thresholds over that of the other parameters.
        tanh_scale: how fast tanh's penalty saturates.
        pre_act: coefficient of tanh's pull on pre-activations below their thresholds.
        centring: subtract b_dec from the input before encoding; off by default. Optional in ports of the authors' code,
            used by Gemma Scope.
    """

    penalty: Literal["step", "tanh", "quadratic"] = "step"
    l0: float | None = None
    target_l0: float = 32.0
    threshold: float = 0.02
    bandwidth: float = 0.02
    threshold_rate: float = 3.0
    tanh_scale: float = 4.0
    pre_act: float = 3e-6
    centring: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.penalty not in DEFAULT_L0:
            raise InputError(f"--penalty {self.penalty}: give one of {', '.join(DEFAULT_L0)}")
        for name in ("l0", "pre_act"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: a coefficient cannot be negative")
        for name in ("target_l0", "threshold", "bandwidth", "threshold_rate", "tanh_scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a positive number")

    @property
    def constrained(self) -> bool:
        """Unless the penalty is tanh, which weighs codes by the norms of their rows."""
        return self.penalty != "tanh"

    @property
    def sparsity_coefficient(self) -> str | None:
        return "l0"

    @property
    def coefficients(self) -> dict[str, float]:
        """`l0`, by default what suits the penalty; `pre_act` with tanh only."""
        l0 = DEFAULT_L0[self.penalty] if self.l0 is None else self.l0
        return {"l0": l0} | ({"pre_act": self.pre_act} if self.penalty == "tanh" else {})

    @property
    def ramps(self) -> dict[str, Ramp]:
        """With tanh, l0 rises over the whole run and pre_act stands from the start, as in Anthropic's update."""
        return {"l0": Ramp(0.0, 0.0, 1.0), "pre_act": HELD} if self.penalty == "tanh" else {}

    @property
    def labels(self) -> dict[str, str]:
        return {"log_threshold": "threshold"}

    @property
    def group_factors(self) -> dict[str, float]:
        return {"threshold": self.threshold_rate}

    @property
    def kernel_width(self) -> float:
        """The bandwidth in the units of pre-activations."""
        return self.bandwidth * math.sqrt(self.d_in)

    def init(self, key: jax.Array) -> Params:
        """`init_linear`, b_enc = 0, and every threshold at `threshold * sqrt(d_in)`, as a logarithm."""
        start = math.log(self.threshold * math.sqrt(self.d_in))
        return self.init_linear(key) | {
            "b_enc": jnp.zeros(self.n_features, jnp.float32),
            "log_threshold": jnp.full(self.n_features, start, jnp.float32),
        }

    def pre_activations(self, params: Params, x: jax.Array) -> jax.Array:
        """z `[rows, n_features]`, of either sign."""
        return matmul(self.centred(params, x), params["W_enc"], self.compute_dtype) + params["b_enc"]

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """z where it exceeds both 0 and its threshold, in training too."""
        z = jax.nn.relu(self.pre_activations(params, x))
        return jump_relu(z, jnp.exp(params["log_threshold"]), self.kernel_width)

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" and "l0"; with tanh "pre_act" too."""
        z, threshold = self.pre_activations(params, batch.x), jnp.exp(params["log_threshold"])
        codes = jump_relu(jax.nn.relu(z), threshold, self.kernel_width)
        y_hat = self.decode(params, codes)
        terms = {"reconstruction": reconstruction_loss(y_hat, batch)}
        if self.penalty == "tanh":
            norms = safe_norm(params["W_dec"])
            saturating = jnp.sum(jnp.tanh(self.tanh_scale * codes * norms), axis=-1)
            below = jnp.sum(jax.nn.relu(threshold - z) * norms, axis=-1)
            terms["l0"] = ctx.coefficients["l0"] * weighted_mean(saturating, batch.weight)
            terms["pre_act"] = ctx.coefficients["pre_act"] * weighted_mean(below, batch.weight)
        else:
            count = jnp.sum(step(jax.nn.relu(z), threshold, self.kernel_width), axis=-1)
            terms["l0"] = ctx.coefficients["l0"] * self.count_penalty(weighted_mean(count, batch.weight), batch.weight)
        return Losses(terms, y_hat, firings(codes, batch.weight), {})

    def count_penalty(self, l0: jax.Array, weight: jax.Array) -> jax.Array:
        """The penalty, without its coefficient, of a mean number of active features."""
        if self.penalty == "step":
            return l0
        # A batch in which no row counts is not one in which nothing fires.
        return jnp.where(jnp.sum(weight) > 0, (l0 / self.target_l0 - 1) ** 2, 0)
