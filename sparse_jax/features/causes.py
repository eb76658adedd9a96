"""What causes a feature: the features of an earlier site whose ablation lowers its activation most.

In contexts where the later feature g fires at a place with an activation in [M / 2, M], M its maximum, each earlier
feature that is active in the row up to the place is ablated: x - c_f d_f in raw units, the error term kept, at every
masked-in place of the row from its start up to and with the place. Its drop is the activation of g at the place, as it
is minus as it then is. A feature that is not active there has a drop of exactly 0 and is not run.

Beside it stands the cosine between the earlier feature's decoder direction and g's encoder column, what the two would
share by the residual stream alone. Both are directions of raw activations: one scale per normaliser changes neither.
The encoder column of a tied dictionary, and of those that encode by their decoder (FISTA, matching pursuit, neurons,
PCA, random rows), is the decoder's row.

Source: Cunningham et al. 2023, section 5.3 (automatic discovery of what activates a feature).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.logit_effect import check_features
from sparse_jax.features.segments import Segments, entry_layer, lengths_for, position_wise, resume, save, segments
from sparse_jax.lm.layers import accurate_dtype
from sparse_jax.lm.model import LanguageModel, check_site, site_width
from sparse_jax.lm.sites import SITES, Site
from sparse_jax.numerics import safe_norm

# Codes that are a function of one linear map of the input, through `encoder_columns`: pre-activations exist.
_LINEAR_ENCODERS = (
    "l1", "lp", "gated", "jump-relu", "topk", "batch-topk", "matryoshka", "multi-topk", "pca", "neurons", "random",
)  # fmt: skip


class Located(NamedTuple):
    """A dictionary and where it stands."""

    site: Site | str
    coder: Normalised


@dataclass(frozen=True)
class Causes:
    """Causes of one feature, the largest mean drop first. Numpy, host.

    Attributes:
        features: `[n]` int32, numbers of the earlier features that are active in at least one context.
        drop: `[n]` float64, mean drop over all contexts (0 in those where the feature is not active).
        drops: `[contexts, n]` float32 drop in each.
        active: `[n]` int64, in how many contexts the feature is active.
        cosine: `[n]` float32 of decoder direction and encoder column; None where the two sites differ in width.
        activations: `[contexts]` float32 the later feature's activation as it is.
    """

    features: np.ndarray
    drop: np.ndarray
    drops: np.ndarray
    active: np.ndarray
    cosine: np.ndarray | None
    activations: np.ndarray


def contexts_of(
    values: np.ndarray, count: int = 20, seed: int = 0, *, maximum: float | None = None, at_least: float = 0.5
) -> np.ndarray:
    """`[<= count]` which of a feature's places to look at: drawn uniformly from those with at_least M <= value <= M.

    Args:
        values: `[places]` its activations there.
        count: places to draw; fewer where there are not as many.
        seed: decides the draw.
        maximum: M; None: the largest of `values`.
        at_least: share of M.

    Raises:
        InputError: no place is strong enough.
    """
    limit = (values.max(initial=0) if maximum is None else maximum) * at_least
    strong = np.flatnonzero((values >= limit) & (values > 0))
    if not len(strong):
        raise InputError(f"no place has an activation of {limit:.4g} or more: the feature does not fire so strongly")
    return np.sort(np.random.default_rng(seed).permutation(strong)[:count])


def causes(
    lm: LanguageModel,
    earlier: Located,
    later: Located,
    feature: int,
    tokens: np.ndarray,
    mask: np.ndarray,
    positions: np.ndarray,
    *,
    activation: Literal["post", "pre"] = "post",
    max_norm: float = float("inf"),
    block_rows: int = 4,
    batch_tokens: int = 2048,
) -> Causes:
    """Ablate each earlier feature in each context.

    Args:
        lm: the model.
        earlier, later: dictionaries; the earlier one's decoder is linear.
        feature: number of the later feature.
        tokens, mask: `[contexts, position]` the row of each context.
        positions: `[contexts]` the place in it.
        activation: "post": the code, where it is positive; "pre": the encoder's linear map of the activation, whose
            drops are there even where the threshold hides them, in the code's units before the activation function
            (of a gated dictionary: the gate's). Not with encoders that iterate.
        max_norm: places whose earlier activation has a larger norm are not ablated.
        block_rows: contexts whose clean pass is kept at once: codes of `context x features` float32 each.
        batch_tokens: positions that are run again at once.

    Raises:
        InputError: sites in the wrong order, numbers or shapes that do not fit, no pre-activation.
    """
    earlier, later = _checked(lm, earlier, later, feature, tokens, mask, positions)
    if activation not in ("post", "pre"):
        raise InputError(f"activation {activation!r}: choose post or pre")
    if activation == "pre" and later.coder.dictionary.kind not in _LINEAR_ENCODERS:
        raise InputError(f"a {later.coder.dictionary.kind} dictionary has no pre-activations; choose post")
    pre, n = activation == "pre", earlier.coder.dictionary.n_features
    drops, active = np.zeros((len(tokens), n), np.float32), np.zeros((len(tokens), n), bool)
    activations = np.zeros(len(tokens), np.float32)
    for begin in range(0, len(tokens), block_rows):
        rows = slice(begin, min(begin + block_rows, len(tokens)))
        fill = ((0, block_rows - (rows.stop - begin)), (0, 0))
        inputs = [np.pad(part, fill) for part in (tokens[rows], mask[rows], positions[rows, None])]
        inputs[2] = inputs[2][:, 0].astype(np.int32)
        clean = _clean(
            lm,
            earlier,
            later,
            jnp.int32(feature),
            *map(jnp.array, inputs),
            jnp.array(max_norm, earlier.coder.normaliser.scale.dtype),
            pre,
        )
        found, fires = _block_drops(lm, earlier, later, feature, clean, inputs[2], pre, batch_tokens)
        drops[rows], active[rows] = found[: rows.stop - begin], fires[: rows.stop - begin]
        activations[rows] = np.asarray(clean.activation)[: rows.stop - begin]
    present = np.flatnonzero(active.any(axis=0))
    mean = drops[:, present].mean(axis=0, dtype=np.float64)
    order = np.argsort(-mean, kind="stable")
    chosen = present[order].astype(np.int32)
    cosine = decoder_encoder_cosine(earlier.coder, later.coder, feature)
    return Causes(
        features=chosen,
        drop=mean[order],
        drops=drops[:, chosen],
        active=active[:, chosen].sum(axis=0),
        cosine=None if cosine is None else np.asarray(cosine)[chosen],
        activations=activations,
    )


def encoder_columns(coder: Normalised) -> jax.Array:
    """`[d_in, n_features]`: the encoder's linear map of raw activations, up to its biases.

    Of a dictionary without an encoder of its own: its decoder's rows, of LinearTopK ones times their gain.
    """
    params = coder.params
    tied = getattr(coder.dictionary, "tied", False) or "W_enc" not in params
    columns = params["W_dec"].T * params.get("gain", 1) if tied else params["W_enc"]
    return columns / coder.normaliser.scale


def decoder_encoder_cosine(earlier: Normalised, later: Normalised, feature: int) -> jax.Array | None:
    """`[n_features of earlier]`: cosines of its decoder directions with the later feature's encoder column.

    None where the dictionaries stand at sites of different widths.
    """
    directions, column = earlier.directions(), encoder_columns(later)[:, feature]
    if directions.shape[1] != len(column):
        return None
    norms = safe_norm(directions) * safe_norm(column)
    return directions @ column / jnp.where(norms > 0, norms, 1)


def check_order(earlier: Site, later: Site) -> None:
    """Raises InputError unless what stands at the one site can change what stands at the other."""
    places = list(SITES)
    first, second = ((site.layer, places.index(site.name)) for site in (earlier, later))
    if first >= second or later.layer < entry_layer(earlier):
        raise InputError(f"site {earlier} does not come before {later}")


def _checked(lm, earlier, later, feature, tokens, mask, positions) -> tuple[Located, Located]:
    earlier, later = (Located(check_site(lm.config, site), coder) for site, coder in (earlier, later))
    check_order(earlier.site, later.site)
    for site, coder in (earlier, later):
        if coder.dictionary.d_in != site_width(lm.config, site):
            raise InputError(
                f"the dictionary takes {coder.dictionary.d_in} numbers; site {site} has {site_width(lm.config, site)}"
            )
    check_features(later.coder, [feature])
    contexts = len(positions)
    if tokens.ndim != 2 or not contexts or tokens.shape != mask.shape or positions.shape != (len(tokens),):
        raise InputError(
            f"tokens {tokens.shape}, mask {mask.shape}, positions {positions.shape}: give [contexts, position] twice "
            "and [contexts], at least one context"
        )
    if positions.min() < 0 or positions.max() >= tokens.shape[1]:
        raise InputError(f"positions {positions.min()} to {positions.max()}: rows have 0 to {tokens.shape[1] - 1}")
    return earlier, later


class _Clean(NamedTuple):
    """Rows as they are: what to go on from, earlier codes `[rows, position, n]` up to the place, g's activation."""

    saved: NamedTuple
    codes: jax.Array
    activation: jax.Array


def _activation(coder, feature, x, pre):
    """`[rows]`: of raw activations `[rows, width]`; a pre-activation without its bias, which no drop contains."""
    if pre:
        return x @ jnp.take(encoder_columns(coder), feature, axis=1)
    return jnp.maximum(jnp.take(coder.encode(x), feature, axis=1), 0)


def _at_place(captured, site, rows, places):
    x = captured[str(site)][rows, places]
    return x.reshape(len(places), -1).astype(accurate_dtype(x.dtype))


# Located is a pytree whose sites are static: as arguments of jit they are taken apart.
def _clean(lm, earlier, later, feature, tokens, mask, places, max_norm, pre) -> _Clean:
    return _clean_pass(
        lm, earlier.site, earlier.coder, later.site, later.coder, feature, tokens, mask, places, max_norm, pre
    )


@partial(jax.jit, static_argnames=("site", "later_site", "pre"))
def _clean_pass(lm, site, coder, later_site, later_coder, feature, tokens, mask, places, max_norm, pre):
    saved = save(lm, site, tokens, later_site.layer + 1, (later_site,))
    x = saved.x
    codes = jnp.maximum(coder.encode(x.reshape(-1, x.shape[-1])), 0).reshape(*tokens.shape, -1)
    before = jnp.arange(tokens.shape[1], dtype=jnp.int32) <= places[:, None]
    counts = mask & before & (safe_norm(x) <= max_norm)
    found = _at_place(saved.captured, later_site, jnp.arange(len(tokens), dtype=jnp.int32), places)
    codes = jnp.where(counts[..., None], codes, 0)
    return _Clean(saved._replace(captured={}), codes, _activation(later_coder, feature, found, pre))


@partial(jax.jit, static_argnames=("site", "later_site", "pre", "length"))
def _dropped(
    lm, site, later_site, later_coder, feature, length, clean, directions, ablated, places, part: Segments, pre
):
    """`[batch]`: the drop of the later feature's activation at the place of each segment's row."""
    positions = part.starts[:, None] + jnp.arange(length, dtype=jnp.int32)
    at = part.rows[:, None], positions
    value = clean.saved.x[at] - clean.codes[(*at, ablated[:, None])][..., None] * directions[ablated][:, None]
    _, captured = resume(
        lm, site, clean.saved, part.rows, positions, value, later_site.layer + 1, capture=(later_site,)
    )
    batch = jnp.arange(len(part.rows), dtype=jnp.int32)
    x = _at_place(captured, later_site, batch, places[part.rows] - part.starts)
    return clean.activation[part.rows] - _activation(later_coder, feature, x, pre)


def _block_drops(lm, earlier, later, feature, clean, places, pre, batch_tokens):
    """Drops and where features are active, `[rows, n]` both, of one block of contexts."""
    fires = np.asarray(clean.codes) > 0
    context = fires.shape[1]
    alone = position_wise(earlier.site, later.site.layer)
    active = fires.any(axis=1)
    # Where positions are not mixed, only what fires at the place itself has an effect.
    run = fires[np.arange(len(fires)), places] if alone else active
    rows, index = (found.astype(np.int32) for found in np.nonzero(run))
    last = places[rows].astype(np.int64)
    first = last if alone else fires[rows, :, index].argmax(axis=1)
    drops, waiting = np.zeros(active.shape, np.float32), []
    directions, place, number = earlier.coder.directions(), jnp.array(places), jnp.int32(feature)
    for length, part in segments(rows, first, last, lengths_for(context, alone), batch_tokens):
        found = _dropped(
            lm, earlier.site, later.site, later.coder, number, length, clean, directions,
            jnp.array(index[part.index]), place, part, pre,
        )  # fmt: skip
        waiting.append((part, found))
    for part, found in waiting:
        chosen = part.index[part.there]
        drops[rows[chosen], index[chosen]] = np.asarray(found)[part.there]
    return drops, active
