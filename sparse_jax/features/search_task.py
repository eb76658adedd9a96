"""Search by task: which features carry the right answer of prompts that have a right and a wrong one?

Ablating feature f takes c_f d_f out of the activation (raw units, error term kept) at every place of the prompt that
counts, or at its last token alone. What changes is read at the last token:

    logit difference   logit of the right answer - logit of the wrong one
    cross-entropy      -log p(right answer), nats
    KL                 KL(clean || ablated) of the whole prediction, nats

First for all features at once, from one backward pass: with g the gradient of a figure in the activation,

    change by ablating f  ~  - sum over places of c_f (d_f . g)            (gradient x activation)

then for the most promising by truly ablating them, one after the other, in one compiled program. The KL has no gradient
where nothing is ablated yet: for it, the most promising are those of the largest estimated change in cross-entropy.
Source: Marks et al. 2024, eq. 3 (attribution of features); Nanda 2023 (attribution patching).
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from sparse_jax.dictionaries import Normalised
from sparse_jax.features.counted_codes import BATCH_ROWS
from sparse_jax.features.prompts import Prompts, prompt_batches
from sparse_jax.features.target_scores import ranking
from sparse_jax.lm.edits import Edit
from sparse_jax.lm.interventions import put
from sparse_jax.lm.losses import cross_entropy, kl_divergence
from sparse_jax.lm.model import LanguageModel, forward, site_shape, unembedded
from sparse_jax.lm.sites import Site
from sparse_jax.numerics import safe_norm

Figure = Literal["logit_difference", "cross_entropy", "kl"]
# Features that one call of the compiled ablation takes; they are ablated one after the other.
FEATURES_AT_ONCE = 16


class Task(NamedTuple):
    """Prompts with answers of one token.

    Attributes:
        prompts: the prompts.
        right, wrong: `[prompts]` ids of the answers.
    """

    prompts: Prompts
    right: Int32[np.ndarray, " prompts"]
    wrong: Int32[np.ndarray, " prompts"]


class Changes(NamedTuple):
    """Mean over prompts of what ablating each feature changes: ablated - clean."""

    logit_difference: Float64[np.ndarray, " features"]
    cross_entropy: Float64[np.ndarray, " features"]
    kl: Float64[np.ndarray, " features"]


class Attribution(NamedTuple):
    """First-order estimates for all features.

    Attributes:
        active: at how many prompts each feature fires where it would be ablated.
        logit_difference, cross_entropy: estimated mean change by ablating it.
        clean_logit_difference, clean_cross_entropy: means over prompts with nothing ablated.
    """

    active: Int64[np.ndarray, " features"]
    logit_difference: Float64[np.ndarray, " features"]
    cross_entropy: Float64[np.ndarray, " features"]
    clean_logit_difference: float
    clean_cross_entropy: float


class TaskSearch(NamedTuple):
    """Attributes: estimates for all; features that were ablated, those that matter most first; their changes, and the
    standard errors of these over prompts (nan for a single prompt)."""

    attribution: Attribution
    features: Int64[np.ndarray, " verified"]
    changes: Changes
    errors: Changes


class _Clean(NamedTuple):
    """A batch of prompts that has run to the site, and what stands there."""

    residual: jax.Array  # [rows, position, d_model] entering the site's layer
    x: jax.Array  # [rows, position, width] at the site
    codes: jax.Array  # [rows, position, n_features]
    places: jax.Array  # [rows, position] where features are ablated
    logits: jax.Array  # [rows, vocab] at the last token


def _last_logits(lm, residual, x, last, site):
    """Logits `[rows, vocab]` at the last tokens with `x` at the site; only what lies above it is run."""
    n = lm.config.n_layers
    if site.name == "resid_post":
        out = forward(lm, x, start=site.layer + 1, stop=n).residual
    else:
        value = x.reshape(*x.shape[:2], *site_shape(lm.config, site))
        out = forward(lm, residual, start=site.layer, stop=n, edits=[Edit(site, put, (value,))]).residual
    at_last = jnp.take_along_axis(out, last[:, None, None], axis=1)
    return unembedded(lm, at_last)[:, 0]


def _figures(logits, right, wrong):
    """(logit difference, cross-entropy), each `[rows]`."""
    rows = jnp.arange(len(logits), dtype=jnp.int32)
    return logits[rows, right] - logits[rows, wrong], cross_entropy(logits, right)


@partial(jax.jit, static_argnames=("site", "last_only"))
def _clean(lm, coder, prompts, max_norm, site, last_only):
    tokens, mask, last = prompts
    before = Site("resid_pre", site.layer)
    captured = forward(lm, tokens, capture=(before, site), stop=site.layer + 1).captured
    x = captured[str(site)].reshape(*tokens.shape, -1).astype(jnp.float32)
    places = mask & (safe_norm(x) <= max_norm)
    if last_only:
        places &= jnp.arange(tokens.shape[1], dtype=jnp.int32) == last[:, None]
    codes = coder.encode(x.reshape(-1, x.shape[-1])).reshape(*tokens.shape, -1)
    residual = captured[str(before)]
    codes = jnp.where(places[..., None], jnp.maximum(codes, 0), 0)
    return _Clean(residual, x, codes, places, _last_logits(lm, residual, x, last, site))


@partial(jax.jit, static_argnames=("site", "last_only"))
def _attribute(lm, coder, prompts, right, wrong, there, max_norm, site, last_only):
    """Sums over the batch's prompts: how many are active, estimated changes, clean figures."""
    clean = _clean(lm, coder, prompts, max_norm, site, last_only)

    def summed(x):
        figures = _figures(_last_logits(lm, clean.residual, x, prompts[2], site), right, wrong)
        return jnp.stack([jnp.sum(figure * there) for figure in figures])

    values, pull_back = jax.vjp(summed, clean.x)
    directions = coder.directions()

    def estimate(which):
        (gradient,) = pull_back(which)
        return -jnp.einsum("rpn,rpd,nd->n", clean.codes, gradient, directions, optimize="optimal")

    changes = [estimate(which) for which in jnp.eye(2, dtype=values.dtype)]
    active = jnp.sum(jnp.any(clean.codes > 0, axis=1), axis=0, dtype=jnp.int32)
    return active, *changes, values


