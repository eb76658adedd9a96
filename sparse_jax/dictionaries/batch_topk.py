"""The BatchTopK sparse autoencoder. Source: Bussmann et al. 2024 (arXiv 2412.06410), section 3.

    training    c = the rows * k largest of ReLU((x - b_dec) W_enc + b_enc) over the whole batch
    inference   c = ReLU(...) where ReLU(...) > threshold, else 0
    threshold   = mean over batches of the smallest activation that was kept in training
    x_hat, loss   as TopK's, AuxK included

A row that is harder to explain may use more features than another: k is kept only on average. At inference a row must
not depend on the others, hence the threshold. Masked rows neither compete nor count in rows * k.

The mean over batches. Weights move, so that only late batches tell the threshold of the final ones. At the step
numbered t (from 0) the newest minimum enters with weight 1 / (1 + share * t), share = `threshold_share`: about the last
`share` of the steps so far count, in a short run as in a long one. A fixed weight (SAELens 0.01, dictionary_learning
0.001 after 1,000 steps) is right for one length of run. Below 0 the threshold is not yet known, as at the start: then
`encode` keeps the k largest of each row, as TopK does. float32, whatever the products are computed in.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.dictionaries.protocol import Batch, Context, Losses, Params, firings, reconstruction_loss, register
from sparse_jax.dictionaries.topk import TopK
from sparse_jax.dictionaries.topk_gradient import batch_top_k_value_and_grad
from sparse_jax.errors import InputError
from sparse_jax.numerics.topk import batch_top_k_mask, top_k_mask

# What the threshold is before the first batch: any negative number.
NOT_KNOWN = -1.0


@register("batch-topk")
@dataclass(frozen=True)
class BatchTopK(TopK):
    """Sparse autoencoder with k active features on average over the batch (Bussmann et al. 2024).

    Attributes:
        threshold_share: the inference threshold is an average over about this last share of the steps.
    """

    threshold_share: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.threshold_share <= 1:
            raise InputError(f"--threshold-share {self.threshold_share}: give a share, more than 0 and at most 1")

    @property
    def frozen(self) -> tuple[str, ...]:
        """The threshold: an average of what training selects, not learned."""
        return ("threshold",)

    def init(self, key: jax.Array) -> Params:
        """TopK's, and a threshold that is not known yet."""
        return {**super().init(key), "threshold": jnp.full((), NOT_KNOWN, jnp.float32)}

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """Activations above the threshold, each row by itself; the k largest of each row while it is not known."""
        codes = jax.nn.relu(self.preactivations(params, x))
        threshold = jnp.asarray(params["threshold"]).astype(codes.dtype)
        keep = lax.cond(threshold < 0, lambda codes: top_k_mask(codes, self.k), lambda codes: codes > threshold, codes)
        return jnp.where(keep, codes, 0)

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" and "aux_k", of the rows * k largest activations of the batch; moves the threshold."""
        values = self.preactivations(params, batch.x)
        codes = self.batch_codes(values, batch.weight, ctx)
        y_hat = self.decode(params, codes)
        terms = {
            "reconstruction": reconstruction_loss(y_hat, batch),
            "aux_k": self.aux_k_term(params, values, batch.target - y_hat, batch, ctx),
        }
        frozen = {"threshold": self.moved_threshold(params["threshold"], codes, ctx)}
        return Losses(terms, y_hat, firings(codes, batch.weight), frozen)

    def value_and_grad(self, params: Params, batch: Batch, ctx: Context) -> tuple[jax.Array, Losses, Params]:
        """By hand (topk_gradient.py) for this loss; for a subclass with a loss of its own by autodiff."""
        if type(self).loss is not BatchTopK.loss:  # the gradient written by hand is that of this loss alone
            return super().value_and_grad(params, batch, ctx)
        return batch_top_k_value_and_grad(self, params, batch, ctx)

    def batch_codes(self, values: jax.Array, weight: jax.Array, ctx: Context) -> jax.Array:
        """Codes by the training rule; those of masked rows are zero.

        k_now need not be whole: rows * k_now is rounded down.
        """
        codes = jnp.where((weight > 0)[:, None], jax.nn.relu(values), 0)
        rows = jnp.sum(weight > 0, dtype=jnp.int32)
        k = jnp.clip(ctx.coefficients["k_now"].astype(jnp.float32), 0, self.k_bound)
        count = jnp.floor(rows.astype(jnp.float32) * k).astype(jnp.int32)
        return jnp.where(batch_top_k_mask(codes, codes.shape[0] * self.k_bound, count), codes, 0)

    def moved_threshold(self, threshold: jax.Array, codes: jax.Array, ctx: Context) -> jax.Array:
        """The threshold after a batch with these codes; a batch without active features leaves it."""
        threshold = jnp.asarray(threshold)
        smallest = jnp.min(lax.stop_gradient(codes), initial=jnp.inf, where=codes > 0).astype(threshold.dtype)
        newest = 1 / (1 + self.threshold_share * ctx.step.astype(threshold.dtype))
        moved = jnp.where(threshold < 0, smallest, threshold + newest * (smallest - threshold))
        return jnp.where(jnp.isfinite(smallest), moved, threshold)
