"""The strongest (query feature, key feature, output feature) trios of a head: who looks for whom, and what it brings.

At a token i and a place j that head h attends to, with A_ij its softmax weight and s the norm's scale,

    l_ij(f, g) = s_i s_j c_if c_jg QK[f, g]      what query feature f and key feature g add to the logit
    o_j(g, t)  = s_j c_jg OV[g, t]               what g writes on output feature t, at attention 1

    strength(f, g, t) = mean over tokens i of [t fires at i]  sum over j of A_ij l_ij(f, g) o_j(g, t)

To first order A_ij l_ij is the attention that the pair f, g draws to the place, so a strength is the part of t's
pre-activation that this attention brings from g, on tokens where t fires. A trio of which both l and o are below zero
has a positive strength too: the signs of both stand beside it. The mean is over all tokens that count, so a trio is
strong that acts often or much.

How they are found: for each pair the sum of A_ij |l_ij(f, g)| max_t |o_j(g, t)| bounds every trio it is in. Trios of
the pairs with the largest bounds are summed exactly; `Trios.certain` says for how many of the first ones no other
pair's bound is larger. j runs over the places that `collect_attention` kept.

Memory on the device, a head at a time: 4 x n^2 bytes for the bounds of n features, and pairs x n_out floats.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.connectors.attention_codes import AttentionCodes
from sparse_jax.connectors.attention_heads import Heads, read_by, turned, written_by
from sparse_jax.connectors.attention_maps import output_readers, projected
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError

# Pairs whose trios are summed exactly; tokens and pairs at a place that go through a compiled function at once.
PAIRS, BATCH, HITS = 512, 256, 1 << 15
LIMIT_BYTES = 4 << 30
# Float32 sums of positive numbers: a bound holds up to this much.
_MARGIN = 1.001


@dataclass(frozen=True, eq=False)
class Trios:
    """The strongest trios of a head by size of their strength, `[count]` each. Numpy.

    Attributes:
        head: which.
        query, key, output: int32 features.
        strength: float64, units of the output feature's pre-activation.
        bound: no trio of a pair that was not summed is stronger than this.
    """

    head: int
    query: np.ndarray
    key: np.ndarray
    output: np.ndarray
    strength: np.ndarray
    bound: float

    def __len__(self) -> int:
        return len(self.query)

    @property
    def certain(self) -> int:
        """So many of the first are certainly the strongest of all."""
        return int((np.abs(self.strength) >= self.bound).sum())


class HeadVectors(NamedTuple):
    """A head's side of every feature.

    query, key, value: `[n_features, head_dim]` directions through W_q (times score_scale), W_k, W_v.
    output: `[n_out, head_dim]` what each output feature's encoder takes from the head's values.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    output: jax.Array


def head_vectors(heads: Heads, head: int, before: Normalised, after: Normalised) -> HeadVectors:
    """A head's vectors for the features of the two dictionaries.

    Raises:
        InputError: no such head; logits that are not bilinear; dictionaries that are not linear before their
            nonlinearity (`read_by`, `written_by`).
    """
    heads.check_logits()
    heads.check_head(head)
    directions, readers = written_by(before)[0], read_by(after)[0]
    q, k, v = (projected(heads, name, head, directions) for name in "qkv")
    made = heads.score_scale * q, k, v, output_readers(heads, head, readers)
    return HeadVectors(*(each.astype(jnp.float32) for each in made))


class _Side(NamedTuple):
    """Tokens' codes times the norm's scale, and where they stand."""

    values: jax.Array
    indices: jax.Array
    position: jax.Array


class _Store(NamedTuple):
    """What both passes gather from, on the device; a row of zeros stands behind the last token for "none"."""

    before: _Side
    output: jax.Array  # [tokens + 1, slots] features of attn_out
    fires: jax.Array


def _store(found: AttentionCodes) -> _Store:
    pad = lambda a: jnp.array(np.concatenate([a, np.zeros((1, *a.shape[1:]), a.dtype)]))  # noqa: E731
    before = _Side(pad(found.before.values * found.scale[:, None]), pad(found.before.indices),
                   pad(found.tokens.position.astype(np.int32)))  # fmt: skip
    return _Store(before, pad(found.after.indices), pad(found.after.values > 0))


@partial(jax.jit, donate_argnames=("sums",))
def _add_bounds(sums, heads, vectors: HeadVectors, store: _Store, i, j, attention):
    """`sums [n x n]` with the bounds of the pairs at tokens `i [batch]`, places `j [batch, sources]` added."""
    values, indices, position = store.before
    query = values[i][..., None] * vectors.query[indices[i]]  # [batch, slots, head_dim]
    distance = (position[i][:, None] - position[j])[..., None]
    query = turned(heads, query[:, None], distance)  # [batch, sources, slots, head_dim]
    key, value = (values[j][..., None] * side[indices[j]] for side in (vectors.key, vectors.value))
    logit = jnp.einsum("isfd,isgd->isfg", query, key)
    written = jnp.einsum("isgd,itd->isgt", value, vectors.output[store.output[i]])
    most = jnp.max(jnp.where(store.fires[i][:, None, None, :], jnp.abs(written), 0), axis=-1)
    bound = attention[..., None, None] * jnp.abs(logit) * most[:, :, None, :]
    n = len(vectors.query)
    # Pairs that are not there have bound 0; whatever they point at stays as it is.
    return sums.at[indices[i][:, None, :, None] * n + indices[j][:, :, None, :]].add(bound)


