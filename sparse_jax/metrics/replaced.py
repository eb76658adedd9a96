"""What replacing the activation at a site does to the loss of each row of a text."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.lm.sites import Site
from sparse_jax.metrics.evaluate import Reconstructor
from sparse_jax.metrics.reconstruction import ReconstructionSums, reconstruction_sums
from sparse_jax.metrics.sparsity import SparsitySums, sparsity_sums
from sparse_jax.metrics.splice import SpliceSums, clean_predictions, resume_with, splice_sums
from sparse_jax.numerics import safe_norm


class ReplacedSums(NamedTuple):
    """Sums over one batch of rows.

    Attributes:
        losses: "clean", "dictionary", "zero" and, if a mean was given, "mean" -> sums of each row, `[rows]` each; all
            over the same predictions. KL is from the clean run.
        reconstruction, sparsity: of the dictionary, over the positions that were replaced.
    """

    losses: dict[str, SpliceSums]
    reconstruction: ReconstructionSums
    sparsity: SparsitySums


@partial(jax.jit, static_argnames=("site",))
def replaced_sums(
    lm: LanguageModel,
    site: Site,
    tokens: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    replaceable: jax.Array,
    rebuild: Reconstructor,
    shift: jax.Array,
    mean: jax.Array | None,
    max_norm: jax.Array,
) -> ReplacedSums:
    """The losses of some rows with the site left alone, reconstructed, put to zero and put to its mean.

    Args:
        lm: the model.
        site: a site with a vector per token.
        tokens, targets: `[rows, position]` ids and the ids that follow them.
        counted: `[rows, position]` predictions that count.
        replaceable: `[rows, position]` where the site is replaced, unless the activation's norm exceeds `max_norm`.
        rebuild: the dictionary.
        shift: `[width]` anything near the mean of the activations (see `reconstruction_sums`).
        mean: `[width]` what mean-ablation puts in; None leaves it out.
    """
    entry = Site("resid_pre", site.layer)
    below = forward(lm, tokens, capture=[entry, site], stop=site.layer + 1)
    residual, x = below.captured[str(entry)], below.captured[str(site)]
    x = x.reshape(*tokens.shape, -1).astype(jnp.float32)
    where = replaceable & (safe_norm(x) <= max_norm)
    flat, ids, weight = x.reshape(-1, x.shape[-1]), tokens.reshape(-1), where.reshape(-1).astype(jnp.float32)
    codes = rebuild.encode(rebuild.params, flat, ids)
    x_hat, lengths = rebuild.decode(rebuild.params, codes, flat, ids)
    values = {"dictionary": x_hat, "zero": jnp.zeros_like(flat)}
    if mean is not None:
        values["mean"] = jnp.broadcast_to(mean, flat.shape)

    clean_logits = resume_with(lm, residual, site, x, x, where)
    clean = clean_predictions(clean_logits)
    by_row = jax.vmap(splice_sums)

    def spliced(value):
        logits = resume_with(lm, residual, site, x, value.reshape(x.shape), where)
        return by_row(clean, logits, targets, counted)

    # One at a time: the logits of all variants together would not fit.
    stacked = lax.map(spliced, jnp.stack(list(values.values())))
    losses = {name: jax.tree.map(lambda sums, i=i: sums[i], stacked) for i, name in enumerate(values)}
    losses["clean"] = by_row(clean, clean_logits, targets, counted)
    return ReplacedSums(losses, reconstruction_sums(flat, x_hat, weight, shift), sparsity_sums(codes, weight, lengths))
