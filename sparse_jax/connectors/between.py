"""What stands between two sites of one layer, run alone at single places: the MLP, the attention, the whole block.

    before  = part(x)                 x the activation at the source site at one place, all other places as they are
    after   = part(x + change)        only the target at the same place is looked at

Parts, by the target:

    mlp         mlp_in, mlp_hidden, mlp_out. Attention is held: in blocks where the MLP reads the stream behind it
                (GPT-2, Llama) a change of resid_pre enters that stream as it is; in parallel ones (GPT-NeoX) the MLP
                reads resid_pre. So a change of resid_pre is one of the MLP's own stream in every family.
    attention   attn_q, attn_k, attn_v, attn_z, attn_out: query, key and value of the place change; keys and values of
                earlier places stay.
    block       resid_mid, resid_post, from resid_pre: attention, MLP and the stream itself.
    stream      resid_mid, resid_post, from what is added up there (several inputs side by side, or attn_out, mlp_out):
                the change itself, all else held.

Frozen layer norm: its denominator is the clean one. With r = denominator(x + change) / denominator(x), every value v
that is an affine map of the norm's output becomes r v + (1 - r) v0, where v0 is its value for a stream of zeros: exact,
the same for layer norm and RMS norm, whatever the layout of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.features.segments import Earlier, Saved, save
from sparse_jax.lm.edits import Edit
from sparse_jax.lm.interventions import put
from sparse_jax.lm.layers import accurate_dtype
from sparse_jax.lm.model import LanguageModel, check_site, forward, run_blocks, site_shape
from sparse_jax.lm.sites import Site

_MLP, _ATTENTION = ("mlp_in", "mlp_hidden", "mlp_out"), ("attn_q", "attn_k", "attn_v", "attn_z", "attn_out")
_STREAM = ("resid_mid", "resid_post")
_NORMED = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Between:
    """A part of one layer; static.

    Attributes:
        part: which, see above.
        source: where the change enters. Of "mlp" the stream that the MLP reads, or what stands behind its layer norm.
        target: where it is read.
    """

    part: Literal["mlp", "attention", "block", "stream"]
    source: Site
    target: Site

    @property
    def has_norm(self) -> bool:
        """Whether a layer norm stands between."""
        return self.part in ("attention", "block", "mlp") and self.source.name in ("resid_pre", "resid_mid")


class Clean(NamedTuple):
    """A pass over some rows as they are.

    Attributes:
        x: `[rows, position, width]` what stands at the source, heads flattened.
        saved: keys and values; None where the part mixes no positions.
    """

    x: jax.Array
    saved: Saved | None


def mlp_stream(config, layer: int) -> Site:
    """The site of the stream that the MLP's layer norm reads."""
    try:
        return check_site(config, Site("resid_mid", layer))
    except InputError:
        return Site("resid_pre", layer)


def between(config, inputs: Sequence[Site | str], target: Site | str) -> Between:
    """The part of a layer from the inputs to the target.

    Raises:
        InputError: a site that is not there, sites that are not of one layer (`resid_post` of the layer below counts
            as `resid_pre`), or sites between which nothing of the layer stands.
    """
    target = check_site(config, target)
    sources = [_as_entry(config, check_site(config, site), target.layer) for site in inputs]
    names = [site.name for site in sources]
    if not sources or any(site.layer != target.layer for site in sources):
        raise InputError(f"from {', '.join(map(str, inputs)) or 'nothing'} to {target}: give sites of one layer")
    stream = mlp_stream(config, target.layer)
    parallel = stream.name == "resid_pre"
    addends = {"resid_mid": {"resid_pre", "attn_out"}, "resid_post": {"resid_pre", "attn_out", "mlp_out"}}
    if target.name == "resid_post" and "resid_mid" in names:
        addends["resid_post"] = {"resid_mid", "mlp_out"}
    if target.name in _STREAM:
        # One input of a sequential block that the MLP reads too goes through it; side by side, each has its own share.
        if names == ["resid_pre"]:
            return Between("block", sources[0], target)
        known = set(names) <= addends[target.name] and len(set(names)) == len(names)
        if known and (len(names) > 1 or names[0] in ("attn_out", "mlp_out")):
            return Between("stream", sources[0], target)
    if len(names) == 1 and target.name in _MLP:
        if names[0] == "resid_pre" or (names[0] == "resid_mid" and not parallel):
            return Between("mlp", stream, target)
        if names[0] in _MLP and _MLP.index(names[0]) < _MLP.index(target.name):
            return Between("mlp", sources[0], target)
    if len(names) == 1 and target.name in _ATTENTION and names[0] == "resid_pre":
        return Between("attention", sources[0], target)
    raise InputError(
        f"from {', '.join(map(str, inputs))} to {target}: no part of the layer alone stands between them; go from "
        "resid_pre to an attention or MLP site or to resid_post, or from what is added up in resid_post to resid_post"
    )


def _as_entry(config, site: Site, layer: int) -> Site:
    """The stream that leaves a layer is the one that enters the next."""
    return Site("resid_pre", layer) if site.name == "resid_post" and site.layer == layer - 1 else site