@partial(jax.jit, donate_argnames=("sums",))
def _add_strengths(sums, heads, vectors: HeadVectors, store: _Store, rank, i, j, f, g, attention):
    """`sums [pairs, n_out]` with the pairs `rank [hits]` at slots f of token i and g of token j added."""
    values, indices, position = store.before
    a, b = indices[i, f], indices[j, g]
    query = turned(heads, values[i, f][:, None] * vectors.query[a], position[i] - position[j])
    code = values[j, g]
    logit = jnp.sum(query * vectors.key[b], axis=-1) * code
    outputs = store.output[i]
    written = code[:, None] * jnp.einsum("hd,htd->ht", vectors.value[b], vectors.output[outputs])
    strength = jnp.where(store.fires[i], (attention * logit)[:, None] * written, 0)
    return sums.at[rank[:, None], outputs].add(strength)


def find_trios(
    heads: Heads,
    head: int,
    found: AttentionCodes,
    before: Normalised,
    after: Normalised,
    *,
    count: int = 20,
    pairs: int = PAIRS,
    per_pair: int | None = None,
    limit_bytes: int = LIMIT_BYTES,
) -> Trios:
    """The strongest trios of a head.

    Args:
        heads, head: which.
        found: codes and attention on a text.
        before, after: its dictionaries.
        count: how many.
        pairs: (query, key) pairs whose trios are summed exactly.
        per_pair: trios of one pair among them, at most; None: any number.
        limit_bytes: of the device, for bounds and sums.

    Raises:
        InputError: numbers below 1, what `head_vectors` raises, more memory than the limit.
    """
    if count < 1 or pairs < 1 or (per_pair is not None and per_pair < 1):
        raise InputError(f"{count} trios of {pairs} pairs, {per_pair} of each: give at least 1")
    n, n_out = found.before.n_features, found.after.n_features
    pairs = min(pairs, n * n)
    needed = 4 * (2 * n * n + pairs * n_out)
    if needed > limit_bytes:
        raise InputError(
            f"trios of {n:,} x {n:,} x {n_out:,} features need {needed:,} bytes, limit_bytes is {limit_bytes:,}: raise "
            "it, or take smaller dictionaries"
        )
    vectors, store = head_vectors(heads, head, before, after), _store(found)
    bounds = np.asarray(_bounds(heads, head, vectors, store, found)).astype(np.float64) / len(found)
    top = np.argpartition(-bounds, pairs - 1)[:pairs]
    top = top[bounds[top] > 0]
    outside = bounds.copy()
    outside[top] = 0
    sums = _strengths(heads, head, vectors, store, found, top) / len(found)
    order = np.argsort(-np.abs(sums), axis=None, kind="stable")
    if per_pair is not None:
        rank = np.argsort(np.argsort(-np.abs(sums), axis=1, kind="stable"), axis=1)
        order = order[rank.reshape(-1)[order] < per_pair]
    order = order[:count]
    order = order[sums.reshape(-1)[order] != 0]
    pair, output = np.divmod(order, n_out)
    query, key = np.divmod(top[pair], n)
    return Trios(head, *(each.astype(np.int32) for each in (query, key, output)), sums.reshape(-1)[order],
                 float(outside.max()) * _MARGIN)  # fmt: skip


def _bounds(heads, head, vectors, store, found) -> jax.Array:
    """`[n x n]` summed bounds of all pairs."""
    sums = jnp.zeros(found.before.n_features**2, jnp.float32)
    none = len(found)
    for start in range(0, none, BATCH):
        i = np.arange(start, min(start + BATCH, none))
        at, attention = found.sources[head, i], found.attention[head, i]
        filled = BATCH - len(i)
        i = np.pad(i, (0, filled), constant_values=none).astype(np.int32)
        at = np.pad(np.where(at < 0, none, at), ((0, filled), (0, 0)), constant_values=none).astype(np.int32)
        attention = np.pad(attention, ((0, filled), (0, 0)))
        sums = _add_bounds(sums, heads, vectors, store, jnp.array(i), jnp.array(at), jnp.array(attention))
    return sums


def _strengths(heads, head, vectors, store, found, top) -> np.ndarray:
    """`[pairs, n_out]` float64 summed strengths of the trios of the pairs `top` (query x n + key)."""
    n = found.before.n_features
    rank = np.full(n * n, -1, np.int32)
    rank[top] = np.arange(len(top), dtype=np.int32)
    sums = jnp.zeros((max(1, len(top)), found.after.n_features), jnp.float32)
    for hits in _hits(found, head, rank):
        for start in range(0, len(hits[0]), HITS):
            part = [each[start : start + HITS] for each in hits]
            filled = HITS - len(part[0])
            part = [jnp.array(np.pad(each, (0, filled))) for each in part]  # attention 0: adds nothing
            sums = _add_strengths(sums, heads, vectors, store, *part)
    return np.asarray(sums).astype(np.float64)


def _hits(found, head, rank, at_once: int = 4096):
    """Where the ranked pairs stand: (rank, token i, token j, slot of i, slot of j, attention), `[hits]` each."""
    n = found.before.n_features
    for start in range(0, len(found), at_once):
        some = slice(start, start + at_once)
        fires, indices = found.before.values[some] > 0, found.before.indices[some]
        for source in range(found.sources.shape[2]):
            j, attention = found.sources[head, some, source], found.attention[head, some, source]
            key_fires = (found.before.values[j] > 0) & (j >= 0)[:, None]
            ranks = rank[indices[:, :, None] * n + found.before.indices[j][:, None, :]]
            ranks = np.where(fires[:, :, None] & key_fires[:, None, :], ranks, -1)
            i, f, g = (each.astype(np.int32) for each in np.nonzero(ranks >= 0))
            yield ranks[i, f, g], i + np.int32(start), j[i], f, g, attention[i]
