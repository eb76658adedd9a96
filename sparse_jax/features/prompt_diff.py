"""Prompt feature diff: which features change on a text when a pre-prompt stands before it, and where?

The pre-prompt may be examples (few-shot), a chain of thought, an attack. The same suffixes are run alone and behind it,
and activations on the suffix's tokens are compared place by place. Both are encoded apart, so the tokens are the same
ids in both runs; their positions are not the same.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64, Int64

from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.counted_codes import BATCH_ROWS, counted_codes
from sparse_jax.features.prompts import Prompts, make_prompts, prompt_batches
from sparse_jax.features.target_scores import ranking
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.sites import Site


class Suffixes(NamedTuple):
    """The same suffixes alone and behind a pre-prompt.

    Attributes:
        alone, behind: the prompts of both runs.
        places: `[suffixes, longest]` bool, which of a suffix's tokens are compared.
        starts: `[2]` where suffixes begin in the rows of each run.
    """

    alone: Prompts
    behind: Prompts
    places: Bool[np.ndarray, "suffixes longest"]
    starts: tuple[int, int]


class PromptDiff(NamedTuple):
    """With the pre-prompt less without it, of each feature, over the suffixes' tokens.

    Attributes:
        alone, behind: mean activation over all compared places.
        change: their difference.
        error: standard error of the change over suffixes, each a mean over its places; nan for one suffix.
        fired_alone, fired_behind: share of the compared places at which the feature fires.
        places: how many are compared.
    """

    alone: Float64[np.ndarray, " features"]
    behind: Float64[np.ndarray, " features"]
    change: Float64[np.ndarray, " features"]
    error: Float64[np.ndarray, " features"]
    fired_alone: Float64[np.ndarray, " features"]
    fired_behind: Float64[np.ndarray, " features"]
    places: int

    @property
    def order(self) -> Int64[np.ndarray, " features"]:
        """Features by |change|, largest first."""
        return ranking(np.abs(self.change))


class ChangedPlace(NamedTuple):
    """Where a feature changes: suffix, token of it, its activation without and with the pre-prompt."""

    suffix: int
    token: int
    alone: float
    behind: float


def make_suffixes(
    pre_prompt: np.ndarray,
    suffixes: Sequence[np.ndarray],
    *,
    longest: int,
    bos_id: int | None = None,
    skip_positions: int = 1,
    masked_ids: Sequence[int] = (),
) -> Suffixes:
    """Prompts of both runs from the token ids of the pre-prompt and of each suffix, encoded apart.

    A suffix's first tokens are not compared where they stand among the first `skip_positions` when it is alone.

    Raises:
        InputError: an empty pre-prompt, and what `make_prompts` raises.
    """
    if len(pre_prompt) == 0:
        raise InputError("the pre-prompt is empty")
    options = {"longest": longest, "bos_id": bos_id, "skip_positions": skip_positions, "masked_ids": masked_ids}
    alone = make_prompts(suffixes, **options)
    behind = make_prompts([np.concatenate([pre_prompt, suffix]) for suffix in suffixes], **options)
    first = int(bos_id is not None)
    starts = first, first + len(pre_prompt)
    return Suffixes(alone, behind, alone.mask[:, first:], starts)


@partial(jax.jit, static_argnames=("site", "starts"))
def _both(lm, coder, alone, behind, places, max_norm, site, starts, features):
    """(codes alone, codes behind, which places count in both), `[suffixes, token, features]`."""
    length = places.shape[1]
    found = []
    for (tokens, mask), start in zip((alone, behind), starts):
        codes, counted = counted_codes(lm, coder, tokens, mask, max_norm, site, features)
        found.append((codes[:, start : start + length], counted[:, start : start + length]))
    (codes_alone, counts_alone), (codes_behind, counts_behind) = found
    counted = places & counts_alone & counts_behind
    return *(jnp.where(counted[..., None], codes, 0) for codes in (codes_alone, codes_behind)), counted


@partial(jax.jit, static_argnames=("site", "starts"))
def _both_sums(lm, coder, alone, behind, places, max_norm, site, starts):
    """Of each suffix: sums of codes and firings without and with, `[4, suffixes, features]`; its compared places."""
    without, with_it, counted = _both(lm, coder, alone, behind, places, max_norm, site, starts, None)
    sums = [jnp.sum(codes, axis=1) for codes in (without, with_it)]
    fired = [jnp.sum((codes > 0).astype(jnp.float32), axis=1) for codes in (without, with_it)]
    return jnp.stack([*sums, *fired]), jnp.sum(counted, axis=1, dtype=jnp.int32)


def _suffix_batches(suffixes: Suffixes, batch_rows: int):
    for (numbers, alone), (_, behind) in zip(
        prompt_batches(suffixes.alone, batch_rows), prompt_batches(suffixes.behind, batch_rows)
    ):
        places = suffixes.places[numbers] & (numbers >= 0)[:, None]
        pairs = [(jnp.array(prompts.tokens), jnp.array(prompts.mask)) for prompts in (alone, behind)]
        yield numbers, *pairs, jnp.array(places)


def prompt_diff(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    suffixes: Suffixes,
    *,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> PromptDiff:
    """How each feature changes on the suffixes' tokens when the pre-prompt stands before them.

    Raises:
        InputError: no place counts in both runs.
    """
    sums, counts = [], []
    for numbers, alone, behind, places in _suffix_batches(suffixes, batch_rows):
        found, counted = _both_sums(lm, coder, alone, behind, places, jnp.float32(max_norm), site, suffixes.starts)
        sums.append(np.asarray(found, np.float64)[:, numbers >= 0])
        counts.append(np.asarray(counted, np.int64)[numbers >= 0])
    each, per_suffix = np.concatenate(sums, axis=1), np.concatenate(counts)
    places = int(per_suffix.sum())
    if not places:
        raise InputError("no token of the suffixes counts in both runs: give longer suffixes")
    alone, behind, fired_alone, fired_behind = each.sum(axis=1) / places
    some = per_suffix > 0
    changes = (each[1] - each[0])[some] / per_suffix[some][:, None]
    error = np.full(len(alone), np.nan)
    if some.sum() > 1:
        error = changes.std(axis=0, ddof=1) / np.sqrt(some.sum())
    return PromptDiff(alone, behind, behind - alone, error, fired_alone, fired_behind, places)


def changed_places(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    suffixes: Suffixes,
    features: np.ndarray,
    *,
    count: int = 3,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> list[list[ChangedPlace]]:
    """The `count` places at which each of `features` changes most, largest first; those with any change."""
    found, chosen, limit = ([], []), jnp.array(features, jnp.int32), jnp.float32(max_norm)
    for numbers, alone, behind, places in _suffix_batches(suffixes, batch_rows):
        *codes, _ = _both(lm, coder, alone, behind, places, limit, site, suffixes.starts, chosen)
        for values, kept in zip(codes, found):
            kept.append(np.asarray(values)[numbers >= 0])
    without, with_it = (np.concatenate(parts) for parts in found)
    lists = []
    for column in range(len(features)):
        change = np.abs(with_it[..., column] - without[..., column])
        best = np.argsort(-change, axis=None, kind="stable")[:count]
        at = [np.unravel_index(flat, change.shape) for flat in best]
        lists.append(
            [
                ChangedPlace(int(s), int(p), float(without[s, p, column]), float(with_it[s, p, column]))
                for s, p in at
                if change[s, p] > 0
            ]
        )
    return lists
