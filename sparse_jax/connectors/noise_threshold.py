"""How much noise the features of a site stand before the model's predictions suffer: a threshold for linearity.

    x' = x + s * sum over features j that fire of sd_j e_j d_j        e_j ~ N(0, 1), independent at every place

sd_j is the standard deviation of feature j's code over the tokens that count, d_j its direction in raw units: noise of
s^2 Var(F2_j) is added to every active code and decoded onto the site, the error term kept. s* of a level (0.01 nats) is
the largest s at which CE rises by no more than that: errors of s*^2 Var(F2_j) in every feature at once cost so much. A
target with g_j < s*^2 loses less by a linear prediction than the model would notice.

The noise vector is made once of each row and only multiplied by s (common random numbers), so the rise is a smooth
function of s, about s^2 near 0. It is found by doubling and halving s until every level is between two values, then by
interpolation in s^2 within them until the rise is within `tolerance` of the level. Layers below the site are run once
for all s of a pass.
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
from sparse_jax.features.firings import checked_rows
from sparse_jax.lm.losses import cross_entropy
from sparse_jax.lm.model import LanguageModel, check_site, forward, site_width
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site
from sparse_jax.metrics.splice import resume_with
from sparse_jax.numerics import safe_norm

# Nats of CE that a threshold may cost: the one that is used, and one on either side.
LEVELS = (0.003, 0.01, 0.03)
_FIRST_SCALES = (0.125, 0.25, 0.5, 1.0)
_LEAST, _MOST = 2.0**-14, 2.0**10


@dataclass(frozen=True, eq=False)
class NoiseThreshold:
    """s* of every level, and what it was read off. Numpy, float64.

    Attributes:
        levels: `[levels]` nats.
        scales: `[levels]` s*; inf where no noise that was tried (up to 1024) costs so much.
        low, high: `[levels]` ends of the 95 % interval of s*, from documents drawn with replacement.
        tried: `[tried]` all s that were tried, rising.
        rise: `[tried]` rise of CE there, nats.
        predictions, documents: how many it is of.
    """

    levels: np.ndarray
    scales: np.ndarray
    low: np.ndarray
    high: np.ndarray
    tried: np.ndarray
    rise: np.ndarray
    predictions: int
    documents: int

    def threshold(self, level: float = 0.01) -> float:
        """s*^2 of a level: what `linearity.classify` compares g with.

        Raises:
            InputError: a level that was not asked for.
        """
        if level not in self.levels:
            raise InputError(f"no level of {level} nats; there are {', '.join(f'{x:g}' for x in self.levels)}")
        return float(self.scales[list(self.levels).index(level)] ** 2)


class _Noisy(NamedTuple):
    """Rows as they are and the noise for them, `[rows, position]` and what follows."""

    residual: jax.Array
    x: jax.Array
    noise: jax.Array
    where: jax.Array
    targets: jax.Array
    counted: jax.Array
    loss: jax.Array


def noise_threshold(
    lm: LanguageModel,
    coder: Normalised,
    site: str | Site,
    text: Rows,
    row_numbers: np.ndarray,
    variance: np.ndarray,
    *,
    levels: Sequence[float] = LEVELS,
    tolerance: float = 0.02,
    max_norm: float = float("inf"),
    batch_rows: int = 8,
    passes: int = 30,
    replicates: int = 1000,
    seed: int = 0,
) -> NoiseThreshold:
    """s* of some levels.

    Memory on the device: logits of one row and codes of one row at a time, and `4 x batch_rows x context x d_model`
    numbers; on the host 8 bytes x documents x values of s that are tried.

    Args:
        lm, coder, site: the model and the dictionary at `site`, whose decoder is linear.
        text, row_numbers: held-out rows, each once. Codes get noise, and predictions are averaged, where the mask lets
            a token count.
        variance: `[n_features]` of each code over tokens that count, zeros included (`DocumentErrors.variance`).
        levels: nats of CE, rising.
        tolerance: how near to its level a rise must come, as a share of it.
        max_norm: tokens whose activation has a larger norm do not count.
        batch_rows: rows at once.
        passes: over the text, at most.
        replicates: of the bootstrap.
        seed: decides the noise and the bootstrap. The noise of a row depends on its number, not on the batch.

    Raises:
        InputError: what does not fit together; no prediction counts; a decoder that is not linear; the search does not
            end within `passes` (it then says what it has).
    """
    site, numbers, levels = _checked(lm, coder, site, text, row_numbers, variance, levels, tolerance)
    spread = jnp.sqrt(jnp.array(variance, jnp.float32))
    arguments = (lm, site, text, numbers, coder, spread, max_norm, batch_rows, seed)
    sums, predictions = _rises(*arguments, _FIRST_SCALES)
    for _ in range(passes):
        rises = {s: float(by_document.sum()) / predictions.sum() for s, by_document in sums.items()}
        if not (more := _next_scales(rises, levels, tolerance)):
            break
        sums |= _rises(*arguments, more)[0]
    else:
        shown = ", ".join(f"{s:.4g}: {rise:.3g}" for s, rise in sorted(rises.items()))
        raise InputError(f"no s* within {passes} passes; rises of CE by s: {shown}. Allow a larger tolerance")
    tried = np.array(sorted(sums))
    table = np.stack([sums[s] for s in tried])
    low, high = _interval(tried, table, predictions, levels, replicates, seed)
    rise = table.sum(axis=1) / predictions.sum()
    scales = np.array([_crossing(tried, rise, level) for level in levels])
    return NoiseThreshold(
        levels, scales, low, high, tried, rise, int(predictions.sum()), int(np.count_nonzero(predictions))
    )


def _checked(lm, coder, site, text, row_numbers, variance, levels, tolerance):
    site = check_site(lm.config, site)
    if coder.dictionary.d_in != site_width(lm.config, site) or coder.dictionary.d_out != coder.dictionary.d_in:
        raise InputError(
            f"the dictionary takes {coder.dictionary.d_in} numbers and gives {coder.dictionary.d_out}; site {site} has "
            f"{site_width(lm.config, site)}"
        )
    variance = np.asarray(variance)
    if variance.shape != (coder.dictionary.n_features,) or not (variance >= 0).all():
        raise InputError(
            f"variances of shape {list(variance.shape)}: give one of 0 or more for each of "
            f"{coder.dictionary.n_features} features"
        )
    if not variance.any():
        raise InputError("all variances are 0: the features never fire, and noise in them is none")
    levels = np.asarray(levels, np.float64)
    if levels.ndim != 1 or not levels.size or levels[0] <= 0 or (np.diff(levels) <= 0).any():
        raise InputError(f"levels {levels.tolist()} of nats: give positive, rising ones")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance {tolerance}: give a share of the level, between 0 and 1")
    coder.directions()  # raises where there are none
    return site, checked_rows(text, row_numbers), levels


def _rises(
    lm, site, text, numbers, coder, spread, max_norm, batch_rows, seed, scales
) -> tuple[dict[float, np.ndarray], np.ndarray]:
    """(s -> `[documents]` summed rise of -log p, `[documents]` predictions) in one pass over the text."""
    documents, key = len(text.documents) + 1, jax.random.key(seed)  # the last is of no document
    sums, predictions = {s: np.zeros(documents) for s in scales}, np.zeros(documents, np.int64)
    limit = jnp.array(max_norm, jnp.float32)
    padded = np.concatenate([numbers, np.full(-len(numbers) % batch_rows, -1, np.int64)])
    for begin in range(0, len(padded), batch_rows):
        part = padded[begin : begin + batch_rows]
        rows = text[part]
        given = [jnp.array(a) for a in (np.maximum(part, 0).astype(np.int32), rows.tokens, rows.targets, rows.mask)]
        noisy = _noisy(lm, site, *given, coder, spread, limit, key)
        rises = [_rise(lm, site, noisy, jnp.array(s, jnp.float32)) for s in scales]
        counted, at = np.asarray(noisy.counted), np.where(rows.document < 0, documents - 1, rows.document)
        predictions += np.bincount(at[counted], minlength=documents)
        for s, rise in zip(scales, rises, strict=True):
            rise = np.asarray(rise, np.float64)
            if not np.isfinite(rise).all():
                raise InputError(f"a loss with noise of s = {s:g} at {site} is not finite")
            sums[s] += np.bincount(at[counted], rise[counted], minlength=documents)
    if not predictions.any():
        raise InputError("no prediction counts: the mask drops all of these rows, or they have no next tokens")
    return sums, predictions


@partial(jax.jit, static_argnames=("site",))
def _noisy(lm, site, numbers, tokens, targets, mask, coder, spread, max_norm, key) -> _Noisy:
    """The clean pass of some rows, and the noise for s = 1 in raw units."""
    entry = Site("resid_pre", site.layer)
    below = forward(lm, tokens, capture=[entry, site], stop=site.layer + 1)
    residual, x = below.captured[str(entry)], below.captured[str(site)]
    x = x.reshape(*tokens.shape, -1).astype(jnp.float32)
    where = mask & (safe_norm(x) <= max_norm)
    directions = coder.directions().astype(jnp.float32)

    def of_row(inputs):
        number, x = inputs
        drawn = jax.random.normal(jax.random.fold_in(key, number), (len(x), len(spread)), jnp.float32)
        return jnp.where(coder.encode(x) > 0, spread * drawn, 0) @ directions

    noise = lax.map(of_row, (numbers, x))
    counted = where & (targets >= 0)
    clean = _loss(lm, site, residual, x, x, where, targets)
    return _Noisy(residual, x, noise, where, targets, counted, clean)


@partial(jax.jit, static_argnames=("site",))
def _rise(lm, site, noisy: _Noisy, s) -> jax.Array:
    """`[rows, position]` rise of -log p of the next token."""
    value = noisy.x + s * noisy.noise
    return _loss(lm, site, noisy.residual, noisy.x, value, noisy.where, noisy.targets) - noisy.loss


def _loss(lm, site, residual, x, value, where, targets) -> jax.Array:
    """`[rows, position]` -log p of the next token with `value` at the site, a row at a time: the logits of all rows
    together would not fit."""

    def of_row(inputs):
        residual, x, value, where, targets = (each[None] for each in inputs)
        return cross_entropy(resume_with(lm, residual, site, x, value, where), targets)[0]

    return lax.map(of_row, (residual, x, value, where, targets))


def _next_scales(rises: dict[float, float], levels: np.ndarray, tolerance: float) -> tuple[float, ...]:
    """Values of s to try next, at most one a level; none if every level is found."""
    tried = np.array(sorted(rises))
    rise = np.array([rises[s] for s in tried])
    wanted = set()
    for level in levels:
        below = np.flatnonzero(rise <= level)
        if not below.size:
            if tried[0] > _LEAST:
                wanted.add(float(tried[0]) / 2)
        elif below[-1] == len(tried) - 1:
            if tried[-1] < _MOST:
                wanted.add(2 * float(tried[-1]))
        elif rise[below[-1]] < (1 - tolerance) * level and rise[below[-1] + 1] > (1 + tolerance) * level:
            wanted.add(_inside(tried, rise, int(below[-1]), level))
    return tuple(sorted(wanted))


def _inside(tried, rise, at, level) -> float:
    """Where the rise should meet the level, between two values of s; not nearer to either than a tenth of the way, so
    that both ends move."""
    a, b = tried[at], tried[at + 1]
    return float(np.clip(_crossing(tried, rise, level), a + 0.1 * (b - a), b - 0.1 * (b - a)))


def _crossing(tried: np.ndarray, rise: np.ndarray, level: float) -> float:
    """The largest s with a rise of at most the level: linear in s^2 between values that were tried, and below them."""
    below = np.flatnonzero(rise <= level)
    if below.size and below[-1] == len(tried) - 1:
        return float("inf")
    at = below[-1] if below.size else -1
    low, low_rise = (tried[at] ** 2, rise[at]) if below.size else (0.0, 0.0)
    high, high_rise = tried[at + 1] ** 2, rise[at + 1]
    return float(np.sqrt(low + (high - low) * (level - low_rise) / (high_rise - low_rise)))


def _interval(tried, table, predictions, levels, replicates, seed) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval `[levels]` of s*, documents drawn with replacement; NaN where there is one document only."""
    there = np.flatnonzero(predictions)
    if len(there) < 2:
        return np.full((2, len(levels)), np.nan)
    drawn = np.random.default_rng(seed).multinomial(len(there), np.full(len(there), 1 / len(there)), replicates)
    rises = (drawn @ table[:, there].T) / (drawn @ predictions[there])[:, None]
    scales = np.array([[_crossing(tried, rise, level) for level in levels] for rise in rises])
    # Not "linear": between two infinite ones that would be no number.
    return tuple(np.quantile(scales, q, axis=0, method="nearest") for q in (0.025, 0.975))
