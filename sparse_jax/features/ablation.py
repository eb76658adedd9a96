"""What a feature does to the predictions along real texts: it is ablated, and each next token's log-probability read.

Ablating feature f puts x - c_f d_f in place of x, in raw units, the error term kept, at every place of a row where the
mask lets it count and the feature fires (code above 0). All changes here are ablated minus clean: a token that the
feature promotes has a negative one.

A feature costs a fraction of a pass over the text: rows on which it is silent are not run (its effect there is exactly
0), layers below the site are run once for all features, and of a row only what comes from the first firing on is run
again (`segments`), or only the firing places where nothing above the site mixes positions.

Memory on the device, for `block_rows` rows of `context` tokens: codes `rows x context x features`, keys and values of
the layers above the site, and logits of one batch, `batch_tokens x vocab`; float32 all.

Source: Cunningham et al. 2023, section 5; Bricken et al. 2023 (feature ablations).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.logit_effect import check_features, final_norm, logits_of_normed
from sparse_jax.features.segments import Saved, Segments, lengths_for, position_wise, resume, save, segments
from sparse_jax.lm.embedding import unembed
from sparse_jax.lm.model import LanguageModel, check_site, site_width
from sparse_jax.lm.sites import Site
from sparse_jax.numerics import safe_norm

# Logits of one batch, in numbers: 32 MB, whatever the vocabulary is.
_LOGITS = 1 << 23
# Edges between the bins of the true token's drop in logit; what lies outside counts in the first and the last.
EDGES = tuple(round(0.1 * i, 1) for i in range(-20, 21))


class Changes(NamedTuple):
    """Each feature on each row where it fires, in the order of the rows.

    Attributes:
        features, rows: `[pairs]` int32; rows as they were given.
        log_p: `[pairs, position]` float32, change of log p(next token) in nats; exactly 0 where nothing is changed,
            whether or not the place counts, and where there is no next token.
    """

    features: np.ndarray
    rows: np.ndarray
    log_p: np.ndarray


@dataclass(frozen=True)
class AblationEffects:
    """What ablating each of some features did on a text. Numpy, host; changes are ablated minus clean.

    Attributes:
        features: `[n]` their numbers.
        predictions: next-token predictions that count (mask true, a next token there), on all rows.
        firings: `[n]` int64, places that count where the feature fires.
        scored: `[n]` int64, those of them with a next token: what the means and the histogram are over.
        ce_change: `[n]` float64, nats: the rise of the mean of -log p(next token) over all `predictions`.
        log_p_change: `[n]` float64, mean change of log p(next token) where it fires; 0 where it never does.
        logsumexp_change: `[n]` float64, mean change of the logits' logsumexp where it fires.
        normed_change: `[n, d_model]` float64, mean change of the stream after the final norm where it fires.
        drops: `[n, bins]` int64, histogram of the drop (clean minus ablated) in the true token's logit where it fires.
        edges: `[bins - 1]` between the bins, the first and the last of which are open.
        changes: each place's change, where they were asked for.
    """

    features: np.ndarray
    predictions: int
    firings: np.ndarray
    scored: np.ndarray
    ce_change: np.ndarray
    log_p_change: np.ndarray
    logsumexp_change: np.ndarray
    normed_change: np.ndarray
    drops: np.ndarray
    edges: np.ndarray
    changes: Changes | None = None


class Clean(NamedTuple):
    """Rows as they are, `[rows, position]` and what follows.

    Attributes:
        saved: what it takes to go on from the site.
        codes: `[..., n]` of the features in question; 0 where the mask drops the place or the code is not positive.
        targets, counted: next tokens, and the predictions that count.
        normed: `[..., d_model]` after the final norm.
        logit, log_p: the next token's.
    """

    saved: Saved
    codes: jax.Array
    targets: jax.Array
    counted: jax.Array
    normed: jax.Array
    logit: jax.Array
    log_p: jax.Array


def ablation_effects(
    lm: LanguageModel,
    coder: Normalised,
    site: str | Site,
    tokens: np.ndarray,
    targets: np.ndarray,
    mask: np.ndarray,
    features: Sequence[int] | np.ndarray | None = None,
    *,
    edges: Sequence[float] = EDGES,
    keep_changes: bool = False,
    max_norm: float = float("inf"),
    block_rows: int = 8,
    batch_tokens: int | None = None,
) -> AblationEffects:
    """Ablate each feature on each row where it fires.

    Args:
        lm: the model.
        coder: the dictionary at `site`; its decoder is linear.
        site: a site with a vector per token.
        tokens, targets, mask: `[rows, position]` as `Rows` gives them.
        features: their numbers; None: all.
        edges: rising, of the histogram of drops.
        keep_changes: also return the change at every place: `pairs x position` float32 on the host.
        max_norm: places whose activation has a larger norm do not count, as in training and evaluation.
        block_rows: rows whose clean pass is kept at once.
        batch_tokens: positions that are run again at once; None: as many as make 32 MB of logits.

    Raises:
        InputError: numbers, shapes or widths that do not fit; no prediction counts.
    """
    site, features = checked(lm, coder, site, tokens, targets, mask, features)
    edges = np.asarray(edges, np.float64)
    if not edges.size or np.any(np.diff(edges) <= 0):
        raise InputError(f"edges {edges.tolist()}: give rising numbers, at least one")
    batch_tokens = batch_tokens or max(tokens.shape[1], min(2048, _LOGITS // lm.config.vocab_size))
    directions, chosen = coder.directions()[jnp.array(features)], jnp.array(features)
    totals, kept, predictions = None, [], 0
    for begin in range(0, len(tokens), block_rows):
        rows = slice(begin, begin + block_rows)
        block = [_filled(part[rows], block_rows, fill) for part, fill in ((tokens, 0), (targets, -1), (mask, False))]
        clean = _clean(lm, site, *map(jnp.array, block), coder, chosen, jnp.array(max_norm, directions.dtype))
        pairs, normed = _block_changes(lm, site, clean, directions, batch_tokens)
        predictions += int(np.asarray(clean.counted).sum())
        more = _block_sums(pairs, np.asarray(clean.counted), normed, edges)
        totals = more if totals is None else [a + b for a, b in zip(totals, more, strict=True)]
        if keep_changes:
            kept.append(Changes(features[pairs.index], pairs.rows + np.int32(begin), pairs.log_p))
    if not predictions:
        raise InputError("no prediction counts: the mask drops all of these rows, or they have no next tokens")
    firings, scored, ce, log_p, logsumexp, normed, drops = totals
    mean = np.maximum(scored, 1)
    changes = Changes(*map(np.concatenate, zip(*kept, strict=True))) if keep_changes else None
    return AblationEffects(
        features, predictions, firings, scored, ce / predictions, log_p / mean, logsumexp / mean,
        normed / mean[:, None], drops, edges, changes,
    )  # fmt: skip


def mean_logit_change(
    lm: LanguageModel, effects: AblationEffects, which: slice | np.ndarray = slice(None), *, log_p: bool = False
) -> np.ndarray:
    """`[n, vocab]` float32: the mean change of every token's logit where each feature fires (ablated minus clean).

    The unembedding is linear, so the mean change of what enters it says all: no sums over the vocabulary were kept.
    The tokens that a feature raises are those that its ablation lowers: give `most_raised_and_lowered` the negative.

    Args:
        lm: the model.
        effects: of its features.
        which: places in `effects.features`.
        log_p: of log-probabilities, not logits: each row is shifted by one number.
    """
    normed = jnp.array(effects.normed_change[which][None], jnp.float32)
    change = np.asarray(logits_of_normed(lm, normed.astype(lm.params["head"]["norm"]["scale"].dtype))[0])
    return change - effects.logsumexp_change[which][:, None].astype(change.dtype) if log_p else change


def checked(lm, coder, site, tokens, targets, mask, features) -> tuple[Site, np.ndarray]:
    """The parsed site and the features as int32; raises InputError for what does not fit together."""
    site = check_site(lm.config, site)
    if coder.dictionary.d_in != site_width(lm.config, site) or coder.dictionary.d_out != coder.dictionary.d_in:
        raise InputError(
            f"the dictionary takes {coder.dictionary.d_in} numbers and gives {coder.dictionary.d_out}; site {site} has "
            f"{site_width(lm.config, site)}"
        )
    if tokens.ndim != 2 or not len(tokens) or tokens.shape != targets.shape or tokens.shape != mask.shape:
        raise InputError(
            f"tokens {tokens.shape}, targets {targets.shape}, mask {mask.shape}: give three arrays [rows, position]"
        )
    everything = np.arange(coder.dictionary.n_features)
    return site, check_features(coder, everything if features is None else features)


def _filled(part, rows, fill):
    """The last block of rows with empty ones behind it, so that every block has one shape."""
    return np.pad(part, ((0, rows - len(part)), (0, 0)), constant_values=fill)


@partial(jax.jit, static_argnames=("site",))
def _clean(lm, site, tokens, targets, mask, coder, features, max_norm) -> Clean:
    saved = save(lm, site, tokens)

    def of_row(inputs):  # one row at a time: logits of all rows would not fit
        x, end, targets = inputs
        codes = jnp.maximum(coder.encode(x)[:, features], 0)
        normed = final_norm(lm, end[None])
        logits = unembed(lm.params, normed, jnp.dtype(lm.dtype))[0]
        logit, log_p = _of_targets(logits, targets)
        return codes, normed[0], logit, log_p

    codes, normed, logit, log_p = lax.map(of_row, (saved.x, saved.end, targets))
    counts = mask & (safe_norm(saved.x) <= max_norm)
    codes = jnp.where(counts[..., None], codes, 0)
    return Clean(saved, codes, targets, counts & (targets >= 0), normed, logit, log_p)


def _of_targets(logits, targets):
    """The next token's logit and log-probability; whatever they are where there is none."""
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return chosen, chosen - jax.nn.logsumexp(logits, axis=-1)


