"""Are trios of an attention head causal? Features are removed before attention, and that layer's attention run again.

The key feature g at its place j, error kept (x_j - c_g d_g): the change of output feature t's pre-activation at i,

    predicted  - A_ij s_j c_g OV[g, t]       of this head alone, or summed over the layer's heads
    found      by the model's own layer, of this head's output alone or of attn_out; with the norm's scale live, and
               frozen (keys and values of place j changed as they would be at the old scale)

What the prediction leaves out is that the pattern changes too, and that the scale does. The query feature f at i: the
change of the attention logit between i and j, beside - l_ij(f, g), what the trio's own pair gives, and beside what f
gives with all of the key. Places at which a token attends to itself are left out: there one removal is both.

The control: trios drawn at random of the features that are active at random tokens and their sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.connectors.attention_codes import AttentionCodes
from sparse_jax.connectors.attention_heads import Heads, heads_of, norm_scale, read_by, turned, written_by
from sparse_jax.connectors.trio_places import Places
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm.edits import Edit
from sparse_jax.lm.interventions import put
from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site

# Rows of text that are run at once.
BATCH_ROWS = 8


@dataclass(frozen=True)
class Agreement:
    """A prediction beside what was found.

    Attributes:
        places: how many.
        correlation: Pearson's; nan where either does not vary.
        slope: of what was found on the prediction, least squares with an intercept.
        mean_predicted, mean_found: mean sizes.
    """

    places: int
    correlation: float
    slope: float
    mean_predicted: float
    mean_found: float


@dataclass(frozen=True, eq=False)
class TrioCheck:
    """Predicted and found changes at each place, `[places]` each; removed minus clean. Numpy.

    Attributes:
        places: which trios, where.
        predicted_head, predicted_layer: of t's pre-activation at i with g removed at j, attention and scale staying.
        head_live, head_frozen: the same as found, of the head's own output; norm's scale live or frozen.
        layer_live, layer_frozen: of the whole attention layer.
        predicted_pair: of the logit with f removed at i, by f and g alone.
        predicted_query: by f with all of the key.
        logit_live: the same as found.
    """

    places: Places
    predicted_head: np.ndarray
    predicted_layer: np.ndarray
    head_live: np.ndarray
    head_frozen: np.ndarray
    layer_live: np.ndarray
    layer_frozen: np.ndarray
    predicted_pair: np.ndarray
    predicted_query: np.ndarray
    logit_live: np.ndarray

    def agreements(self) -> dict[str, Agreement]:
        """Each prediction beside what it predicts."""
        both = {
            "output, head, scale live": (self.predicted_head, self.head_live),
            "output, head, scale frozen": (self.predicted_head, self.head_frozen),
            "output, layer, scale live": (self.predicted_layer, self.layer_live),
            "output, layer, scale frozen": (self.predicted_layer, self.layer_frozen),
            "logit, pair": (self.predicted_pair, self.logit_live),
            "logit, query feature": (self.predicted_query, self.logit_live),
        }
        return {name: agreement(*pair) for name, pair in both.items()}


def agreement(predicted: np.ndarray, found: np.ndarray) -> Agreement:
    """Correlation and slope."""
    p, f = (np.asarray(each, np.float64) for each in (predicted, found))
    sizes = [float(np.abs(each).mean()) if len(each) else 0.0 for each in (p, f)]
    if len(p) < 2 or p.std() == 0 or f.std() == 0:
        return Agreement(len(p), float("nan"), float("nan"), *sizes)
    covariance = ((p - p.mean()) * (f - f.mean())).mean()
    return Agreement(len(p), float(covariance / (p.std() * f.std())), float(covariance / p.var()), *sizes)


def sample_places(places: list[Places], number: int, seed: int = 0) -> Places:
    """Places of trios: a trio drawn uniformly, then one of its places, own positions left out; none twice.

    Args:
        places: of each trio.
        number: how many, at most.
        seed: decides which.

    Raises:
        InputError: no trio has a place where a token attends to another.
    """
    rng = np.random.default_rng(seed)
    there = [each.at(rng.permutation(np.flatnonzero(each.i != each.j))) for each in places]
    there = [each for each in there if len(each)]
    if not there:
        raise InputError("no trio acts between two places of the text: give more tokens or other heads")
    order = []
    while len(order) < number and any(len(each) > len(order) // len(there) for each in there):
        turn = len(order) // len(there)
        order += [each.at(slice(turn, turn + 1)) for each in (there[k] for k in rng.permutation(len(there)))]
    order = [each for each in order if len(each)][:number]
    return _joined(order)


def random_places(found: AttentionCodes, number: int, seed: int = 0, heads: Sequence[int] | None = None) -> Places:
    """Random heads, tokens, sources of theirs, and features active there: the control.

    Sizes of logits and of what is written are not filled in. Heads are drawn from `heads`; None: all.

    Raises:
        InputError: features are active at no token and its source.
    """
    rng = np.random.default_rng(seed)
    every = np.arange(found.sources.shape[0]) if heads is None else np.asarray(heads)
    chosen = []
    for _ in range(50 * number):
        head, i = int(rng.choice(every)), rng.integers(len(found))
        slot = rng.integers(found.sources.shape[2])
        j = found.sources[head, i, slot]
        if j < 0 or j == i:
            continue
        active = [codes.indices[at][codes.values[at] > 0] for codes, at in
                  ((found.before, i), (found.before, j), (found.after, i))]  # fmt: skip
        if all(len(each) for each in active):
            features = [int(rng.choice(each)) for each in active]
            chosen.append((head, *features, i, j, found.attention[head, i, slot]))
        if len(chosen) == number:
            break
    if not chosen:
        raise InputError("no token and source of it have active features on all sides")
    *whole, attention = zip(*chosen)
    nan = np.full(len(chosen), np.nan, np.float32)
    return Places(*(np.array(each, np.int32) for each in whole), np.array(attention, np.float32), nan, nan)


def _joined(places: list[Places]) -> Places:
    return Places(*(np.concatenate([getattr(each, name) for each in places]) for name in Places.__dataclass_fields__))


@partial(jax.jit, static_argnames=("layer",))
def _changes(lm, heads: Heads, layer, tokens, before, after, head, f, g, t, i, j):
    """Everything of `TrioCheck` for a batch of rows, one place of each."""
    x, b = forward(lm, tokens, stop=layer).residual, jnp.arange(len(tokens), dtype=jnp.int32)
    directions, _ = written_by(before)
    readers = read_by(after)[0][:, t].T  # [rows, d_model]
    scale = norm_scale(heads, x)
    query, key = (
        jnp.maximum(before.encode(x[b, at])[b, of], 0)[:, None] * directions[of] for at, of in ((i, f), (j, g))
    )

    def run(x, edits=(), names=("attn_q", "attn_k", "attn_z", "attn_out")):
        got = forward(lm, x, start=layer, stop=layer + 1, capture=[f"{name}.{layer}" for name in names], edits=edits)
        return {name: got.captured[f"{name}.{layer}"] for name in names}

    names = ("attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "attn_pattern")
    clean = run(x, names=names)
    live, no_query = run(x.at[b, j].add(-key)), run(x.at[b, i].add(-query))
    scaled = scale[b, j][:, None] * key
    W_k, W_v = heads.W_k, heads.W_v
    frozen = run(x, [
        Edit(Site(name, layer), put, (clean[name].at[b, j].add(-jnp.einsum("bd,hdk->bhk", scaled, W)),))
        for name, W in (("attn_k", W_k), ("attn_v", W_v))
    ])  # fmt: skip

    outputs = jnp.einsum("hkd,bd->bhk", heads.W_o, readers)  # [rows, head, head_dim]
    group = heads.n_heads // W_v.shape[0]
    values = jnp.repeat(jnp.einsum("bd,hdk->bhk", scaled, W_v), group, axis=1)
    written = clean["attn_pattern"][b, :, i, j] * jnp.sum(values * outputs, axis=-1)

    def of_head(run):
        return jnp.sum((run["attn_z"] - clean["attn_z"])[b, i, head] * outputs[b, head], axis=-1)

    def of_layer(run):
        return jnp.sum((run["attn_out"] - clean["attn_out"])[b, i] * readers, axis=-1)

    kv = heads.kv(head)

    def logit(q, k):
        return heads.score_scale * jnp.sum(turned(heads, q, i - j) * k, axis=-1)

    k = clean["attn_k"][b, j, kv]
    asked = jnp.einsum("bd,bdk->bk", scale[b, i][:, None] * query, heads.W_q[head])
    return (
        -written[b, head], -jnp.sum(written, axis=-1), of_head(live), of_head(frozen), of_layer(live), of_layer(frozen),
        -logit(asked, jnp.einsum("bd,bdk->bk", scaled, W_k[kv])), -logit(asked, k),
        logit(no_query["attn_q"][b, i, head], no_query["attn_k"][b, j, kv]) - logit(clean["attn_q"][b, i, head], k),
    )  # fmt: skip


def check_trios(
    lm: LanguageModel,
    text: Rows,
    found: AttentionCodes,
    before: Normalised,
    after: Normalised,
    places: Places,
    batch_rows: int = BATCH_ROWS,
) -> TrioCheck:
    """Remove key and query features at places of trios, and run the layer's attention again.

    Args:
        lm, text: those that `found` was collected from.
        found: says where tokens stand.
        before, after: its dictionaries.
        places: which; see `sample_places`, `random_places`.
        batch_rows: places at once.

    Raises:
        InputError: no places, or one at which a token attends to itself.
    """
    heads = heads_of(lm, found.layer)
    heads.check_logits()
    if not len(places) or (places.i == places.j).any():
        raise InputError("give places at which a token attends to another, at least one")
    parts, tokens = [], found.tokens
    for start in range(0, len(places), batch_rows):
        some = places.at(slice(start, start + batch_rows))
        filled = (0, batch_rows - len(some))
        rows = np.pad(tokens.row[some.i], filled, constant_values=-1)
        at = (some.head, some.query, some.key, some.output, tokens.position[some.i], tokens.position[some.j])
        at = [jnp.array(np.pad(each, filled), jnp.int32) for each in at]
        made = _changes(lm, heads, found.layer, jnp.array(text[rows].tokens), before, after, *at)
        parts.append([np.asarray(each)[: len(some)] for each in made])
    return TrioCheck(places, *(np.concatenate(each) for each in zip(*parts, strict=True)))
