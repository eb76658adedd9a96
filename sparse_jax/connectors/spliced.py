"""Does the model still work with a site replaced by what connectors predict of earlier features?

    rebuilt      x_hat = decode(encode(x))                         the target's dictionary, the ceiling of what follows
    connected    x_hat = decode(predict(codes of the inputs))      decoded by the target's dictionary
    zero, mean   ablations

Each replaces the activation at the masked-in places and nowhere else; CE and KL of all of them, and of the clean model,
average the same next-token predictions (the masked-in ones). Inputs are the codes of the clean run at the same place.
Sums are kept by document, so intervals draw documents anew.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.connectors.causal import Predictor
from sparse_jax.connectors.document_blocks import Interval
from sparse_jax.connectors.document_bootstrap import bootstrap, document_sums
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.causes import check_order
from sparse_jax.lm.model import LanguageModel, check_site, forward, site_width
from sparse_jax.lm.rows import RowBatch
from sparse_jax.lm.sites import Site
from sparse_jax.metrics.splice import clean_predictions, resume_with, splice_sums
from sparse_jax.numerics import safe_norm

ABLATIONS = ("zero", "mean")


@partial(jax.tree_util.register_dataclass, data_fields=["args"], meta_fields=["fn"])
@dataclass(frozen=True)
class Replacement:
    """What is put at the target in place of its activation; a pytree.

    Attributes:
        fn: (args, inputs, x) -> x_hat `[tokens, width]`, a module-level function: inputs the activations at the input
            sites `[tokens, width]` each, x that at the target.
        args: arrays and pytrees of them.
    """

    fn: Callable[[Any, tuple[jax.Array, ...], jax.Array], jax.Array]
    args: Any


def rebuilt(coder: Normalised) -> Replacement:
    """The target's dictionary: what it makes of the activation itself."""
    return Replacement(_rebuild, coder)


def connected(
    connector: Predictor, inputs: Iterable[Normalised | None], target: Normalised | None, *, non_negative: bool = False
) -> Replacement:
    """What a connector predicts, decoded.

    Args:
        connector: predicts the target's codes from the inputs' side by side, `[tokens, n_in]` with their zeros.
        inputs: dictionaries of the input sites, in their order; None: the raw site.
        target: that of the target; None: what is predicted is the activation.
        non_negative: codes that are predicted below 0 become 0, as no encoder would give them.
    """
    return Replacement(_connect_positive if non_negative else _connect, (connector, tuple(inputs), target))


def _rebuild(coder, inputs, x):
    return coder.reconstruct(x)


def _connect(args, inputs, x, change=lambda codes: codes):
    connector, coders, target = args
    codes = [given if coder is None else coder.encode(given) for coder, given in zip(coders, inputs, strict=True)]
    predicted = change(connector.predict(jnp.concatenate(codes, axis=1)))
    return predicted if target is None else target.decode(predicted, x)


def _connect_positive(args, inputs, x):
    return _connect(args, inputs, x, jax.nn.relu)


@dataclass(frozen=True, eq=False)
class SplicedLosses:
    """Sums over the predictions that count, by document. Numpy, host.

    Attributes:
        document: `[documents]` int64 numbers.
        predictions: `[documents]` int64.
        ce, kl: "clean", "zero", "mean" and the names of the replacements -> `[documents]` float64 nats.
        error: the same names but "clean" -> sum of ||x - x_hat||^2 over the places that are replaced, which are those
            of the predictions.
        spread: sum of ||x - mean||^2 over them.
    """

    document: np.ndarray
    predictions: np.ndarray
    ce: dict[str, np.ndarray]
    kl: dict[str, np.ndarray]
    error: dict[str, float]
    spread: float


class SplicedFigures(NamedTuple):
    """Of one replacement, with intervals over documents.

    Attributes:
        ce_increase, kl: nats per prediction.
        ce_recovered, ce_recovered_mean: 1 is lossless, 0 as bad as zero (mean) ablation.
        fvu: squared error over that of putting in the mean.
    """

    ce_increase: Interval
    kl: Interval
    ce_recovered: Interval
    ce_recovered_mean: Interval
    fvu: float


