"""Which places in a text a feature fires at, and samples of them across its activation range."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.blocks import activations
from sparse_jax.features.page import Context, FeatureCard
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site
from sparse_jax.numerics import safe_norm

# (params, activations [tokens, d], token ids [tokens]) -> codes [tokens, n_features]
Encode = Callable[[Any, jax.Array, jax.Array], jax.Array]


@partial(jax.jit, static_argnames=("site", "encode", "edits_for"))
def _selected_codes(lm, tokens, site, encode, params, features, edits_for):
    x = activations(lm, tokens, site, edits_for)
    codes = encode(params, x.reshape(-1, x.shape[-1]), tokens.reshape(-1))
    return codes[:, features].reshape(*tokens.shape, -1), safe_norm(x)


@dataclass(frozen=True)
class Activity:
    """Activations of some features on some rows of text.

    Attributes:
        features: `[n]` their numbers.
        values: `[rows, position, n]` float32.
        rows: `[rows]` which rows of the text.
        mask: `[rows, position]` where tokens count.
    """

    features: np.ndarray
    values: np.ndarray
    rows: np.ndarray
    mask: np.ndarray


def feature_activity(
    lm: LanguageModel,
    site: Site,
    text: Rows,
    row_numbers: np.ndarray,
    encode: Encode,
    params: Any,
    features: Iterable[int],
    *,
    max_norm: float = float("inf"),
    batch_rows: int = 32,
) -> Activity:
    """Run the model and the encoder over rows of text and keep the activations of the named features.

    Args:
        lm, site: where activations come from.
        text, row_numbers: which rows.
        encode, params: codes of a batch of activations.
        features: numbers of the features to keep.
        max_norm: tokens whose activation has a larger norm are masked, as in training and evaluation.
        batch_rows: rows at once.
    """
    features = np.asarray(list(features), np.int32)
    padded = np.concatenate([row_numbers, np.full(-len(row_numbers) % batch_rows, -1, np.int64)])
    values, masks = [], []
    for start in range(0, len(padded), batch_rows):
        tokens, _, mask, _ = text[padded[start : start + batch_rows]]
        codes, norms = _selected_codes(lm, jnp.array(tokens), site, encode, params, jnp.array(features), None)
        values.append(np.asarray(codes))
        masks.append(mask & (np.asarray(norms) <= max_norm))
    n = len(row_numbers)
    return Activity(features, np.concatenate(values)[:n], np.asarray(row_numbers), np.concatenate(masks)[:n])


def sample_across_range(
    values: np.ndarray, mask: np.ndarray, seed: int, *, top: int = 3, bins: int = 5, per_bin: int = 2
) -> list[tuple[int, int, str]]:
    """Places where a feature fires, spread over its activation range: (row, position, label).

    The `top` strongest places of different rows, then `per_bin` drawn uniformly from each of `bins` equal parts of the
    range from 0 to the maximum. No row is used twice, so that contexts do not overlap.

    Args:
        values: `[rows, position]` activations of one feature; places that are not positive do not fire.
        mask: `[rows, position]` where tokens count.
        seed: decides the draws.
    """
    firing = np.where(mask, values, 0)
    places = np.argwhere(firing > 0)
    if not len(places):
        return []
    strength = firing[places[:, 0], places[:, 1]]
    chosen, used = [], set()

    def take(candidates: np.ndarray, count: int, label: str) -> None:
        for i in candidates:
            if count and (row := int(places[i, 0])) not in used:
                chosen.append((row, int(places[i, 1]), label))
                used.add(row)
                count -= 1

    take(np.argsort(-strength, kind="stable"), top, "top")
    edges = np.linspace(0, strength.max(), bins + 1)
    generator = np.random.default_rng(seed)
    for low, high, i in reversed(list(zip(edges[:-1], edges[1:], range(bins)))):
        inside = np.flatnonzero((strength > low) & (strength <= high))
        take(generator.permutation(inside), per_bin, f"{100 * i // bins}–{100 * (i + 1) // bins} %")
    return chosen


def sample_uniformly(
    values: np.ndarray, mask: np.ndarray, count: int, seed: int, without_rows: Iterable[int] = ()
) -> list[tuple[int, int]]:
    """Up to `count` places drawn uniformly from all where a feature fires, outside some rows: (row, position)."""
    firing = np.where(mask, values, 0)
    firing[list(without_rows)] = 0
    places = np.argwhere(firing > 0)
    drawn = np.random.default_rng(seed).permutation(len(places))[:count]
    return [(int(row), int(position)) for row, position in places[drawn]]


def window(position: int, length: int, before: int = 14, after: int = 6) -> slice:
    """The part of a row shown around a place."""
    return slice(max(0, position - before), min(length, position + after + 1))


def feature_card(
    activity: Activity, column: int, text: Rows, token_strings: Callable[[np.ndarray], list[str]], seed: int
) -> FeatureCard:
    """A feature as the report shows it.

    Args:
        activity: activations of the features.
        column: which of them.
        text: the rows that `activity` was made from.
        token_strings: token ids to what is shown.
        seed: decides which contexts are drawn.
    """
    values = activity.values[:, :, column]
    firing = np.where(activity.mask & (values > 0), values, 0)
    tokens, _, _, documents = text[activity.rows]
    contexts = []
    for row, position, label in sample_across_range(values, activity.mask, seed):
        part = window(position, values.shape[1])
        contexts.append(
            Context(
                tokens=tuple(token_strings(tokens[row, part])),
                activations=tuple(float(v) for v in np.maximum(values[row, part], 0)),
                peak=position - part.start,
                label=label,
                source=text.documents[documents[row, position]],
            )
        )
    count = int((firing > 0).sum())
    return FeatureCard(
        index=int(activity.features[column]),
        density=count / max(1, int(activity.mask.sum())),
        maximum=float(firing.max()),
        mean=float(firing.sum()) / max(1, count),
        contexts=tuple(contexts),
        top_tokens=_top_tokens(firing, tokens, token_strings),
    )


def _top_tokens(firing: np.ndarray, tokens: np.ndarray, token_strings, count: int = 6) -> tuple[tuple[str, float], ...]:
    """The tokens on which a feature's summed activation is largest, with its mean activation where it fires on them."""
    active = firing > 0
    ids, inverse = np.unique(tokens[active], return_inverse=True)
    sums = np.bincount(inverse, firing[active], minlength=len(ids))
    means = sums / np.maximum(np.bincount(inverse, minlength=len(ids)), 1)
    best = np.argsort(-sums, kind="stable")[:count]
    return tuple(zip(token_strings(ids[best]), (float(m) for m in means[best])))
