"""Search by similarity to a direction: which features write along it, which read along it?

    unembedding(lm, token)                 what raises a token's logit
    difference_of_means(lm, site, a, b)    from the mean activation of one set of prompts to that of another
    coder.directions()[feature]            what another feature writes

compared by cosine with every decoder row (what a feature writes) and, where a dictionary has such, every encoder column
(what it reads). Both are directions in raw activation space: a normaliser's one scale changes no angle.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Float64

from sparse_jax.activations.blocks import activations
from sparse_jax.dictionaries import Normalised
from sparse_jax.dictionaries.baselines import LinearTopK
from sparse_jax.errors import InputError
from sparse_jax.features.counted_codes import BATCH_ROWS
from sparse_jax.features.prompts import Prompts, prompt_batches
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.sites import Site
from sparse_jax.numerics import safe_norm, unit_rows


class Similarity(NamedTuple):
    """Cosine of a direction with each feature's rows, -1 to 1; 0 for rows of length 0.

    Attributes:
        decoder: with the decoder's.
        encoder: with the encoder's; None where the dictionary has none (codes that are solved for).
    """

    decoder: Float32[np.ndarray, " features"]
    encoder: Float32[np.ndarray, " features"] | None


def encoder_rows(coder: Normalised) -> Float[jax.Array, "features d"] | None:
    """The direction that each feature reads; None where the dictionary has none of its own."""
    params = coder.params
    if "W_enc" in params:
        return params["W_enc"].T
    tied = getattr(coder.dictionary, "tied", False) or isinstance(coder.dictionary, LinearTopK)
    return params["W_dec"] if tied and "W_dec" in params else None


def similarity(coder: Normalised, direction: Float[np.ndarray, " d"]) -> Similarity:
    """Cosine of `direction` with what each feature writes and reads.

    Raises:
        InputError: a direction of another width, of length 0, or with entries that are not finite.
    """
    direction = jnp.asarray(direction, jnp.float32)
    rows = coder.directions()
    if direction.shape != rows.shape[1:]:
        raise InputError(f"a direction of shape {list(direction.shape)}: the dictionary's have [{rows.shape[1]}]")
    if not bool(jnp.isfinite(direction).all()) or not bool(jnp.any(direction != 0)):
        raise InputError("the direction has length 0 or entries that are not finite")
    unit = direction / safe_norm(direction)
    read = encoder_rows(coder)
    if read is not None and read.shape != rows.shape:
        read = None  # what is read stands at another site than what is written
    return Similarity(np.asarray(unit_rows(rows) @ unit), None if read is None else np.asarray(unit_rows(read) @ unit))


def unembedding(lm: LanguageModel, token: int) -> Float64[np.ndarray, " d_model"]:
    """The direction in the last residual stream that raises a token's logit above the average token's.

    The final norm's scale is folded in, and with a layer norm the mean over dimensions is taken out, since it never
    reaches the logits. The mean over the vocabulary is taken out, since raising all logits changes no prediction.

    Raises:
        InputError: the model has no such token.
    """
    if not 0 <= token < lm.config.vocab_size:
        raise InputError(f"token {token}: the model has 0 to {lm.config.vocab_size - 1}")
    head = lm.params["head"]
    table = np.asarray(head.get("unembed", lm.params["embed"]["tokens"]), np.float64)
    direction = (table[token] - table.mean(axis=0)) * np.asarray(head["norm"]["scale"], np.float64)
    return direction - direction.mean() if "bias" in head["norm"] else direction


@partial(jax.jit, static_argnames=("site",))
def _sum_at(lm, tokens, mask, max_norm, site):
    x = activations(lm, tokens, site)
    counted = mask & (safe_norm(x) <= max_norm)
    return jnp.sum(jnp.where(counted[..., None], x, 0), axis=(0, 1)), jnp.sum(counted, dtype=jnp.int32)


def difference_of_means(
    lm: LanguageModel,
    site: Site,
    a: Prompts,
    b: Prompts,
    *,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> Float64[np.ndarray, " width"]:
    """Mean raw activation over the counted places of prompts `a`, less that of prompts `b`.

    Source: Rimsky et al. 2023 and Belrose 2023 (difference of means as a concept's direction).

    Raises:
        InputError: no place of a set counts.
    """
    means = []
    for prompts in (a, b):
        total, places = 0.0, 0
        for _, batch in prompt_batches(prompts, batch_rows):
            found, counted = _sum_at(lm, jnp.array(batch.tokens), jnp.array(batch.mask), jnp.float32(max_norm), site)
            total, places = total + np.asarray(found, np.float64), places + int(counted)
        if not places:
            raise InputError("no place of the prompts counts: their activations are all outliers")
        means.append(total / places)
    return means[0] - means[1]
