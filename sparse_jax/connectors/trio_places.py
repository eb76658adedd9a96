"""Where trios of an attention head act on a text: every (token, source) at which all three features are active."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from sparse_jax.connectors.attention_codes import AttentionCodes
from sparse_jax.connectors.attention_heads import Heads, turned
from sparse_jax.connectors.attention_trios import HeadVectors, Trios
from sparse_jax.connectors.paired_codes import SiteCodes


@dataclass(frozen=True, eq=False)
class Places:
    """Tokens and sources with a trio on them, `[places]` each. Numpy.

    Attributes:
        head, query, key, output: int32, the trio.
        i, j: int32 numbers of tokens in `AttentionCodes`: query place and key place.
        attention: float32, A_ij of the head.
        logit: float32, l_ij of query and key feature.
        written: float32, o_j of key and output feature.
    """

    head: np.ndarray
    query: np.ndarray
    key: np.ndarray
    output: np.ndarray
    i: np.ndarray
    j: np.ndarray
    attention: np.ndarray
    logit: np.ndarray
    written: np.ndarray

    def __len__(self) -> int:
        return len(self.i)

    def at(self, chosen: np.ndarray) -> "Places":
        """Some of them."""
        return Places(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class TrioFigures:
    """What a trio is like, means over its places.

    Attributes:
        places: how many.
        strength: sum of attention x logit x written over all tokens' number.
        attention, logit, written, distance: means over places.
        own_share: share of places at which a token attends to itself.
    """

    places: int
    strength: float
    attention: float
    logit: float
    written: float
    distance: float
    own_share: float


class Columns:
    """Codes by feature: `of(feature)` is `[tokens + 1]`, its code at each token, 0 at the last (no token)."""

    def __init__(self, codes: SiteCodes):
        token, slot = np.nonzero(codes.values > 0)
        features = codes.indices[token, slot]
        order = np.argsort(features, kind="stable")
        self._token, self._value = token[order], codes.values[token, slot][order]
        self._starts = np.searchsorted(features[order], np.arange(codes.n_features + 1))
        self._tokens = len(codes)

    def of(self, feature: int) -> np.ndarray:
        """A feature's codes."""
        part = slice(self._starts[feature], self._starts[feature + 1])
        made = np.zeros(self._tokens + 1, np.float32)
        made[self._token[part]] = self._value[part]
        return made


def places_of(
    heads: Heads,
    vectors: HeadVectors,
    found: AttentionCodes,
    trios: Trios,
    columns: tuple[Columns, Columns] | None = None,
) -> list[Places]:
    """All places of each of the trios.

    Args:
        heads: the layer's.
        vectors: those of the trios' head.
        found: codes and attention.
        trios: which.
        columns: of `found.before` and `found.after`, where they are made already.
    """
    before, after = columns or (Columns(found.before), Columns(found.after))
    sources, attention, position = found.sources[trios.head], found.attention[trios.head], found.tokens.position
    made = []
    for f, g, t in zip(trios.query, trios.key, trios.output):
        query, key = before.of(f), before.of(g)
        i, slot = np.nonzero(((query > 0) & (after.of(t) > 0))[:-1, None] & (key[sources] > 0))
        j = sources[i, slot]
        distance = position[i] - position[j]
        logit, written = pair_of(heads, vectors, int(f), int(g), int(t), distance)
        size = found.scale[j] * key[j]
        same = (np.full(len(i), each, np.int32) for each in (trios.head, f, g, t))
        made.append(
            Places(*same, i.astype(np.int32), j.astype(np.int32), attention[i, slot],
                   logit * found.scale[i] * query[i] * size, written * size)
        )  # fmt: skip
    return made


def pair_of(
    heads: Heads, vectors: HeadVectors, f: int, g: int, t: int, distance: np.ndarray
) -> tuple[np.ndarray, np.float32]:
    """(QK of the pair at each of the distances, OV of key and output feature), for codes and scales of 1."""
    reach = int(distance.max(initial=0)) + 1
    reach = 1 << (reach - 1).bit_length()  # few shapes
    query = jnp.broadcast_to(vectors.query[f], (reach, heads.head_dim))
    query = turned(heads, query, jnp.arange(reach, dtype=jnp.int32))
    table = np.asarray(query @ vectors.key[g])
    return table[distance], np.float32(np.dot(np.asarray(vectors.value[g]), np.asarray(vectors.output[t])))


def figures_of(found: AttentionCodes, places: Places) -> TrioFigures:
    """What a trio is like."""
    if not len(places):
        return TrioFigures(0, *[0.0] * 6)
    product = places.attention.astype(np.float64) * places.logit * places.written
    distance = found.tokens.position[places.i] - found.tokens.position[places.j]
    means = (float(each.mean(dtype=np.float64)) for each in (places.attention, places.logit, places.written, distance))
    return TrioFigures(len(places), float(product.sum() / len(found)), *means, float((distance == 0).mean()))
