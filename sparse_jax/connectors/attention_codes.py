"""What attention moves on a text, as features: codes before and after a layer's attention, and its strongest sources.

    found = collect_attention(lm, 3, text, numbers, before, after)
    found.pair()                        codes of the same position: what `same_position` needs
    found.sources[h, i, 0]              the token that head h at token i attends to most, of those that count

One pass over the rows. Of every head and token the `sources` places with the largest attention are kept, of those that
the mask lets count: an attention sink at the start of a row has no codes that mean anything. The share of attention
that goes to places that do not count, and the share that is kept, are means over tokens, by head.

Memory: on the device a batch's patterns, rows x heads x context^2 floats; on the host for each token
16 x slots + 8 x heads x sources bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.activations.blocks import check_finite, first_not_finite
from sparse_jax.connectors.attention_heads import heads_of, norm_scale
from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.firings import checked_rows, rows_at_once
from sparse_jax.lm.model import LanguageModel, check_site, forward, site_width
from sparse_jax.lm.rows import Rows
from sparse_jax.numerics import safe_norm
from sparse_jax.numerics.sparse_codes import SparseCodes, top_k_codes

# Places that a head attends to, and active features of a token, that are kept.
SOURCES, SLOTS, BATCH_ROWS = 4, 64, 8


@dataclass(frozen=True, eq=False)
class AttentionCodes:
    """Tokens that count, their codes before and after attention, and where heads look. Numpy, host.

    Attributes:
        layer: whose attention.
        before, after: codes at resid_pre and attn_out, `[tokens, slots]`.
        tokens: where they stand.
        scale: `[tokens]` float32, the norm's factor.
        sources: `[head, token, source]` int32 numbers of tokens here, most attended first; -1: none.
        attention: `[head, token, source]` float32 weights of the softmax; 0 where there is none.
        own: `[head]` mean attention to the own position.
        uncounted: `[head]` mean attention to places that do not count.
        kept: `[head]` mean attention to `sources`.
    """

    layer: int
    before: SiteCodes
    after: SiteCodes
    tokens: Tokens
    scale: np.ndarray
    sources: np.ndarray
    attention: np.ndarray
    own: np.ndarray
    uncounted: np.ndarray
    kept: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def pair(self) -> Pair:
        """Codes before and after, of the same position."""
        return Pair(self.before, self.after, self.tokens)


class _Batch(NamedTuple):
    """A batch of rows; of codes, `[rows x position, ...]` before and after attention."""

    counted: jax.Array  # [rows, position]
    scale: jax.Array
    codes: tuple[SparseCodes, SparseCodes]
    active: tuple[jax.Array, jax.Array]  # features that fire, slots or not
    weights: jax.Array  # [rows, head, position, source], the largest attention to places that count
    places: jax.Array
    own: jax.Array  # [rows, head, position]
    uncounted: jax.Array
    first_bad: tuple[jax.Array, jax.Array]


@partial(jax.jit, static_argnames=("layer", "slots", "sources"))
def _batch(lm, tokens, mask, before, after, max_norms, layer, slots, sources) -> _Batch:
    names = [f"{name}.{layer}" for name in ("resid_pre", "attn_out", "attn_pattern")]
    found = forward(lm, tokens, capture=names, stop=layer + 1).captured
    x, out, pattern = (found[name].astype(jnp.float32) for name in names)
    counted = mask & (safe_norm(x) <= max_norms[0]) & (safe_norm(out) <= max_norms[1])
    scale = norm_scale(heads_of(lm, layer), x).astype(jnp.float32)
    flat = [each.reshape(-1, each.shape[-1]) for each in (x, out)]
    codes = [jnp.maximum(coder.encode(each), 0) for coder, each in zip((before, after), flat)]
    attended = jnp.where(counted[:, None, None, :], pattern, 0)
    weights, places = lax.top_k(attended, min(sources, pattern.shape[-1]))
    return _Batch(
        counted,
        scale,
        tuple(top_k_codes(each, size) for each, size in zip(codes, slots)),
        tuple(jnp.sum(each > 0, axis=1, dtype=jnp.int32) for each in codes),
        weights,
        places,
        jnp.diagonal(pattern, axis1=2, axis2=3),
        jnp.sum(pattern, axis=-1) - jnp.sum(attended, axis=-1),
        tuple(map(first_not_finite, flat)),
    )


def collect_attention(
    lm: LanguageModel,
    layer: int,
    text: Rows,
    row_numbers: np.ndarray,
    before: Normalised,
    after: Normalised,
    *,
    sources: int = SOURCES,
    slots: int = SLOTS,
    max_norms: tuple[float, float] = (float("inf"), float("inf")),
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], None] | None = None,
) -> AttentionCodes:
    """Codes and attention on rows of text, all batches of one shape.

    Args:
        lm, layer: whose attention.
        text, row_numbers: which rows, each once.
        before: dictionary of resid_pre of the layer.
        after: dictionary of its attn_out.
        sources: places of each head and token that are kept.
        slots: active features of a token that are kept, at most; what finds no slot is counted in `overflow`.
        max_norms: tokens whose activation before or after has a larger norm do not count.
        batch_rows: rows at once.
        progress: is told of the tokens of each batch.

    Raises:
        InputError: numbers below 1, rows that are not there, dictionaries of another width, an activation that is not
            finite, no token that counts.
    """
    if sources < 1 or slots < 1:
        raise InputError(f"{sources} sources, {slots} slots: give at least 1 of each")
    for coder, name in ((before, "resid_pre"), (after, "attn_out")):
        width = site_width(lm.config, check_site(lm.config, f"{name}.{layer}"))
        if coder.dictionary.d_in != width:
            raise InputError(f"the dictionary of {name}.{layer} reads {coder.dictionary.d_in} numbers, not {width}")
    sizes = tuple(min(slots, coder.dictionary.n_features) for coder in (before, after))
    numbers, batch_rows = checked_rows(text, row_numbers), rows_at_once(batch_rows, text.context, 1)
    limits, totals = jnp.array(max_norms, jnp.float32), _Totals(layer, sizes, lm.config.n_heads)
    for batch in np.concatenate([numbers, np.full(-len(numbers) % batch_rows, -1, np.int64)]).reshape(-1, batch_rows):
        tokens, _, mask, document = text[batch]
        made = _batch(lm, jnp.array(tokens), jnp.array(mask), before, after, limits, layer, sizes, sources)
        totals.add(jax.tree.map(np.asarray, made), batch, tokens, document)
        if progress is not None:
            progress(int((batch >= 0).sum()) * text.context)
    return totals.result([coder.dictionary.n_features for coder in (before, after)])


class _Totals:
    """What is collected, while it is."""

    def __init__(self, layer: int, slots: tuple[int, int], n_heads: int):
        self.names = [f"resid_pre.{layer}", f"attn_out.{layer}"]
        self.layer, self.slots, self.total, self.kept = layer, slots, 0, []
        self.shares, self.overflow = np.zeros((3, n_heads)), np.zeros(2, np.int64)

    def add(self, made: _Batch, batch: np.ndarray, tokens: np.ndarray, document: np.ndarray) -> None:
        """Keep what a batch of rows has on tokens that count."""
        check_finite(dict(zip(self.names, map(int, made.first_bad))), batch, tokens)
        row, position = np.nonzero(made.counted)
        number = np.full(made.counted.shape, -1, np.int32)
        number[row, position] = self.total + np.arange(len(row), dtype=np.int32)
        weights, places = (each.transpose(0, 2, 1, 3)[row, position] for each in (made.weights, made.places))
        sources = np.where(weights > 0, number[row[:, None, None], places], np.int32(-1))
        weights = np.where(sources >= 0, weights, 0)
        own, uncounted = (each.transpose(0, 2, 1)[row, position] for each in (made.own, made.uncounted))
        self.shares += [each.sum(0, dtype=np.float64) for each in (own, uncounted, weights.sum(2))]
        flat = made.counted.reshape(-1)
        codes = [each[flat] for side in made.codes for each in side]
        self.overflow += [int(np.maximum(n[flat] - k, 0).sum()) for n, k in zip(made.active, self.slots)]
        self.kept.append((tokens[made.counted], document[made.counted], batch[row], position.astype(np.int32),
                          made.scale[made.counted], sources, weights, *codes))  # fmt: skip
        self.total += len(row)

    def result(self, n_features: list[int]) -> AttentionCodes:
        """All of it; raises InputError where nothing counts."""
        if not self.total:
            raise InputError("no token of these rows counts: the mask or the largest norm drops them all")
        *places, scale, sources, weights, v1, i1, v2, i2 = map(np.concatenate, zip(*self.kept, strict=True))
        sides = (
            SiteCodes(name, n, values, indices.astype(np.int32), int(over))
            for name, n, values, indices, over in zip(self.names, n_features, (v1, v2), (i1, i2), self.overflow)
        )
        by_head = (np.ascontiguousarray(each.transpose(1, 0, 2)) for each in (sources, weights))
        return AttentionCodes(self.layer, *sides, Tokens(*places), scale, *by_head, *(self.shares / self.total))
