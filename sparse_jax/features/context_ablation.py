"""What a feature needs: its activation at a place when one earlier token of the row is taken away or replaced.

By default the token is dropped: it is removed and the rest moves up by one, as if it had never been there. That needs
one pass for each token and no choice of what to put in its place; it also joins its neighbours and shifts positions.
With `replace_with` the token is replaced by each of the tokens given (one stated token, or `sample_tokens` from a
text), nothing moves, and the mean activation is taken. Two ways that disagree about a token say that its place matters.

All variants of a context are rows of batches of one shape. Only layers up to the site are run; what stands behind the
place is never seen by it and is cut away.

Source: Cunningham et al. 2023, appendix (context ablation); Bills et al. 2023.
"""

import html
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.blocks import CHUNK_ROWS, activations
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.logit_effect import check_features
from sparse_jax.features.page import Context, _context
from sparse_jax.lm.model import LanguageModel, check_site, site_width
from sparse_jax.lm.sites import Site

# Rows are cut to a multiple of so many positions: contexts of like length share a compiled program.
_LENGTH_STEP = 32


class Needs(NamedTuple):
    """Numpy, host.

    Attributes:
        activations: `[contexts]` float32 at the place, as it is.
        changes: `[contexts, position]` float32 what the activation changes by without the token (ablated minus as it
            is: negative where the token is needed); NaN at the place itself, behind it, and where nothing was tried.
    """

    activations: np.ndarray
    changes: np.ndarray


def context_needs(
    lm: LanguageModel,
    coder: Normalised,
    site: str | Site,
    feature: int,
    tokens: np.ndarray,
    positions: np.ndarray,
    *,
    replace_with: Sequence[int] | np.ndarray | None = None,
    start: int = 0,
    batch_rows: int = 32,
) -> Needs:
    """Take away each earlier token of each context.

    Args:
        lm, coder, site: the model and the dictionary at the site.
        feature: its number.
        tokens: `[contexts, position]` the row of each context.
        positions: `[contexts]` the place in it.
        replace_with: token ids that take the token's place, one after the other; None: the token is dropped.
        start: earlier tokens are tried from this position on: 1 leaves a begin-of-text token alone.
        batch_rows: variants at once, a multiple of 8.

    Raises:
        InputError: numbers, shapes or token ids that do not fit.
    """
    site = check_site(lm.config, site)
    check_features(coder, [feature])
    if coder.dictionary.d_in != site_width(lm.config, site):
        raise InputError(f"the dictionary takes {coder.dictionary.d_in} numbers; site {site} has another width")
    if tokens.ndim != 2 or positions.shape != (len(tokens),) or not len(tokens):
        raise InputError(f"tokens {tokens.shape}, positions {positions.shape}: give [contexts, position], [contexts]")
    if positions.min() < 0 or positions.max() >= tokens.shape[1]:
        raise InputError(f"positions {positions.min()} to {positions.max()}: rows have 0 to {tokens.shape[1] - 1}")
    replacements = None if replace_with is None else np.atleast_1d(np.asarray(replace_with))
    vocab = lm.config.vocab_size
    if replacements is not None and (
        not replacements.size
        or replacements.dtype.kind not in "iu"
        or not 0 <= replacements.min() <= replacements.max() < vocab
    ):
        raise InputError(f"replace_with {replacements.tolist()}: give token ids from 0 to {vocab - 1}, or None")
    if batch_rows < 1 or batch_rows % CHUNK_ROWS or start < 0:
        raise InputError(f"batch_rows {batch_rows}, start {start}: give a multiple of {CHUNK_ROWS}, and 0 or more")
    changes = np.full(tokens.shape, np.nan, np.float32)
    clean = np.zeros(len(tokens), np.float32)
    for context, (row, place) in enumerate(zip(tokens, positions)):
        rows, places = variants(row[: place + 1], start, replacements)
        found = _activations(lm, coder, site, feature, rows, places, tokens.shape[1], batch_rows)
        clean[context] = found[0]
        tried = slice(min(start, place), place)
        each = found[1:].reshape(-1, 1 if replacements is None else len(replacements))
        changes[context, tried] = each.mean(axis=1) - found[0]
    return Needs(clean, changes)