@partial(jax.jit, static_argnames=("site",))
def _ablate(lm, coder, clean, last, right, wrong, features, site):
    """Changes by ablating each of `features [m]`: three figures, each `[m, rows]`."""
    before = _figures(clean.logits, right, wrong)
    directions = coder.directions()

    def one(feature):
        x = clean.x - clean.codes[..., feature, None] * directions[feature]
        logits = _last_logits(lm, clean.residual, x, last, site)
        after = _figures(logits, right, wrong)
        return after[0] - before[0], after[1] - before[1], kl_divergence(clean.logits, logits)

    return jax.lax.map(one, features)


def _batches(task: Task, batch_rows: int):
    for numbers, prompts in prompt_batches(task.prompts, batch_rows):
        arrays = jnp.array(prompts.tokens), jnp.array(prompts.mask), jnp.array(prompts.last)
        there: Bool[np.ndarray, " rows"] = numbers >= 0
        answers = jnp.array(task.right[numbers]), jnp.array(task.wrong[numbers])
        yield arrays, answers, there


def attribute(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    task: Task,
    *,
    last_only: bool = False,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> Attribution:
    """Gradient x activation of every feature on a task: mean over prompts of the estimated change by ablating it.

    Args:
        lm, site, coder: model, place, dictionary (of a linear decoder).
        task: prompts and answers.
        last_only: ablate at the last token alone, not at every place that counts.
        max_norm: features are not ablated where the activation's norm is larger.
        batch_rows: prompts at once.
    """
    n = len(task.prompts)
    sums = None
    for arrays, answers, there in _batches(task, batch_rows):
        weight = jnp.array(there, jnp.float32)
        found = _attribute(lm, coder, arrays, *answers, weight, jnp.float32(max_norm), site, last_only)
        found = [np.asarray(value, np.float64) for value in found]
        sums = found if sums is None else [a + b for a, b in zip(sums, found)]
    active, by_difference, by_cross_entropy, values = sums
    return Attribution(
        active.astype(np.int64), by_difference / n, by_cross_entropy / n, float(values[0] / n), float(values[1] / n)
    )


def ablate(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    task: Task,
    features: Sequence[int] | np.ndarray,
    *,
    last_only: bool = False,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> tuple[Changes, Changes]:
    """(mean change by truly ablating each of `features`, its standard error over prompts).

    Arguments are those of `attribute`. Two programs are compiled, however many features there are.
    """
    features = np.asarray(features, np.int32)
    padded = np.concatenate([features, np.zeros(-len(features) % FEATURES_AT_ONCE, np.int32)])
    total = np.zeros((2, 3, len(padded)))
    for arrays, answers, there in _batches(task, batch_rows):
        clean = _clean(lm, coder, arrays, jnp.float32(max_norm), site, last_only)
        for start in range(0, len(padded), FEATURES_AT_ONCE):
            part = slice(start, start + FEATURES_AT_ONCE)
            found = _ablate(lm, coder, clean, arrays[2], *answers, jnp.array(padded[part]), site)
            figures = np.stack([np.asarray(figure, np.float64) for figure in found])[..., there]
            total[0, :, part] += figures.sum(axis=-1)
            total[1, :, part] += (figures**2).sum(axis=-1)
    n = len(task.prompts)
    mean = total[0, :, : len(features)] / n
    variance = np.maximum(total[1, :, : len(features)] / n - mean**2, 0)
    error = np.sqrt(variance / (n - 1)) if n > 1 else np.full_like(mean, np.nan)
    return Changes(*mean), Changes(*error)


def search_task(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    task: Task,
    *,
    by: Figure = "logit_difference",
    verify: int | None = 64,
    last_only: bool = False,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> TaskSearch:
    """The features that carry the right answer: estimates for all, then true ablation of the most promising.

    Args:
        by: what decides: the fall of the logit difference, the rise of the cross-entropy, or the KL. Features whose
            ablation hurts the right answer most come first, those whose ablation helps it last.
        verify: how many features of the largest estimated change (of either sign) are truly ablated; None: every
            feature that fires on some prompt.

    Others as in `attribute`.
    """
    options = {"last_only": last_only, "max_norm": max_norm, "batch_rows": batch_rows}
    attribution = attribute(lm, coder, site, task, **options)
    estimate = attribution.logit_difference if by == "logit_difference" else attribution.cross_entropy
    candidates = ranking(np.where(attribution.active > 0, np.abs(estimate), np.nan))
    candidates = candidates[: int((attribution.active > 0).sum())][:verify]
    changes, errors = ablate(lm, coder, site, task, candidates, **options)
    harm = -changes.logit_difference if by == "logit_difference" else getattr(changes, by)
    order = ranking(harm)
    return TaskSearch(
        attribution,
        candidates[order],
        Changes(*(value[order] for value in changes)),
        Changes(*(value[order] for value in errors)),
    )
