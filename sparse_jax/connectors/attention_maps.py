"""QK and OV maps of an attention head between the features of dictionaries.

    QK[f, g] = score_scale  turn(d_f W_q, distance) . (d_g W_k)     logit_ij  += s_i s_j c_if c_jg QK[f, g]
    OV[g, t] = d_g W_v W_o e_t                                      pre_t at i += A_ij s_j c_jg OV[g, t]

f is a feature of the dictionary that reads the residual stream, at the query's place i; g one at the key's place j =
i - distance; t one of the dictionary of attn_out, of which e_t is the encoder's column: OV adds to its pre-activation.
d are decoder directions in raw units, s the norm's scale (`attention_heads`): in a map it is a factor that the caller
gives, the mean over a text say; `logit_parts` and `output_parts` take the live one.

The sums over features are exact once what the dictionaries leave is counted as three more "features": what they add
without any (decoder bias and centre), the error x - x_hat of the place, and the bias of queries, keys or values, which
has no scale before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.connectors.attention_heads import Heads, norm_scale, turned
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes

# Memory for the part of a map that is made at once.
LIMIT_BYTES = 64 << 20
# What stands behind the features in `parts`.
EXTRAS = ("offset", "error", "bias")


class TopEntries(NamedTuple):
    """Entries of a map that are largest in size, the largest first, `[count]` each. Numpy.

    Attributes:
        values: float32.
        rows, columns: int32 features (query and key; source and output).
    """

    values: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def projected(heads: Heads, name: str, head: int | jax.Array, vectors: jax.Array) -> jax.Array:
    """`[..., head_dim]`: raw vectors `[..., d_model]` through W_q, W_k or W_v of a head (name "q", "k" or "v")."""
    W = getattr(heads, f"W_{name}")[head if name == "q" else heads.kv(head)]
    return vectors @ W


def output_readers(heads: Heads, head: int | jax.Array, readers: jax.Array) -> jax.Array:
    """`[n_out, head_dim]`: what each reader, a column of `readers [d_model, n_out]`, takes from a head's values."""
    return (heads.W_o[head] @ readers).T


def qk_map(
    heads: Heads,
    head: int,
    distance: int,
    query_directions: jax.Array,
    key_directions: jax.Array,
    scale: float = 1.0,
) -> jax.Array:
    """`[queries, keys]`: what a unit of each query feature and of each key feature add to the logit.

    Args:
        heads, head: which.
        distance: the query's place minus the key's.
        query_directions, key_directions: `[n, d_model]` raw; give some of a dictionary's where all x all is too large.
        scale: product of the norm's scales at the two places.

    Raises:
        InputError: no such head; queries and keys are normed (`Heads.check_logits`).
    """
    heads.check_logits()
    heads.check_head(head)
    q = _turned_queries(heads, head, distance, query_directions)
    return scale * heads.score_scale * (q @ projected(heads, "k", head, key_directions).T)


def ov_map(heads: Heads, head: int, source_directions: jax.Array, readers: jax.Array, scale: float = 1.0) -> jax.Array:
    """`[sources, n_out]`: what a unit of each source feature adds to each pre-activation where attention is 1.

    Args:
        heads, head: which.
        source_directions: `[n, d_model]` raw.
        readers: `[d_model, n_out]` encoder columns (`read_by`); the identity for attn_out itself.
        scale: the norm's scale at the source.

    Raises:
        InputError: no such head.
    """
    heads.check_head(head)
    return scale * (projected(heads, "v", head, source_directions) @ output_readers(heads, head, readers).T)


def _turned_queries(heads, head, distance, directions):
    return turned(heads, projected(heads, "q", head, directions), jnp.array(distance, jnp.int32))


def top_qk(
    heads: Heads,
    head: int,
    distance: int,
    query_directions: jax.Array,
    key_directions: jax.Array,
    count: int = 100,
    *,
    query_weight: jax.Array | None = None,
    key_weight: jax.Array | None = None,
    limit_bytes: int = LIMIT_BYTES,
) -> TopEntries:
    """The largest entries of `qk_map` in size, found in blocks of queries: the whole map is never made.

    Args:
        heads, head, distance, query_directions, key_directions: as for `qk_map`.
        count: how many.
        query_weight, key_weight: `[n]` what entries are multiplied with: the mean code where a feature fires times the
            mean scale of the norm, say; None: 1.
        limit_bytes: memory of a block of the map.

    Raises:
        InputError: what `qk_map` raises; a count below 1; a limit that one row of the map exceeds.
    """
    heads.check_logits()
    heads.check_head(head)
    q = heads.score_scale * _turned_queries(heads, head, distance, query_directions)
    return _top_products(q, projected(heads, "k", head, key_directions), query_weight, key_weight, count, limit_bytes)