def variants(row: np.ndarray, start: int, replacements: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(rows, places) of a context: first as it is, then without each token before its last, from `start` on.

    Args:
        row: `[n]` token ids up to and with the place.
        start: the first token that is taken away.
        replacements: None: it is dropped, and the end is filled up; else each of these in its place, in turn.

    Returns:
        `[1 + tried x replacements, n]` token ids, and where the place then is.
    """
    place, made, places = len(row) - 1, [row], [len(row) - 1]
    for j in range(min(start, place), place):
        if replacements is None:
            made.append(np.append(np.delete(row, j), row[-1]))
            places.append(place - 1)
            continue
        for token in replacements:
            made.append(np.concatenate([row[:j], [token], row[j + 1 :]]))
            places.append(place)
    return np.stack(made).astype(np.int32), np.array(places, np.int32)


def sample_tokens(tokens: np.ndarray, mask: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`[count]` token ids for `replace_with`: drawn from the places of a text that count, common tokens more often.

    Raises:
        InputError: no place counts.
    """
    if not mask.any():
        raise InputError("no token counts: the mask drops all of them")
    return np.random.default_rng(seed).choice(tokens[mask], count).astype(np.int32)


@partial(jax.jit, static_argnames=("site",))
def _code(lm, coder, site, feature, tokens, places):
    x = activations(lm, tokens, site)[jnp.arange(len(tokens), dtype=jnp.int32), places]
    return jnp.maximum(jnp.take(coder.encode(x), feature, axis=1), 0)


def _activations(lm, coder, site, feature, rows, places, context, batch_rows) -> np.ndarray:
    """`[variants]` the feature's activation at the place of each."""
    length = min(-(-rows.shape[1] // _LENGTH_STEP) * _LENGTH_STEP, context)
    fill = -len(rows) % batch_rows
    rows = np.pad(rows, ((0, fill), (0, length - rows.shape[1])))
    places, found = np.pad(places, (0, fill)), []
    for begin in range(0, len(rows), batch_rows):
        part = slice(begin, begin + batch_rows)
        found.append(_code(lm, coder, site, jnp.int32(feature), jnp.array(rows[part]), jnp.array(places[part])))
    return np.concatenate([np.asarray(values) for values in found])[: len(rows) - fill]


def need_contexts(
    needs: Needs, tokens: np.ndarray, positions: np.ndarray, token_strings: Callable[[np.ndarray], list[str]]
) -> tuple[Context, ...]:
    """Each context up to its place, as the page draws it: a token's value is what the activation loses without it.

    Above zero: the feature needs the token; below: it would fire more strongly without. The place itself has its
    activation.
    """
    made = []
    for activation, changes, row, place in zip(*needs, tokens, positions):
        losses = [float(loss) for loss in np.nan_to_num(-changes[:place])]
        strings = tuple(token_strings(row[: place + 1]))
        made.append(Context(strings, (*losses, float(activation)), int(place), "needs"))
    return tuple(made)


def needs_html(contexts: Sequence[Context], maximum: float, shown: int = 40) -> str:
    """A list for a page, to stand under the texts: the last `shown` tokens, red where needed, blue where held down.

    The page's style gives the class `needs` these hues.

    Args:
        contexts: from `need_contexts`.
        maximum: the activation at full shade: the feature's maximum.
        shown: tokens up to the place.
    """
    items = "".join(_context(_tail(context, shown), maximum) for context in contexts)
    label = html.escape("what the activation loses without each earlier token: red loses, blue gains")
    return f'<ol class="ctx needs" aria-label="{label}">{items}</ol>'


def _tail(context: Context, shown: int) -> Context:
    first = max(0, context.peak + 1 - shown)
    part = slice(first, context.peak + 1)
    return Context(context.tokens[part], context.activations[part], context.peak - first, context.label, context.source)
