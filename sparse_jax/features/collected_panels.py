"""Panels of what one pass over a text collected: density, moments, tokens, histogram, texts, co-active features.

for panel in collected_panels(collected, lm, site, text, coder, tokenizer.token_strings):
    ...        # dataclasses.replace(panel, effect=..., raised=...) adds what else was measured
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from sparse_jax.dictionaries import Normalised
from sparse_jax.features.collected import Collected
from sparse_jax.features.logit_effect import check_features
from sparse_jax.features.page import Context
from sparse_jax.features.panels import FeaturePanel, Partner, Passage, TokenHistogram
from sparse_jax.features.windows import window_activations
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site

TokenStrings = Callable[[np.ndarray], list[str]]
ChangesAt = Callable[[int, int], np.ndarray | None]


class Chosen(NamedTuple):
    """Places that are shown, feature after feature.

    features, rows, positions: `[places]` int64.
    labels: `[places]` why each is shown.
    starts: `[n + 1]` int64: the places of the i-th of the features asked for are starts[i] to starts[i + 1] - 1.
    """

    features: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    labels: list[str]
    starts: np.ndarray


def choose_places(
    collected: Collected, features: np.ndarray, *, top: int = 6, quantiles: int = 5, per_quantile: int = 2
) -> Chosen:
    """The strongest places of each feature, then some of each quantile of its firings, the strongest quantile first.

    Of a row one place only, so that texts do not overlap. "firings 80–100 %" is the strongest fifth of the firings.
    """
    sampled = collected.quantile_samples(quantiles, per_quantile, distinct_rows=True)
    found, starts = [], [0]
    for feature in features:
        best = [
            (int(r), int(p)) for r, p in zip(collected.top.rows[feature], collected.top.positions[feature]) if r >= 0
        ]
        best = best[:top]
        used = {row for row, _ in best}
        found += [(feature, row, position, "top") for row, position in best]
        for quantile in reversed(range(quantiles)):
            label = f"firings {100 * quantile // quantiles}–{100 * (quantile + 1) // quantiles} %"
            for row, position in zip(sampled.rows[feature, quantile], sampled.positions[feature, quantile]):
                if row >= 0 and int(row) not in used:
                    found.append((feature, int(row), int(position), label))
        starts.append(len(found))
    *numbers, labels = zip(*found) if found else [()] * 4
    return Chosen(*(np.asarray(each, np.int64) for each in numbers), list(labels), np.asarray(starts))


def collected_panels(
    collected: Collected,
    lm: LanguageModel,
    site: Site,
    text: Rows,
    coder: Normalised,
    token_strings: TokenStrings,
    features: Iterable[int] | None = None,
    *,
    top: int = 6,
    quantiles: int = 5,
    per_quantile: int = 2,
    tokens: int = 8,
    partners: int = 8,
    before: int = 14,
    after: int = 6,
    changes_at: ChangesAt | None = None,
) -> Iterator[FeaturePanel]:
    """A panel of each feature, one after the other.

    The texts' activations are made first, each row that holds a place once: (top + quantiles x per_quantile) x
    (before + 1 + after) float32 of a feature, 22 MB for 16,000 features.

    Args:
        collected: from `collect`.
        lm, site, text, coder: what it was collected of.
        token_strings: token ids to what is shown.
        features: which; all by default.
        top, quantiles, per_quantile: see `choose_places`.
        tokens: top tokens of a feature: those with the largest summed activation.
        partners: co-active features of a feature.
        before, after: tokens shown on either side of a place.
        changes_at: (feature, row of the text) -> `[position]` changes of the next token's log p on ablating the feature
            in that row, which stand beside the activations; or None: not measured there.

    Raises:
        InputError: numbers that are none of the features.
    """
    features = check_features(
        coder, np.arange(collected.n_features) if features is None else np.asarray(list(features))
    )
    chosen = choose_places(collected, features, top=top, quantiles=quantiles, per_quantile=per_quantile)
    windows = window_activations(lm, site, text, coder, *chosen[:3], before=before, after=after)
    moments = collected.mean, collected.variance, collected.skew, collected.kurtosis
    density, outlier, together = collected.density, collected.outlier, collected.coactive.most(partners)
    for i, feature in enumerate(features):
        part = slice(chosen.starts[i], chosen.starts[i + 1])
        mean, variance, skew, kurtosis = (float(moment[feature]) for moment in moments)
        fires = bool(collected.fired[feature])
        yield FeaturePanel(
            index=int(feature),
            density=float(density[feature]),
            maximum=float(collected.maximum[feature]),
            mean=mean if fires else None,
            variance=variance if fires else None,
            skew=skew if fires else None,
            kurtosis=kurtosis if fires else None,
            outlier=bool(outlier[feature]),
            top_tokens=top_tokens_of(collected, feature, token_strings, tokens),
            histogram=histogram_of(collected, feature, token_strings),
            contexts=_passages(text, chosen, windows, part, token_strings, before, changes_at),
            coactive=_partners(together, feature),
        )


def _passages(
    text: Rows, chosen: Chosen, windows: np.ndarray, part: slice, token_strings, before: int, changes_at
) -> tuple[Passage, ...]:
    """The texts of one feature."""
    tokens, _, mask, documents = text[chosen.rows[part]]
    made = []
    for i, place in enumerate(range(part.start, part.stop)):
        position, window = int(chosen.positions[place]), windows[place]
        inside = window[~np.isnan(window)]
        first = max(0, position - before)
        # What fills a short row up is no text; a code where the mask drops the token is no firing.
        there = np.flatnonzero(documents[i, first : first + len(inside)] >= 0)
        shown = slice(first, first + int(there[-1]) + 1)
        inside = np.where(mask[i, shown], inside[: shown.stop - first], 0)
        context = Context(
            tokens=tuple(token_strings(tokens[i, shown])),
            activations=tuple(inside.tolist()),
            peak=position - shown.start,
            label=chosen.labels[place],
            source=text.documents[documents[i, position]],
        )
        changes = changes_at and changes_at(int(chosen.features[place]), int(chosen.rows[place]))
        made.append(Passage(context, () if changes is None else tuple(np.asarray(changes)[shown].tolist())))
    return tuple(made)


def top_tokens_of(
    collected: Collected, feature: int, token_strings: TokenStrings, count: int = 8
) -> tuple[tuple[str, float], ...]:
    """The tokens with the largest summed activation, with the mean activation where the feature fires on each."""
    found = collected.token_counts.of(feature)
    best = np.argsort(-found.sums, kind="stable")[:count]
    means = found.sums[best] / np.maximum(found.counts[best], 1)
    return tuple(zip(token_strings(found.tokens[best]), map(float, means)))


def histogram_of(
    collected: Collected, feature: int, token_strings: TokenStrings, coloured: int = 6
) -> TokenHistogram | None:
    """Firings by activation and token; None where it never fires. Bins of no width are joined to the next."""
    found = collected.token_counts.of(feature)
    if not len(found.tokens):
        return None
    edges = np.r_[0.0, collected.token_counts.edges[feature].astype(np.float64)]
    # The last bin is open: it ends at the maximum, or as far on as the others are wide.
    largest, width = float(collected.maximum[feature]), np.diff(edges).mean() if len(edges) > 1 else 0.0
    edges = np.r_[edges, largest if largest > edges[-1] else edges[-1] + max(width, 1e-6)]
    kept = np.flatnonzero(np.r_[True, edges[1:] > np.maximum.accumulate(edges[:-1])])
    bins = np.add.reduceat(found.bins, kept[:-1], axis=1)
    common = np.argsort(-found.counts, kind="stable")[:coloured]
    rest = bins.sum(axis=0) - bins[common].sum(axis=0)
    return TokenHistogram(
        edges=tuple(edges[kept].tolist()),
        tokens=tuple(token_strings(found.tokens[common])),
        counts=tuple(tuple(int(count) for count in row) for row in bins[common]),
        rest=tuple(int(count) for count in rest),
    )


def _partners(together: tuple[np.ndarray, np.ndarray, np.ndarray], feature: int) -> tuple[Partner, ...]:
    numbers, cosines, counts = (array[feature] for array in together)
    return tuple(Partner(int(n), int(c), float(cos)) for n, cos, c in zip(numbers, cosines, counts) if n >= 0)
