"""Floors: what trivial dictionaries reach. PCA rotation, neurons, a random dictionary, each top-k by |coefficient|.

    c = gain * top_k((x - mean) W^T)        x_hat = c W + mean

with orthonormal W for PCA (principal components) and neurons (the identity), where gain = 1, and random unit rows for
the random dictionary, whose overlapping atoms would overshoot: its one gain is the least-squares one.
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
)
from sparse_jax.numerics import keep_top_k, unit_rows


@dataclass(frozen=True)
class LinearTopK(Dictionary):
    """A fixed linear dictionary of which each row uses its k largest coefficients, of either sign.

    Attributes:
        k: how many coefficients are kept; all of them where k exceeds their number.
    """

    k: int = 32

    @property
    def frozen(self) -> tuple[str, ...]:
        """All of it: the dictionary is fitted once, not trained."""
        return ("W_dec", "mean", "gain")

    def init(self, key: jax.Array) -> Params:
        """Unfitted: neurons, without a centre; `fit` gives the parameters that are meant to be used."""
        zeros = jnp.zeros(self.d_in, jnp.float32)
        return {"W_dec": jnp.eye(self.n_features, self.d_in), "mean": zeros, "gain": jnp.ones((), jnp.float32)}

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """`gain * top_k((x - mean) W_dec^T)`, the k coefficients of largest magnitude with their signs."""
        return params["gain"] * keep_top_k((x - params["mean"]) @ params["W_dec"].T, self.k)

    def decode(self, params: Params, codes: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """`codes W_dec + mean`."""
        return codes @ params["W_dec"] + params["mean"]

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """The term "reconstruction" alone, for measuring: nothing is trained."""
        codes = self.encode(params, batch.x)
        y_hat = self.decode(params, codes)
        frozen = {name: params[name] for name in self.frozen}
        return Losses(
            {"reconstruction": reconstruction_loss(y_hat, batch)}, y_hat, firings(codes, batch.weight), frozen
        )

    def directions(self, params: Params) -> jax.Array:
        """The rows of W_dec."""
        return params["W_dec"]


@register("pca")
@dataclass(frozen=True)
class PCA(LinearTopK):
    """Principal components, an orthogonal rotation: each row keeps the k components that are largest for it."""

    def fit(self, mean: jax.Array, covariance: jax.Array) -> Params:
        """Parameters from the mean `[d]` and covariance `[d, d]` of training activations."""
        _, vectors = jnp.linalg.eigh(covariance)
        # eigh sorts ascending; the first component is to be the largest.
        return {"W_dec": vectors.T[::-1], "mean": mean, "gain": jnp.ones((), mean.dtype)}


@register("neurons")
@dataclass(frozen=True)
class Neurons(LinearTopK):
    """The coordinates themselves, centred: what reading single neurons would give."""

    def fit(self, mean: jax.Array) -> Params:
        """Parameters from the mean `[d]` of training activations."""
        return {"W_dec": jnp.eye(mean.shape[0], dtype=mean.dtype), "mean": mean, "gain": jnp.ones((), mean.dtype)}


@register("random")
@dataclass(frozen=True)
class RandomDictionary(LinearTopK):
    """Random unit rows: what the number of features alone gives."""

    def fit(self, key: jax.Array, mean: jax.Array, x: jax.Array) -> Params:
        """Random rows from `key`; the gain is fitted by least squares on training activations `x [rows, d]`."""
        rows = jax.random.normal(key, (self.n_features, mean.shape[0]), mean.dtype)
        params = {"W_dec": unit_rows(rows), "mean": mean, "gain": jnp.ones((), mean.dtype)}
        centred = x - mean
        unscaled = self.decode(params, self.encode(params, x)) - mean
        return {**params, "gain": jnp.sum(centred * unscaled) / jnp.sum(unscaled * unscaled)}