@partial(jax.jit, static_argnames=("site", "length"), donate_argnames=("sums",))
def _changed(lm, site, length, clean: Clean, directions, sums, features, part: Segments):
    """(change of log p, drop of the logit) of the next token `[batch, length]`, and `sums [n, d_model]` with the change
    of the normed stream added where the feature fires."""
    positions = part.starts[:, None] + jnp.arange(length, dtype=jnp.int32)
    at = part.rows[:, None], positions
    codes = clean.codes[(*at, features[:, None])]
    value = clean.saved.x[at] - codes[..., None] * directions[features][:, None]
    end, _ = resume(lm, site, clean.saved, part.rows, positions, value)
    normed = final_norm(lm, end)
    logit, log_p = _of_targets(unembed(lm.params, normed, jnp.dtype(lm.dtype)), clean.targets[at])
    fires = (codes > 0) & clean.counted[at] & part.there[:, None]
    moved = jnp.where(fires[..., None], (normed - clean.normed[at]).astype(sums.dtype), 0)
    there = clean.targets[at] >= 0
    changes = jnp.where(there, log_p - clean.log_p[at], 0), jnp.where(there, clean.logit[at] - logit, 0)
    return *changes, sums.at[features].add(jnp.sum(moved, axis=1))


class _Pairs(NamedTuple):
    """Each feature on each row of a block where it fires: `[pairs]`, and `[pairs, position]`."""

    index: np.ndarray
    rows: np.ndarray
    fires: np.ndarray
    log_p: np.ndarray
    drop: np.ndarray
    n: int