def spliced_losses(
    lm: LanguageModel,
    inputs: Iterable[Site | str],
    target: Site | str,
    batches: Iterable[RowBatch],
    replacements: Mapping[str, Replacement],
    *,
    mean: np.ndarray,
    max_norms: Mapping[str, float] | None = None,
) -> SplicedLosses:
    """Replace the target's activation in each way, on the same text.

    Memory: logits of a batch, `[rows, position, vocab]` float32, of the clean run and of one replacement at a time, and
    `[tokens, width]` of each replacement.

    Args:
        lm: the model.
        inputs: sites that the replacements read, in the order of the `inputs` they are given.
        target: the site that is replaced.
        batches: held-out rows, all of one shape; rows of number -1 are empty.
        replacements: by name; not "clean", "zero" or "mean".
        mean: `[width]` what mean ablation puts in, from training tokens.
        max_norms: site -> norm above which its activation masks a place, as in training; sites that are not named have
            no limit.

    Raises:
        InputError: sites in the wrong order, a name that is taken, a mean of another width, no prediction that counts,
            an activation that is not finite.
    """
    target = check_site(lm.config, target)
    inputs = tuple(check_site(lm.config, site) for site in inputs)
    for site in inputs:
        check_order(site, target)
    if taken := {"clean", *ABLATIONS} & set(replacements):
        raise InputError(f"replacements called {', '.join(sorted(taken))}: what is always measured has these names")
    if np.shape(mean) != (site_width(lm.config, target),):
        raise InputError(f"a mean of shape {np.shape(mean)}: site {target} has {site_width(lm.config, target)} numbers")
    limits = {str(Site.parse(site)): limit for site, limit in (max_norms or {}).items()}
    if unknown := set(limits) - {str(site) for site in (*inputs, target)}:
        raise InputError(f"norms of {', '.join(sorted(unknown))}: give those of the inputs and the target")
    limits = jnp.array([limits.get(str(site), np.inf) for site in (*inputs, target)], jnp.float32)
    names, several = ("clean", *ABLATIONS, *replacements), tuple(replacements.values())
    centre, parts, error, spread = jnp.array(mean, jnp.float32), [], np.zeros(len(names) - 1), 0.0
    for number, batch in enumerate(batches):
        given = (jnp.array(part) for part in (batch.tokens, batch.targets, batch.mask))
        found = _batch_losses(lm, inputs, target, *given, several, centre, limits)
        if not bool(found.finite):
            raise InputError(f"an activation is not finite in batch {number} of the text")
        at = np.asarray(found.where)
        nats = np.concatenate([np.asarray(found.ce)[:, at], np.asarray(found.kl)[:, at]])
        parts.append((batch.document[at], nats.T.astype(np.float64)))
        error, spread = error + np.asarray(found.error, np.float64), spread + float(found.spread)
    if not parts or not any(len(document) for document, _ in parts):
        raise InputError("no prediction counts: the text is empty or the mask drops all of it")
    document, nats = (np.concatenate(part) for part in zip(*parts))
    sums = document_sums(document, np.concatenate([np.ones((len(nats), 1)), nats], axis=1))
    ce, kl = sums[:, 1 : 1 + len(names)], sums[:, 1 + len(names) :]
    return SplicedLosses(
        document=np.unique(document).astype(np.int64),
        predictions=sums[:, 0].astype(np.int64),
        ce=dict(zip(names, ce.T)),
        kl=dict(zip(names, kl.T)),
        error=dict(zip(names[1:], map(float, error))),
        spread=spread,
    )


class _Losses(NamedTuple):
    """Of one batch: `where [rows, position]`, `ce`, `kl [variants, rows, position]`, the clean run first; sums."""

    where: jax.Array
    ce: jax.Array
    kl: jax.Array
    error: jax.Array
    spread: jax.Array
    finite: jax.Array


@partial(jax.jit, static_argnames=("inputs", "target"))
def _batch_losses(lm, inputs, target, tokens, targets, mask, several, mean, limits) -> _Losses:
    entry = Site("resid_pre", target.layer)
    below = forward(lm, tokens, capture={entry, target, *inputs}, stop=target.layer + 1).captured
    activations = [below[str(site)].reshape(*tokens.shape, -1).astype(jnp.float32) for site in (*inputs, target)]
    real, x = targets >= 0, activations[-1]
    small = [safe_norm(a) <= limit for a, limit in zip(activations, limits)]
    where = mask & real & jnp.all(jnp.stack(small), axis=0)
    flat = [a.reshape(-1, a.shape[-1]) for a in activations]
    values = [jnp.zeros_like(flat[-1]), jnp.broadcast_to(mean, flat[-1].shape)]
    values += [made.fn(made.args, tuple(flat[:-1]), flat[-1]) for made in several]
    values = jnp.stack([value.reshape(x.shape) for value in values])

    by_place = jax.vmap(jax.vmap(splice_sums))
    residual = below[str(entry)]
    clean_logits = resume_with(lm, residual, target, x, x, where)
    clean = clean_predictions(clean_logits)

    def spliced(value):  # one at a time: the logits of all would not fit
        sums = by_place(clean, resume_with(lm, residual, target, x, value, where), targets, where)
        return sums.ce, sums.kl

    ce, kl = lax.map(spliced, values)
    own = by_place(clean, clean_logits, targets, where)
    finite = [jnp.all(jnp.isfinite(a) | ~real[..., None]) for a in activations]
    return _Losses(
        where,
        jnp.concatenate([own.ce[None], ce]),
        jnp.concatenate([own.kl[None], kl]),
        jnp.sum(jnp.where(where[..., None], (values - x) ** 2, 0), axis=(1, 2, 3)),
        jnp.sum(jnp.where(where[..., None], (x - mean) ** 2, 0)),
        jnp.all(jnp.stack(finite)),
    )


def spliced_figures(losses: SplicedLosses, *, resamples: int = 1000, seed: int = 0) -> dict[str, SplicedFigures]:
    """Figures of each replacement and ablation, by name; documents are drawn alike for all."""
    found = {}
    for name in losses.error:
        columns = (losses.predictions, losses.kl[name], *(losses.ce[n] for n in ("clean", name, *ABLATIONS)))
        sums = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
        made = (
            lambda s: (s[..., 3] - s[..., 2]) / s[..., 0],
            lambda s: s[..., 1] / s[..., 0],
            lambda s: (s[..., 4] - s[..., 3]) / (s[..., 4] - s[..., 2]),
            lambda s: (s[..., 5] - s[..., 3]) / (s[..., 5] - s[..., 2]),
        )
        intervals = (bootstrap(figure, sums, resamples=resamples, seed=seed) for figure in made)
        found[name] = SplicedFigures(*intervals, fvu=losses.error[name] / losses.spread if losses.spread else np.nan)
    return found