def clean_pass(lm: LanguageModel, part: Between, tokens: jax.Array) -> Clean:
    """Run rows `tokens [rows, position]` up to the part's layer."""
    stop = part.target.layer + 1
    if part.part in ("attention", "block"):
        saved = save(lm, part.source, tokens, stop)
        return Clean(saved.x, saved)
    if part.part == "stream":  # the change alone says all
        return Clean(jnp.zeros((*tokens.shape, 1), accurate_dtype(lm.dtype)), None)
    x = forward(lm, tokens, capture=[part.source], stop=stop).captured[str(part.source)]
    return Clean(x.reshape(*tokens.shape, -1).astype(accurate_dtype(x.dtype)), None)


def changes(
    lm: LanguageModel, part: Between, clean: Clean, rows: jax.Array, positions: jax.Array, change: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`[batch, width]` twice: the target's change with the layer norms live, and with them frozen.

    Args:
        lm, part: as in `clean_pass`.
        clean: the rows as they are.
        rows, positions: `[batch]` places, each changed by itself.
        change: `[batch, width of the source]` what is added there.
    """
    if part.part == "stream":
        return change, change
    x = clean.x[rows, positions]
    after = x + change.astype(x.dtype)
    before, mid = _run(lm, part, clean, rows, positions, x, {})
    live, _ = _run(lm, part, clean, rows, positions, after, {})
    if not part.has_norm:
        return live - before, live - before
    ratio = _denominator(lm, after) / _denominator(lm, x)
    norms = dict.fromkeys(_NORMED if part.part in ("attention", "block") else ("mlp_in",), ratio)
    if part.part == "block":
        norms["mlp_in"] = ratio
        if mlp_stream(lm.config, part.source.layer).name == "resid_mid":  # what enters its norm is known only now
            _, moved = _run(lm, part, clean, rows, positions, after, dict.fromkeys(_NORMED, ratio))
            norms["mlp_in"] = _denominator(lm, moved) / _denominator(lm, mid)
    frozen, _ = _run(lm, part, clean, rows, positions, after, norms)
    return live - before, frozen - before


def _run(lm, part, clean, rows, positions, value, ratios):
    """(the target, the stream between attention and MLP where there is one), `[batch, width]`."""
    layer, batch = part.target.layer, len(rows)
    memory, shape = None, (batch, 1, *site_shape(lm.config, part.source))
    if clean.saved is not None:
        memory = Earlier(clean.saved.keys, clean.saved.values, rows, jnp.int32(layer))
    at_zero = _at_zero(lm, layer, tuple(ratios))
    edits = [Edit(part.source, put, (value.reshape(shape),))]
    edits += [Edit(Site(name, layer), _freeze, (ratio, at_zero[name])) for name, ratio in ratios.items()]
    capture = {part.target}
    if part.part == "block":
        capture.add(mlp_stream(lm.config, layer))
    nothing = jnp.zeros((batch, 1, lm.config.d_model), lm.dtype)  # stands before the source, where nobody reads it
    _, captured, _ = run_blocks(lm, nothing, positions[:, None], edits, tuple(capture), layer, layer + 1, memory)
    flat = {name: v.reshape(batch, -1).astype(accurate_dtype(v.dtype)) for name, v in captured.items()}
    return flat[str(part.target)], flat.get(str(mlp_stream(lm.config, layer)))


def _freeze(value, ratio, at_zero):
    """An affine map of a norm's output, as it is with another denominator."""
    ratio = ratio.reshape(-1, *[1] * (value.ndim - 1)).astype(value.dtype)
    return ratio * value + (1 - ratio) * at_zero


def _at_zero(lm, layer, names):
    """Values at the sites for a stream of zeros, which the norms turn into their biases."""
    if not names:
        return {}
    zeros, stream = jnp.zeros((1, 1, lm.config.d_model), lm.dtype), mlp_stream(lm.config, layer)
    edits = [Edit(stream, put, (zeros,))]
    sites = [Site(name, layer) for name in names]
    found = forward(lm, zeros, capture=sites, edits=edits, start=layer, stop=layer + 1).captured
    return {site.name: found[str(site)] for site in sites}


def _denominator(lm, x):
    """`[batch]` of a layer norm (or RMS norm) of the blocks."""
    return 1 / reciprocal_denominator(lm, x)


def reciprocal_denominator(lm: LanguageModel, x: jax.Array) -> jax.Array:
    """`[...]`: what the blocks' norms multiply a stream `x [..., d_model]` with, after its centre has gone."""
    x = centred(lm, x)
    return lax.rsqrt(jnp.mean(x * x, axis=-1) + lm.config.norm_epsilon)


def centred(lm: LanguageModel, x: jax.Array) -> jax.Array:
    """`x [..., d_model]` less its mean where the blocks have layer norms; RMS norms have no centre (and no bias)."""
    return x - jnp.mean(x, axis=-1, keepdims=True) if "bias" in lm.params["blocks"]["ln_mlp"] else x
