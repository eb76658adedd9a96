"""The TopK sparse autoencoder. Source: Gao et al. 2024 (TopK, initialisation, AuxK); Makhzani & Frey 2013.

    c     = TopK(ReLU((x - b_dec) W_enc + b_enc))       the k largest of each row, ties to the lower index
    x_hat = c W_dec + b_dec                             rows of W_dec have norm 1
    loss  = ||x - x_hat||^2 + AuxK                      mean over rows; AuxK: see aux_k.py

With or without the ReLU? The paper writes TopK alone, the authors' code and SAELens apply ReLU after selecting,
dictionary_learning and sparsify before: the codes are the same, since the k largest that are positive are selected
either way. A row with fewer than k positive pre-activations has fewer than k active features.

Starting point: W_enc = gain * W_dec^T with one gain such that reconstructions of random unit vectors have norm 1 on
average. Its authors found no clear evidence that it helps (a comment in their code); SAELens, sparsify and
dictionary_learning leave it out.

k is an upper bound that fixes shapes; the k in use is the traced coefficient "k_now", which may fall from a larger one
at the start of the run and may be varied without compiling anything anew.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.dictionaries.aux_k import aux_k_loss
from sparse_jax.dictionaries.protocol import (
    HELD,
    Batch,
    Context,
    Dictionary,
    Losses,
    Params,
    Ramp,
    firings,
    reconstruction_loss,
    register,
)
from sparse_jax.dictionaries.topk_gradient import top_k_value_and_grad
from sparse_jax.dictionaries.unit_norm import unit_norm_project, unit_norm_tangent
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul, safe_norm, unit_rows
from sparse_jax.numerics.sparse_codes import sparse_is_faster
from sparse_jax.numerics.topk import top_k_mask

# Random unit vectors from which the encoder's gain is found, as many as in the authors' code.
_PROBES = 256


@dataclass(frozen=True)
class KSparse(Dictionary):
    """What all dictionaries with a given number of active features share.

    Attributes:
        k: active features per row; all of them where k exceeds their number.
        anneal_from: start with this many and come down to k linearly; 0: k from the start. It is a bound on shapes:
            the whole run takes the time that selecting so many takes.
        anneal: over which first share of the run k comes down.
        aux_coefficient: weight of AuxK, the loss that revives dead features (1/32 in the paper).
    """

    k: int = 32
    anneal_from: int = 0
    anneal: float = 0.1
    aux_coefficient: float = 1 / 32

    def __post_init__(self):
        if self.k < 1:
            raise InputError(f"--k {self.k}: at least one feature must be active")
        if self.anneal_from and self.anneal_from < self.k:
            raise InputError(f"--anneal-from {self.anneal_from}: give more than --k {self.k}, or 0 for no annealing")
        if not 0 < self.anneal <= 1:
            raise InputError(f"--anneal {self.anneal}: give a share of the run, more than 0 and at most 1")
        if self.aux_coefficient < 0:
            raise InputError(f"--aux-coefficient {self.aux_coefficient}: the coefficient cannot be negative")

    @property
    def k_bound(self) -> int:
        """The largest k in use at any time."""
        return min(max(self.k, self.anneal_from), self.n_features)

    @property
    def coefficients(self) -> dict[str, float]:
        """`k_now`, the k in use, and `aux_k`, the weight of AuxK."""
        return {"k_now": float(self.k), "aux_k": self.aux_coefficient}

    @property
    def coefficient_fields(self) -> dict[str, str]:
        return {"k_now": "k", "aux_k": "aux_coefficient"}

    @property
    def ramps(self) -> dict[str, Ramp]:
        """`k_now` comes down from `anneal_from` where that is given; neither coefficient is warmed up from 0."""
        falling = Ramp(float(self.anneal_from), 0.0, self.anneal) if self.anneal_from else HELD
        return {"k_now": falling, "aux_k": HELD}

    def decode(self, params: Params, codes: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """`codes W_dec + b_dec`."""
        return matmul(codes, params["W_dec"], self.compute_dtype) + params["b_dec"]

    def tangent(self, params: Params, grads: Params) -> Params:
        """Without the part of W_dec's gradient along its unit rows."""
        return unit_norm_tangent(params, grads)

    def project(self, params: Params) -> Params:
        """Rows of W_dec back at norm 1."""
        return unit_norm_project(params)

    def directions(self, params: Params) -> jax.Array:
        """The rows of W_dec."""
        return params["W_dec"]


