"""Sparse data of a known dictionary, some combinations of features held out. Source: Barin Pacela et al. 2026 ("Stop
Probing, Start Coding", arXiv 2603.28744), whose question this asks; which combinations are held out is our choice.

    x = z W + noise * eps      W `[n, d]` random rows of norm 1, d < n;  z has exactly k active features;  eps ~ N(0, 1)

Some pairs of features are held out. Allowed supports (sets of k features) have no such pair, held-out ones have at
least one: training draws from the first, uniformly, and never sees the members of a held-out pair together. As each
support has k (k - 1) / 2 pairs, a share 1 - (1 - s)^(2 / (k (k - 1))) of pairs makes about a share s of supports held
out. Features are dealt into groups of k whose pairs are never held out, so that each has an allowed support.

Compressed sensing tells that about 2 k ln(n / k) numbers tell k active features of n (Donoho & Tanner 2009); `width`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul, unit_rows

# Uniform in [0.5, 1.5], or the size of a normal number.
Values = Literal["uniform", "half-normal"]
# Rows of dense latents at a time, where only x is wanted.
_ROWS_TOGETHER = 4096


@partial(jax.tree_util.register_dataclass, data_fields=["W", "held_out"], meta_fields=["k", "values", "noise"])
@dataclass(frozen=True)
class Composition:
    """What rows are drawn from.

    Attributes:
        W: `[n, d]`, rows of norm 1.
        held_out: `[n, n]` bool, symmetric: pairs that training never sees together.
        k: active features of a row.
        values: their distribution.
        noise: standard deviation in each number of x.
    """

    W: jax.Array
    held_out: jax.Array
    k: int
    values: Values
    noise: float


def width(n: int, k: int, factor: float = 2.0) -> int:
    """`factor` k ln(n / k), rounded up: enough numbers to tell k active features of n; at least k + 1, at most n."""
    return min(max(math.ceil(factor * k * math.log(n / k)), k + 1), n)


def compose(
    key: jax.Array,
    n: int,
    d: int,
    k: int,
    *,
    held_out: float = 0.5,
    values: Values = "uniform",
    noise: float = 0.01,
) -> Composition:
    """A random dictionary and random held-out pairs.

    Args:
        key: decides both.
        n: features. d: numbers in a row of x. k: active features of a row.
        held_out: about which share of all supports is held out, more than 0 and less than 1.
        values: of active features.
        noise: standard deviation in each number of x.

    Raises:
        InputError: numbers that do not belong together.
    """
    if not 2 <= k <= n // 2:
        raise InputError(f"{k} active features of {n}: give at least 2, and at most half of the features")
    if d < 1:
        raise InputError(f"rows of {d} numbers: give 1 or more")
    if not 0 < held_out < 1:
        raise InputError(f"held-out share {held_out}: give more than 0 and less than 1")
    if values not in ("uniform", "half-normal"):
        raise InputError(f"values {values!r}: give uniform or half-normal")
    if not noise >= 0:
        raise InputError(f"noise {noise}: give 0 or more")
    for_W, for_pairs = jax.random.split(key)
    W = unit_rows(jax.random.normal(for_W, (n, d), jnp.float32))
    return Composition(W, jnp.array(held_out_pairs(for_pairs, n, k, held_out)), k, values, noise)


def held_out_pairs(key: jax.Array, n: int, k: int, share: float) -> np.ndarray:
    """`[n, n]` bool, symmetric: random pairs, so many that about a `share` of all supports of k has one; at least one.

    Raises:
        InputError: more pairs than can be held out with every feature left an allowed support.
    """
    for_groups, for_pairs = jax.random.split(key)
    group = np.empty(n, np.int64)
    order = np.asarray(jax.random.permutation(for_groups, n))
    group[order] = np.minimum(np.arange(n) // k, n // k - 1)  # the last one takes what is left over
    rows, columns = np.triu_indices(n, 1)
    count = max(round((1 - (1 - share) ** (2 / (k * (k - 1)))) * len(rows)), 1)
    eligible = np.flatnonzero(group[rows] != group[columns])
    if count > len(eligible):
        raise InputError(
            f"held-out share {share} with {k} active features of {n} holds out {count} pairs, of {len(eligible)} that "
            "may be: give a smaller share, fewer active features or more features"
        )
    # Uniform numbers are drawn for all pairs, and the smallest taken.
    rank = np.asarray(jax.random.uniform(for_pairs, (len(eligible),)))
    chosen = eligible[np.argpartition(rank, count - 1)[:count]]
    made = np.zeros((n, n), bool)
    made[rows[chosen], columns[chosen]] = made[columns[chosen], rows[chosen]] = True
    return made


@partial(jax.jit, static_argnames=("rows", "held_out"))
def draw(key: jax.Array, composition: Composition, rows: int, held_out: bool = False) -> tuple[jax.Array, jax.Array]:
    """(x `[rows, d]`, z `[rows, n]`), supports uniform among the allowed ones, or among the held-out ones."""
    n, k = composition.W.shape[0], composition.k
    for_support, for_values, for_noise = jax.random.split(key, 3)
    support = _supports(for_support, composition, rows, held_out)
    if composition.values == "uniform":
        active = jax.random.uniform(for_values, (rows, k), jnp.float32, 0.5, 1.5)
    else:
        active = jnp.abs(jax.random.normal(for_values, (rows, k), jnp.float32))
    z = jnp.zeros((rows, n), jnp.float32).at[jnp.arange(rows)[:, None], support].set(active)
    eps = jax.random.normal(for_noise, (rows, composition.W.shape[1]), jnp.float32)
    return matmul(z, composition.W) + composition.noise * eps, z


def draw_x(key: jax.Array, composition: Composition, rows: int) -> jax.Array:
    """`[rows, d]`: rows of allowed supports without their latents, which need not fit in memory."""
    parts = [
        draw(jax.random.fold_in(key, start), composition, min(_ROWS_TOGETHER, rows - start))[0]
        for start in range(0, rows, _ROWS_TOGETHER)
    ]
    return jnp.concatenate(parts)


def has_held_out_pair(support: jax.Array, held_out: jax.Array) -> jax.Array:
    """`[rows]` bool, for supports `[rows, k]` and pairs `[n, n]`."""
    return jnp.any(held_out[support[:, :, None], support[:, None, :]], axis=(1, 2))


def _supports(key: jax.Array, composition: Composition, rows: int, held_out: bool) -> jax.Array:
    """`[rows, k]` int32 by rejection: whatever is of the wrong kind is drawn again."""
    n, k = composition.W.shape[0], composition.k

    def wrong(support):
        return has_held_out_pair(support, composition.held_out) != held_out

    def again(state):
        i, support, bad = state
        support = jnp.where(bad[:, None], _subsets(jax.random.fold_in(key, i), n, k, rows), support)
        return i + 1, support, wrong(support)

    first = _subsets(key, n, k, rows)
    return lax.while_loop(lambda state: jnp.any(state[2]), again, (jnp.int32(1), first, wrong(first)))[1]


def _subsets(key: jax.Array, n: int, k: int, rows: int) -> jax.Array:
    """`[rows, k]` int32 uniform subsets of n. Source: Bentley & Floyd 1987 ("A sample of brilliance"), algorithm F2."""
    highest = jnp.arange(n - k, n, dtype=jnp.int32)
    drawn = jax.random.randint(key, (rows, k), 0, highest + 1)
    subset = jnp.full((rows, k), -1, jnp.int32)
    for i in range(k):
        # A number that is there already gives way to the largest so far, which cannot be.
        seen = jnp.any(subset == drawn[:, i : i + 1], axis=1)
        subset = subset.at[:, i].set(jnp.where(seen, highest[i], drawn[:, i]))
    return subset
