"""What a replaced activation does to the language model's predictions: CE, KL, CE recovered."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.lm.edits import Edit
from sparse_jax.lm.interventions import put
from sparse_jax.lm.model import LanguageModel, forward, site_shape
from sparse_jax.lm.sites import Site


class SpliceSums(NamedTuple):
    """Sums over the next-token predictions that are averaged; they add up over batches.

    Attributes:
        predictions: how many.
        ce: sum of -log p(next token), nats.
        kl: sum of KL(clean || spliced), nats.
    """

    predictions: jax.Array
    ce: jax.Array
    kl: jax.Array


def resume_with(
    lm: LanguageModel,
    residual: jax.Array,
    site: Site,
    current: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    edits: Iterable[Edit] = (),
) -> jax.Array:
    """Logits `[rows, position, vocab]` with the activation at `site` replaced where `mask` holds.

    Args:
        lm: the model.
        residual: `[rows, position, d_model]` the stream that enters the site's layer; nothing below is run again.
        current: `[rows, position, width]` the activation that stands at the site.
        value: `[rows, position, width]` what to put there.
        mask: `[rows, position]` where.
        edits: those that the model runs under; the site's layer is run again under its own.
    """
    value = jnp.where(mask[..., None], value, current)
    if site.name == "resid_post":  # all that the block computes is already in `current`
        return forward(lm, value, start=site.layer + 1).logits
    value = value.reshape(*value.shape[:2], *site_shape(lm.config, site))  # heads apart, where there are any
    # An edit of resid_pre has already made `residual` what it is.
    again = [edit for edit in edits if edit.site.layer == site.layer and edit.site.name != "resid_pre"]
    return forward(lm, residual, start=site.layer, edits=[*again, Edit(site, put, (value,))]).logits


class Clean(NamedTuple):
    """The clean run's predictions in the form that `splice_sums` compares with.

    Attributes:
        p: `[rows, position, vocab]` probabilities.
        negative_entropy: `[rows, position]` sum p log p, nats.
    """

    p: jax.Array
    negative_entropy: jax.Array


def clean_predictions(logits: jax.Array) -> Clean:
    """Probabilities of the clean run, made once for all splices that are compared with it."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    return Clean(p, jnp.sum(p * log_p, axis=-1))


def splice_sums(clean: Clean, logits: jax.Array, targets: jax.Array, counted: jax.Array) -> SpliceSums:
    """Sums for one batch of spliced logits.

    Args:
        clean: predictions of the clean run on the same rows.
        logits: `[rows, position, vocab]` of the spliced run.
        targets: `[rows, position]` next tokens; negative where there is none.
        counted: `[rows, position]` the predictions to average, the same for every splice that is compared.
    """
    counted = counted & (targets >= 0)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    # KL = sum p log p - sum p log q with log q = logits - normaliser: one pass over the vocabulary's exponentials.
    kl = clean.negative_entropy - jnp.sum(clean.p * logits, axis=-1) + normaliser
    return SpliceSums(
        predictions=jnp.sum(counted, dtype=jnp.int32),
        ce=jnp.sum(jnp.where(counted, normaliser - chosen, 0)),
        kl=jnp.sum(jnp.where(counted, kl, 0)),
    )


def ce_recovered(ce_clean: float, ce_spliced: float, ce_ablated: float) -> float:
    """(CE_ablated - CE_spliced) / (CE_ablated - CE_clean): 1 is lossless, 0 as bad as ablating.

    Flattering where ablation is destructive: always read it beside the floors' values.
    """
    return (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)