def current_k(ctx: Context) -> jax.Array:
    """The k in use: the coefficient "k_now" to the nearest whole number, int32."""
    return jnp.round(ctx.coefficients["k_now"]).astype(jnp.int32)


@register("topk")
@dataclass(frozen=True)
class TopK(KSparse):
    """Sparse autoencoder whose rows have their k largest features active (Gao et al. 2024).

    Attributes:
        aux_k: how many dead features AuxK gives to a row; 0 means half of d_in.
    """

    aux_k: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.aux_k < 0:
            raise InputError(f"--aux-k {self.aux_k}: give a number of features, or 0 for half of the site's width")

    @property
    def sparse_gradient(self) -> bool:
        """Whether training takes the sparse form of topk_gradient.py: where it exists and is faster."""
        return type(self).loss is TopK.loss and sparse_is_faster(self.n_features, self.k_bound)

    @property
    def step_form(self) -> tuple[bool, bool]:
        """`sparse_gradient`, and whether its loops over slots have one slot: XLA compiles those otherwise."""
        return self.sparse_gradient, self.sparse_gradient and self.k_bound == 1

    def init(self, key: jax.Array) -> Params:
        """Random unit rows of W_dec, W_enc its transpose over the mean norm of reconstructions of random unit vectors,
        biases 0.
        """
        W_dec = unit_rows(jax.random.normal(key, (self.n_features, self.d_out), jnp.float32))
        params = {
            "W_enc": W_dec.T,
            "b_enc": jnp.zeros(self.n_features, jnp.float32),
            "W_dec": W_dec,
            "b_dec": jnp.zeros(self.d_out, jnp.float32),
        }
        probes = jax.random.normal(jax.random.fold_in(key, 1), (_PROBES, self.d_in), jnp.float32)
        exact = dataclasses.replace(self, compute_dtype="float32")
        gain = jnp.mean(safe_norm(exact.decode(params, exact.top_k_codes(params, unit_rows(probes)))))
        return {**params, "W_enc": W_dec.T / jnp.where(gain > 0, gain, 1)}

    def preactivations(self, params: Params, x: jax.Array) -> jax.Array:
        """`[rows, n_features]` `(x - b_dec) W_enc + b_enc`."""
        return matmul(x - params["b_dec"], params["W_enc"], self.compute_dtype) + params["b_enc"]

    def top_k_codes(self, params: Params, x: jax.Array) -> jax.Array:
        """`[rows, n_features]`: the k largest of each row."""
        codes = jax.nn.relu(self.preactivations(params, x))
        return jnp.where(top_k_mask(codes, self.k), codes, 0)

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The k largest pre-activations of each row, as far as they are positive."""
        return self.top_k_codes(params, x)

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" and "aux_k"; as many features are active in a row as `k_now` says."""
        values = self.preactivations(params, batch.x)
        codes = jax.nn.relu(values)
        codes = jnp.where(top_k_mask(codes, self.k_bound, current_k(ctx)), codes, 0)
        y_hat = self.decode(params, codes)
        terms = {
            "reconstruction": reconstruction_loss(y_hat, batch),
            "aux_k": self.aux_k_term(params, values, batch.target - y_hat, batch, ctx),
        }
        return Losses(terms, y_hat, firings(codes, batch.weight), {})

    def value_and_grad(self, params: Params, batch: Batch, ctx: Context) -> tuple[jax.Array, Losses, Params]:
        """By hand (topk_gradient.py) for this loss; for a subclass with a loss of its own by autodiff."""
        if type(self).loss is not TopK.loss:  # the gradient written by hand is that of this loss alone
            return super().value_and_grad(params, batch, ctx)
        return top_k_value_and_grad(self, params, batch, ctx, current_k(ctx))

    def aux_k_term(self, params: Params, values: jax.Array, error: jax.Array, batch: Batch, ctx: Context) -> jax.Array:
        """AuxK on `error [rows, d_out]`, from the pre-activations `values [rows, n_features]`."""
        # Adds zero, and cancels the gradient that would reach b_dec through the input's centre: it belongs to the
        # features that are alive.
        no_bias = params["b_dec"] - lax.stop_gradient(params["b_dec"])
        values = values + matmul(no_bias[None], params["W_enc"], self.compute_dtype)
        k_aux = min(self.aux_k or max(1, self.d_in // 2), self.n_features)
        return aux_k_loss(values, error, params["W_dec"], batch.weight, ctx, k_aux, self.compute_dtype)
