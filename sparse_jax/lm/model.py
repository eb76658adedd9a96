"""A language model as data, and its forward pass from any layer to any layer, with captures and edits."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.lm import families  # noqa: F401  registers the families
from sparse_jax.lm.attention import causal_attention
from sparse_jax.lm.edits import Edit, check_edit
from sparse_jax.lm.family import Family, Pass, family_of
from sparse_jax.lm.memory import Memory
from sparse_jax.lm.sites import HEAD_SITES, Site
from sparse_jax.lm.tap import Tap


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "dtype", "name", "revision"])
@dataclass(frozen=True)
class LanguageModel:
    """A language model: arrays and static choices, no state.

    Attributes:
        params: {"embed", "blocks", "head"}; every array under "blocks" is stacked `[layer, ...]`.
        config: the family's frozen config.
        dtype: compute dtype, by name ("float32", "bfloat16", "float64"); parameters keep their own.
        name: what it was loaded as (embedded name, folder or hub id).
        revision: the hub revision, None elsewhere.
    """

    params: dict
    config: Any
    dtype: str = "float32"
    name: str = ""
    revision: str | None = None

    @property
    def family(self) -> Family:
        return family_of(self.config.model_type)


class Output(NamedTuple):
    """What `forward` returns.

    Attributes:
        logits: `[batch, position, vocab]` float32, or None if the pass stopped before the head.
        captured: site (as text, `resid_post.3`) -> value there, after edits.
        residual: `[batch, position, d_model]` the residual stream where the blocks ended.
    """

    logits: jax.Array | None
    captured: dict[str, jax.Array]
    residual: jax.Array


def check_site(config, site: str | Site) -> Site:
    """The parsed site, if this model has it.

    Raises:
        InputError: no such site, a layer out of range, or a site that the family lacks (and why).
    """
    site = Site.parse(site)
    if not 0 <= site.layer < config.n_layers:
        raise InputError(f"site {site}: the model has layers 0 to {config.n_layers - 1}")
    if reason := family_of(config.model_type).missing_site(config, site.name):
        raise InputError(f"site {site}: a {config.model_type} model of this config has none: {reason}")
    return site


def site_shape(config, site: str | Site) -> tuple[int, ...]:
    """Shape of one token's value at a site: `(d,)`, or `(heads, head_dim)`.

    Raises:
        InputError: the site does not exist, or is a pattern, whose width depends on the context.
    """
    site = check_site(config, site)
    if site.name == "attn_pattern":
        raise InputError(f"site {site}: an attention pattern has no fixed width; choose a site with a vector per token")
    if site.name in HEAD_SITES:
        return n_heads_at(config, site), config.head_dim
    return (config.d_mlp,) if site.name == "mlp_hidden" else (config.d_model,)


def n_heads_at(config, site: Site) -> int:
    """Heads at a site that has them: keys and values may have fewer than queries."""
    return config.n_kv_heads if site.name in ("attn_k", "attn_v") else config.n_heads


def site_width(config, site: str | Site) -> int:
    """Numbers per token at a site: heads and head_dim are flattened together.

    Raises:
        InputError: the site does not exist, or is a pattern, whose width depends on the context.
    """
    return math.prod(site_shape(config, site))


def forward(
    lm: LanguageModel,
    inputs: jax.Array | np.ndarray,
    *,
    capture: Iterable[str | Site] = (),
    edits: Sequence[Edit] = (),
    start: int | jax.Array = 0,
    stop: int | jax.Array | None = None,
) -> Output:
    """Run blocks `start` to `stop` (exclusive), and the head if `stop` is None.

    Args:
        lm: the model.
        inputs: token ids `[batch, position]`, or a residual stream `[batch, position, d_model]` that enters block
            `start` (this is how a pass is continued from a saved `resid_pre` of that layer).
        capture: sites to return; each must lie in the range that is run.
        edits: applied in order at their sites; captures see the edited value.
        start, stop: Python ints (one compilation per range; differentiable) or integer arrays (one compilation for
            every range; forward only; no captures; the head is run only for `stop=None`). Inside `jit` an array's
            value is not known: there an edit outside the range changes nothing instead of raising.

    Raises:
        InputError: a site the model lacks or that lies outside the range; inputs of another kind or width; a range
            outside the model; more positions than the model has.
    """
    capture = tuple(sorted({check_site(lm.config, site) for site in capture}))
    edits = tuple(edits)
    check_inputs(lm.config, inputs, start)
    end = lm.config.n_layers if stop is None else stop
    static = isinstance(start, int) and isinstance(end, int)
    if capture and not static:
        raise InputError("captures need a range given by Python ints; start or stop is an array")
    sites = (*capture, *check_edits(lm.config, edits, *inputs.shape[:2]))
    if not any(isinstance(bound, jax.core.Tracer) for bound in (start, end)):
        _check_range(lm.config, sites, int(start), int(end))
    if static:
        return _forward_static(lm, inputs, edits, capture, start, end, stop is None)
    return _forward_traced(lm, inputs, edits, jnp.int32(start), jnp.int32(end), with_head=stop is None)


def check_edits(config, edits: Iterable[Edit], rows: int, length: int | None) -> list[Site]:
    """The sites of the edits; raises InputError for one that the model lacks or that does not fit (`check_edit`)."""
    sites = []
    for edit in edits:
        sites.append(check_site(config, edit.site))
        check_edit(edit, n_heads_at(config, edit.site), rows, length)
    return sites


def _check_range(config, sites, start, end) -> None:
    if not 0 <= start <= end <= config.n_layers:
        raise InputError(f"start {start}, stop {end}: give 0 <= start <= stop <= {config.n_layers}, the model's layers")
    for site in sites:
        if not start <= site.layer < end:
            raise InputError(f"site {site} lies outside the layers that are run, {start} <= layer < {end}")


def check_inputs(config, inputs: jax.Array | np.ndarray, start: int | jax.Array) -> None:
    """Raises InputError for neither token ids nor a residual stream of this model, or what cannot enter at `start`."""
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        if inputs.ndim != 2:
            raise InputError(f"token ids have shape {list(inputs.shape)}; give [batch, position]")
        if not (isinstance(start, int) and start == 0):
            raise InputError(f"token ids enter at layer 0, not at start={start}; give the residual stream instead")
    elif inputs.ndim != 3 or inputs.shape[-1] != config.d_model:
        raise InputError(
            f"a residual stream has shape [batch, position, {config.d_model}]; got {list(inputs.shape)} "
            "(token ids must be integers)"
        )
    if not 0 < inputs.shape[1] <= config.max_positions:
        raise InputError(f"{inputs.shape[1]} positions: the model takes 1 to {config.max_positions}")
    # The ids of a device array are not looked at: that would wait for whatever makes them.
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "iu" and inputs.size:
        low, high = int(inputs.min()), int(inputs.max())
        if low < 0 or high >= config.vocab_size:
            raise InputError(f"token ids from {low} to {high}; the model's are 0 to {config.vocab_size - 1}")


def embedded(lm: LanguageModel, inputs: jax.Array, positions: jax.Array) -> jax.Array:
    """The residual stream that enters the first block: `inputs` itself unless it is token ids."""
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        return lm.family.embed(lm.config, lm.params, inputs, positions, jnp.dtype(lm.dtype))
    return inputs.astype(lm.dtype)


def unembedded(lm: LanguageModel, residual: jax.Array) -> jax.Array:
    """Logits of a residual stream that has left the last block."""
    return lm.family.unembed(lm.config, lm.params, residual, jnp.dtype(lm.dtype))


def _run_block(lm, layer, residual, positions, tap, memory: Memory | None):
    """Block `layer` (an int, traced or not) on the residual stream; and the memory with what it adds."""
    attend, remembered = causal_attention, {}
    if memory is not None:

        def attend(q, k, v, scale, tap, window=None):
            z, remembered["after"] = memory.attend(layer, positions, q, k, v, scale, tap, window)
            return z

    params = jax.tree.map(lambda stacked: stacked[layer], lm.params["blocks"])
    block = lm.family.block(lm.config, jnp.dtype(lm.dtype))
    residual = block.apply({"params": params}, residual, Pass(positions, layer, tap, attend))
    return residual, remembered.get("after")


def run_blocks(
    lm: LanguageModel,
    residual: jax.Array,
    positions: jax.Array,
    edits: Sequence[Edit] = (),
    capture: Sequence[Site] = (),
    start: int = 0,
    end: int | None = None,
    memory: Memory | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Memory | None]:
    """Blocks `start` to `end` (Python ints): the residual stream that leaves them, the captures, the memory."""
    end = lm.config.n_layers if end is None else end
    captured: dict[str, jax.Array] = {}

    def run_layer(layer, residual, memory, layer_edits, names):
        """One layer; and what stood at the sites called `names`."""
        found = {}

        def tap(name, value):
            for edit in layer_edits:
                if edit.site.name == name:
                    value = edit(value, positions)
            if name in names:
                found[name] = value
            return value

        watched = Tap(tap, names | {edit.site.name for edit in layer_edits})
        residual, memory = _run_block(lm, layer, residual, positions, watched, memory)
        return residual, memory, found

    names_at = {layer: frozenset(s.name for s in capture if s.layer == layer) for layer in range(start, end)}
    edited, layer = {edit.site.layer for edit in edits}, start
    while layer < end:
        names, last = names_at[layer], layer + 1
        # Layers in a row where the same sites are read are one loop in the compiled program: it compiles as one layer.
        while layer not in edited and last < end and names_at[last] == names and last not in edited:
            last += 1
        if last == layer + 1:
            at_layer = [edit for edit in edits if edit.site.layer == layer]
            residual, memory, found = run_layer(layer, residual, memory, at_layer, names)
            captured |= {f"{name}.{layer}": value for name, value in found.items()}
            layer = last
            continue

        def body(carry, index, names=names):
            residual, memory, found = run_layer(index, *carry, (), names)
            return (residual, memory), found

        (residual, memory), stacked = lax.scan(body, (residual, memory), jnp.arange(layer, last, dtype=jnp.int32))
        captured |= {f"{name}.{layer + i}": v[i] for name, v in stacked.items() for i in range(last - layer)}
        layer = last
    return residual, captured, memory


@partial(jax.jit, static_argnames=("capture", "start", "end", "with_head"))
def _forward_static(lm, inputs, edits, capture, start, end, with_head):
    positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)
    residual, captured, _ = run_blocks(lm, embedded(lm, inputs, positions), positions, edits, capture, start, end)
    return Output(unembedded(lm, residual) if with_head else None, captured, residual)


@partial(jax.jit, static_argnames=("with_head",))
def _forward_traced(lm, inputs, edits, start, end, with_head):
    positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)

    def body(layer, residual):
        def tap(name, value):
            for edit in edits:
                if edit.site.name == name:
                    value = jnp.where(layer == edit.site.layer, edit(value, positions), value)
            return value

        watched = Tap(tap, frozenset(edit.site.name for edit in edits))
        return _run_block(lm, layer, residual, positions, watched, None)[0]

    residual = lax.fori_loop(start, end, body, embedded(lm, inputs, positions))
    return Output(unembedded(lm, residual) if with_head else None, {}, residual)