def _block_changes(lm, site, clean, directions, batch_tokens) -> tuple[_Pairs, np.ndarray]:
    """All changes of one block of rows, and the summed change of the normed stream `[n, d_model]`."""
    fires = np.asarray(clean.codes) > 0
    rows, index = (found.astype(np.int32) for found in np.nonzero(fires.any(axis=1)))
    context, n = fires.shape[1:]
    at = fires[rows, :, index]
    log_p, drop = np.zeros((2, *at.shape), np.float32 if directions.dtype == jnp.float32 else np.float64)
    alone = position_wise(site, lm.config.n_layers - 1)
    if alone:
        pair, first = (found.astype(np.int32) for found in np.nonzero(at))
        last = first
    else:
        pair, first = np.arange(len(rows), dtype=np.int32), at.argmax(axis=1) if len(at) else np.zeros(0, np.int32)
        last = np.full(len(rows), context - 1)
    sums, waiting = jnp.zeros((n, clean.normed.shape[-1]), directions.dtype), []
    for length, part in segments(rows[pair], first, last, lengths_for(context, alone), batch_tokens):
        *found, sums = _changed(lm, site, length, clean, directions, sums, jnp.array(index[pair[part.index]]), part)
        waiting.append((length, part, found))
    for length, part, found in waiting:
        where = pair[part.index[part.there]][:, None], part.starts[part.there][:, None] + np.arange(length)
        log_p[where], drop[where] = (np.asarray(values)[part.there] for values in found)
    # What is run before the first firing has not changed; rounding may differ.
    before = np.cumsum(at, axis=1) == 0
    log_p[before], drop[before] = 0, 0
    return _Pairs(index, rows, at, log_p, drop, n), np.asarray(sums)


def _block_sums(pairs: _Pairs, counted: np.ndarray, normed: np.ndarray, edges: np.ndarray) -> list[np.ndarray]:
    """Of each feature: firings, scored firings, rise of -log p everywhere, changes where it fires, histogram."""
    counted = counted[pairs.rows]
    scored = pairs.fires & counted
    pair, position = np.nonzero(scored)
    of, drop, log_p = pairs.index[pair], pairs.drop[pair, position], pairs.log_p[pair, position].astype(np.float64)

    def by_feature(index, weights=None):
        return np.bincount(index, weights, minlength=pairs.n)

    bins = len(edges) + 1
    places = of.astype(np.int64) * bins + np.searchsorted(edges, drop, side="right")
    return [
        by_feature(pairs.index, pairs.fires.sum(axis=1)).astype(np.int64),
        by_feature(of).astype(np.int64),
        by_feature(pairs.index, -np.where(counted, pairs.log_p, 0).sum(axis=1, dtype=np.float64)),
        by_feature(of, log_p),
        # log p = logit - logsumexp, and the logit has changed by -drop.
        by_feature(of, -drop.astype(np.float64) - log_p),
        normed.astype(np.float64),
        np.bincount(places, minlength=pairs.n * bins).reshape(pairs.n, bins),
    ]