def top_ov(
    heads: Heads,
    head: int,
    source_directions: jax.Array,
    readers: jax.Array,
    count: int = 100,
    *,
    source_weight: jax.Array | None = None,
    output_weight: jax.Array | None = None,
    limit_bytes: int = LIMIT_BYTES,
) -> TopEntries:
    """The largest entries of `ov_map` in size, found in blocks of sources; arguments as for `top_qk`.

    Raises:
        InputError: no such head, a count below 1, a limit that one row of the map exceeds.
    """
    heads.check_head(head)
    v, e = projected(heads, "v", head, source_directions), output_readers(heads, head, readers)
    return _top_products(v, e, source_weight, output_weight, count, limit_bytes)


def _top_products(a, b, a_weight, b_weight, count, limit_bytes) -> TopEntries:
    """The largest |(a w)(b w)^T| in blocks of rows of `a`, one shape for all."""
    if count < 1:
        raise InputError(f"{count} entries: give at least 1")
    a, b = (x if weight is None else x * weight[:, None] for x, weight in ((a, a_weight), (b, b_weight)))
    row_bytes = 2 * b.dtype.itemsize * len(b)  # a product and its size
    if row_bytes > limit_bytes:
        raise InputError(f"a row of the map takes {row_bytes:,} bytes, limit_bytes is {limit_bytes:,}: raise it")
    rows = min(len(a), limit_bytes // row_bytes)
    count = min(count, len(a) * len(b))
    best = (jnp.full(count, -1, a.dtype), jnp.zeros(count, a.dtype), *(jnp.zeros(count, jnp.int32),) * 2)
    padded = jnp.concatenate([a, jnp.zeros((-len(a) % rows, a.shape[1]), a.dtype)])
    for start in range(0, len(a), rows):
        best = _merge_top(best, padded[start : start + rows], b, jnp.int32(start), jnp.int32(len(a)))
    return TopEntries(*(np.asarray(each) for each in best[1:]))


@jax.jit
def _merge_top(best, a, b, start, n):
    sizes, values, rows, columns = best
    block = a @ b.T
    real = start + jnp.arange(len(a), dtype=jnp.int32)[:, None] < n  # the last block is filled up
    size = jnp.where(real, jnp.abs(block), -1).reshape(-1)
    top, at = lax.top_k(size, min(len(sizes), len(size)))
    at = at.astype(jnp.int32)
    every = jnp.concatenate([sizes, top])
    sizes, chosen = lax.top_k(every, len(sizes))
    found = block.reshape(-1)[at], start + at // len(b), at % len(b)
    return sizes, *(jnp.concatenate(pair)[chosen] for pair in zip((values, rows, columns), found))


# Exact sums at a place


def parts(
    heads: Heads,
    name: str,
    head: int | jax.Array,
    codes: SparseCodes,
    directions: jax.Array,
    offset: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """`[rows, slots + 3, head_dim]`: a query, key or value as the sum of what features and EXTRAS give it.

    Args:
        heads, head: which.
        name: "q", "k" or "v".
        codes: `[rows, slots]` of the dictionary at these places.
        directions, offset: what it writes (`written_by`).
        x: `[rows, d_model]` the raw residual stream there; gives the live scale and the error.
    """
    scale = norm_scale(heads, x)[:, None, None]
    written = codes.values[..., None] * directions[codes.indices]
    error = x - offset - jnp.sum(written, axis=1)
    vectors = jnp.concatenate([written, jnp.broadcast_to(offset, x.shape)[:, None], error[:, None]], axis=1)
    bias = getattr(heads, f"b_{name}")[head if name == "q" else heads.kv(head)]
    made = scale * projected(heads, name, head, vectors)
    return jnp.concatenate([made, jnp.broadcast_to(bias, (len(x), 1, len(bias)))], axis=1)


@jax.jit
def logit_parts(heads: Heads, query_parts: jax.Array, key_parts: jax.Array, distance: jax.Array) -> jax.Array:
    """`[rows, query parts, key parts]`: what each pair adds to the attention logit; the sum of all is the logit.

    Args:
        heads: which.
        query_parts, key_parts: `[rows, parts, head_dim]` of `parts`.
        distance: `[rows]` int32, the query's place minus the key's.
    """
    q = heads.score_scale * turned(heads, query_parts, distance[:, None])
    return jnp.einsum("rqd,rkd->rqk", q, key_parts)


def output_parts(heads: Heads, head: int | jax.Array, value_parts: jax.Array, readers: jax.Array) -> jax.Array:
    """`[rows, parts, n_out]`: what each part of the values adds to pre-activations where attention is 1.

    attn_out x readers = b_o x readers + the sum over heads, key places and parts of attention x this.
    """
    return value_parts @ output_readers(heads, head, readers).T
