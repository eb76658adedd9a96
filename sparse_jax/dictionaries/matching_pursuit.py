"""The matching-pursuit sparse autoencoder. Source: Costa et al. 2025 (MP-SAE, arXiv 2506.03093); Mallat & Zhang 1993.

    r = x - b_dec;   k times:   j = argmax_i r . W_dec_i,   v = ReLU(r . W_dec_j),   c_j += v,   r -= v W_dec_j
    x_hat = c W_dec + b_dec = x - r                     rows of W_dec have norm 1; it is the encoder too
    loss  = ||r||^2 + auxiliary pursuit                 mean over rows

Each feature is chosen by what the earlier ones left, which finds features that are correlated or nested, where one
product with an encoder sees only their sum. Largest inner product, not largest magnitude: codes are not negative (the
ReLU; SAELens has it too), and a step that finds nothing positive does nothing. A feature may be chosen again later; its
values add up, so that a row has at most k active features.

The number of steps is a fixed k here. SAELens ends a row where its set of chosen features no longer grows or the norm
of the residual is below 0.01, after d_in steps at the most. The authors' code (mpsae/MP-SAE) has no k at all but the
same two stops, and no b_dec.

Gradients flow through the values of all steps, not through the choices; the products that find them are not
differentiated, and the backward pass keeps only each step's residual and choice.

Dead features: a pursuit of k steps among the dead alone reconstructs the detached residual, with the loss of aux_k.py.
A single product, as AuxK takes, would have many dead features answer for the same part of the residual, and tied unit
rows have no gain to correct that with.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sparse_jax.dictionaries.aux_k import dead_features, residual_loss
from sparse_jax.dictionaries.protocol import Batch, Context, Losses, Params, firings, reconstruction_loss, register
from sparse_jax.dictionaries.topk import KSparse, current_k
from sparse_jax.numerics import matmul, unit_rows


@register("matching-pursuit")
@dataclass(frozen=True)
class MatchingPursuit(KSparse):
    """Sparse autoencoder that chooses its k features one after the other (Costa et al. 2025)."""

    @property
    def coefficient_fields(self) -> dict[str, str]:
        # The pursuit among dead features takes a static number of steps.
        return {"aux_k": "aux_coefficient"}

    def init(self, key: jax.Array) -> Params:
        """Random unit rows of W_dec, which are the encoder too, and b_dec = 0."""
        return {
            "W_dec": unit_rows(jax.random.normal(key, (self.n_features, self.d_out), jnp.float32)),
            "b_dec": jnp.zeros(self.d_out, jnp.float32),
        }

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The summed values of k greedy steps from `x - b_dec`."""
        # More than n_features steps refine the values: k is not bounded here.
        W_dec = jnp.asarray(params["W_dec"])
        _, values, chosen = pursue(x - params["b_dec"], W_dec, self.k, self.compute_dtype)
        return dense_codes(values, chosen, self.n_features)

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" and "aux_k" (the pursuit among dead features), after as many steps as `k_now` says."""
        W_dec = jnp.asarray(params["W_dec"])
        k, steps = current_k(ctx), max(self.k, self.anneal_from)
        left, values, chosen = pursue(batch.x - params["b_dec"], W_dec, steps, self.compute_dtype, k)
        y_hat = batch.x - left
        terms = {
            "reconstruction": reconstruction_loss(y_hat, batch),
            "aux_k": self.aux_term(W_dec, batch.target - y_hat, batch, ctx),
        }
        codes = dense_codes(values, chosen, self.n_features)
        return Losses(terms, y_hat, firings(codes, batch.weight), {})

    def aux_term(self, W_dec: jax.Array, error: jax.Array, batch: Batch, ctx: Context) -> jax.Array:
        """The loss of the pursuit among dead features on `error [rows, d_out]`; 0 when none is dead."""
        error, dead = lax.stop_gradient(error), dead_features(ctx)

        def some_dead(W_dec):
            left, _, _ = pursue(error, jnp.where(dead[:, None], W_dec, 0), self.k, self.compute_dtype)
            return residual_loss(error - left, error, batch.weight, ctx)

        return lax.cond(jnp.any(dead), some_dead, lambda W_dec: jnp.zeros((), error.dtype), W_dec)


def pursue(
    x: jax.Array, W: jax.Array, steps: int, compute_dtype: str, steps_now: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Greedy steps of matching pursuit on the rows of `x [rows, d]` with the unit rows of `W [n, d]`.

    Args:
        x: what is to be explained.
        W: the features.
        steps: how many, static.
        compute_dtype: of the products that choose; values and residuals are exact.
        steps_now: a traced number of at most `steps`; later steps do nothing.

    Returns:
        (residual `[rows, d]`, values `[steps, rows]`, chosen `[steps, rows]` int32).
    """

    def step(left, i):
        scores = matmul(lax.stop_gradient(left), lax.stop_gradient(W).T, compute_dtype)
        chosen = checkpoint_name(jnp.argmax(scores, axis=-1).astype(jnp.int32), "chosen")
        row = W[chosen]
        value = jax.nn.relu(jnp.sum(left * row, axis=-1))
        if steps_now is not None:
            value = jnp.where(i < steps_now, value, 0)
        return left - value[:, None] * row, (value, chosen)

    saved = jax.checkpoint_policies.save_only_these_names("chosen")
    left, (values, chosen) = lax.scan(jax.checkpoint(step, policy=saved), x, jnp.arange(steps, dtype=jnp.int32))
    return left, values, chosen


def dense_codes(values: jax.Array, chosen: jax.Array, n_features: int) -> jax.Array:
    """`[rows, n_features]` from `values` and `chosen`, both `[steps, rows]`."""
    rows = values.shape[1]
    return jnp.zeros((rows, n_features), values.dtype).at[jnp.arange(rows, dtype=jnp.int32), chosen].add(values)
