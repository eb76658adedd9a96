"""What a feature adds to the logits by the direct path: its direction through the final norm and the unembedding.

    layer norm   effect_v = sum_i U[v, i] s_i (d_i - mean(d)) / sigma
    RMS norm     effect_v = sum_i U[v, i] s_i d_i / sigma

with the raw direction d, the unembedding U, the final norm's scale s (its bias moves every token alike, with or without
the feature, and cancels) and its denominator sigma, which is frozen: that the feature itself changes the norm is left
out. No layer above the site is run; what they make of the direction is not in this figure (see `ablation`).

sigma: `mean_denominator` over sample tokens is the one under which an effect is the mean over those tokens. Without it
the denominator is 1 and effects are known up to one positive factor, the same for all features and tokens: ranks and
ratios stand as they are.

Source: nostalgebraist 2020 (logit lens); Elhage et al. 2021 (direct path); Bricken et al. 2023 (of features).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm.embedding import unembed
from sparse_jax.lm.layers import LayerNorm, RMSNorm, accurate_dtype
from sparse_jax.lm.model import LanguageModel, check_site
from sparse_jax.lm.sites import Site

# Where a vector is added to the residual stream as it is.
_IN_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


class Extremes(NamedTuple):
    """The tokens that each feature raises and lowers most, strongest first.

    Attributes:
        raised, lowered: `[n, k]` int32 token ids.
        raised_by, lowered_by: `[n, k]` their effects; those of `lowered` are the smallest.
    """

    raised: np.ndarray
    raised_by: np.ndarray
    lowered: np.ndarray
    lowered_by: np.ndarray


def direct_logit_effect(
    lm: LanguageModel,
    coder: Normalised,
    features: Sequence[int] | np.ndarray,
    site: str | Site,
    denominator: float | None = None,
) -> jax.Array:
    """`[n, vocab]` float32: what a code of 1 of each feature adds to each token's logit, the norm's denominator frozen.

    Args:
        lm: the model, of any family.
        coder: the dictionary; its decoder is linear.
        features: `[n]` their numbers.
        site: where the dictionary stands. At `mlp_hidden` and `attn_z` directions go through the layer's output
            projection first.
        denominator: the final norm's, see `mean_denominator`; None: 1, effects up to one positive factor.

    Raises:
        InputError: a feature that is not there, a site from which no direct path leads to the residual stream, a
            dictionary of another width, a denominator that is not positive.
    """
    site, features = check_site(lm.config, site), check_features(coder, features)
    if denominator is not None and not denominator > 0:
        raise InputError(f"denominator {denominator}: give a positive number, or None for effects up to a factor")
    directions = _to_stream(lm, site, coder.directions()[jnp.array(features)])
    return _effect(lm, directions, jnp.array(denominator or 1.0, directions.dtype))


def check_features(coder: Normalised, features: Sequence[int] | np.ndarray) -> np.ndarray:
    """The numbers as int32 `[n]`; raises InputError for none at all, or for those that are none of its features."""
    given, n = np.asarray(features), coder.dictionary.n_features
    if given.ndim != 1 or not given.size or given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= n:
        raise InputError(f"features {given.tolist()}: give numbers from 0 to {n - 1}, at least one")
    return given.astype(np.int32)


def _to_stream(lm: LanguageModel, site: Site, directions: jax.Array) -> jax.Array:
    """`[n, d_model]`: what the directions `[n, width]` at a site add to the residual stream."""
    kernels = {"mlp_hidden": ("mlp", "down"), "attn_z": ("attn", "out")}
    if site.name not in (*_IN_STREAM, *kernels):
        raise InputError(
            f"site {site}: what stands there is not added to the residual stream; direct effects are those of "
            f"{', '.join((*_IN_STREAM, *kernels))}"
        )
    if site.name in kernels:
        part, name = kernels[site.name]
        kernel = lm.params["blocks"][part][name]["kernel"][site.layer]
        kernel = kernel.reshape(-1, kernel.shape[-1]).astype(directions.dtype)
        _check_width(directions, kernel.shape[0], site)
        return directions @ kernel
    _check_width(directions, lm.config.d_model, site)
    return directions


def _check_width(directions, width, site):
    if directions.shape[1] != width:
        raise InputError(f"the dictionary's directions have {directions.shape[1]} numbers, site {site} has {width}")


@jax.jit
def _effect(lm, directions, denominator):
    head = lm.params["head"]["norm"]
    if _centres(lm):
        directions = directions - jnp.mean(directions, axis=-1, keepdims=True)
    scaled = directions * head["scale"].astype(directions.dtype) / denominator
    return logits_of_normed(lm, scaled[None])[0]


def _centres(lm: LanguageModel) -> bool:
    """Whether the final norm is a layer norm, which centres; RMS norms have no bias and no centre."""
    return "bias" in lm.params["head"]["norm"]


def final_norm(lm: LanguageModel, residual: jax.Array) -> jax.Array:
    """`[batch, position, d_model]`: a residual stream after the final norm, as the unembedding gets it."""
    kind = LayerNorm if _centres(lm) else RMSNorm
    norm = kind(lm.config.d_model, lm.config.norm_epsilon, jnp.dtype(lm.dtype))
    return norm.apply({"params": lm.params["head"]["norm"]}, residual)


def logits_of_normed(lm: LanguageModel, normed: jax.Array) -> jax.Array:
    """`[batch, position, vocab]`: the unembedding's product alone, in float32 (or float64).

    It is linear: sums and differences of what `final_norm` gives may go through it.
    """
    return unembed(lm.params, normed, accurate_dtype(jnp.dtype(lm.dtype)))


@partial(jax.jit, static_argnames=("epsilon", "centres"))
def _reciprocals(residual, epsilon, centres):
    x = residual.astype(accurate_dtype(residual.dtype))
    if centres:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1) + epsilon)


def mean_denominator(lm: LanguageModel, residual: jax.Array, mask: np.ndarray) -> float:
    """The final norm's denominator over sample tokens: 1 / mean(1 / sigma), so that effects are means over them.

    Args:
        lm: the model.
        residual: `[rows, position, d_model]` what left the last block (`activations` at the last `resid_post`).
        mask: `[rows, position]` the tokens that count.

    Raises:
        InputError: no token counts.
    """
    if not np.any(mask):
        raise InputError("no token counts: the mask of the sample rows drops all of them")
    reciprocals = np.asarray(_reciprocals(residual, lm.config.norm_epsilon, _centres(lm)), np.float64)
    return float(1 / reciprocals[np.asarray(mask)].mean())


def most_raised_and_lowered(effects: np.ndarray | jax.Array, k: int) -> Extremes:
    """The k tokens with the largest and the k with the smallest of each feature's effects `[n, vocab]`.

    Ties go to the lower id.

    Raises:
        InputError: k is not from 1 to the size of the vocabulary.
    """
    effects = np.asarray(effects)
    if not 1 <= k <= effects.shape[1]:
        raise InputError(f"k {k}: give 1 to {effects.shape[1]}, the size of the vocabulary")
    values, ids = (np.asarray(found) for found in jax.lax.top_k(jnp.array(effects), k))
    least, lowest = (np.asarray(found) for found in jax.lax.top_k(-jnp.array(effects), k))
    return Extremes(ids.astype(np.int32), values, lowest.astype(np.int32), -least)
