"""Connections by the mean Jacobian of the MLP between two dictionaries: no learning, only the module's own derivative.

    J_ij = mean over tokens t of  d pre_j / d c_i  =  d_i . J_mlp(x_t) . e_j

with the decoder direction d_i (raw units), the target's encoder column e_j, x the stream that the MLP's layer norm
reads, pre_j the target's pre-activation. With h = n W_up + b, n = s z + bias, z = (x - mean x) / sigma, a' the slope of
the activation function, d_i' = d_i - mean d_i (of an RMS norm without the means) and D numbers in the stream:

    frozen norm     (s d_i' W_up)_m  mean_t(a'_tm / sigma_t)  (W_down e_j)_m
    live norm       less  mean_t[(z_t . d_i') / (D sigma_t)  (s z_t W_up)_m  a'_tm]  (W_down e_j)_m

summed over neurons m. So tokens enter by sums for each neuron alone, `[n_in, d_mlp]` where the mean is over the tokens
on which input i fires, and nothing of `[tokens, n_in, n_out]` is ever made: exact, not an approximation. A gated MLP
(Llama), hidden = a(g) u, has two such terms, by W_gate with the slope a'(g) u and by W_up with a(g).

Source: Farnik et al. 2025 (the Jacobian of an MLP between dictionaries in closed form).
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.connectors.between import Between, between, centred, reciprocal_denominator
from sparse_jax.connectors.causal import checked_columns, checked_directions
from sparse_jax.connectors.paired_codes import SiteCodes, Tokens
from sparse_jax.errors import InputError
from sparse_jax.features.causes import Located
from sparse_jax.lm.layers import accurate_dtype, activation
from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site
from sparse_jax.numerics.sparse_codes import SparseCodes, row_gradient, value_gradient


@dataclass(frozen=True, eq=False)
class MeanJacobians:
    """Mean derivatives of pre-activations in codes, `[n_in, n_out]` float32, target units per unit of input.

    Attributes:
        firing: over the tokens on which the input is above 0, layer norm live; 0 for inputs that never are.
        firing_frozen: the same, the norm's denominator held.
        everywhere, everywhere_frozen: over all tokens.
        firings: `[n_in]` int64 tokens on which each input is above 0.
        tokens: how many there are.
    """

    firing: np.ndarray
    firing_frozen: np.ndarray
    everywhere: np.ndarray
    everywhere_frozen: np.ndarray
    firings: np.ndarray
    tokens: int


class Branch(NamedTuple):
    """One way from the MLP's input to its neurons: hidden moves by (change of the input) kernel x slope.

    Attributes:
        kernel: `[d_model, d_mlp]`.
        slope: `[tokens, d_mlp]`.
    """

    kernel: jax.Array
    slope: jax.Array


class _Sums(NamedTuple):
    """Of one batch and one branch; those of inputs over the tokens on which they fire.

    Attributes:
        frozen: `[n_in, d_mlp]` sum of slope / sigma.
        live: `[n_in, d_mlp]` sum of (z . d') / (D sigma) x (s z kernel) x slope, what a live norm takes away.
        all_frozen: `[d_mlp]` as `frozen`, over all tokens.
        all_live: `[d_model, d_mlp]` as `live` over all tokens, before the product with d'.
    """

    frozen: jax.Array
    live: jax.Array
    all_frozen: jax.Array
    all_live: jax.Array


def mean_jacobians(
    lm: LanguageModel,
    rows: Rows,
    inputs: Located,
    target: Located,
    tokens: Tokens,
    codes: SiteCodes,
    *,
    block_rows: int = 8,
) -> MeanJacobians:
    """Mean Jacobians of the MLP over some tokens.

    Memory: four arrays `[n_in, d_mlp]` (of a gated MLP eight) on the device and in float64 on the host, beside what
    `block_rows` rows of the model take up to the layer.

    Args:
        lm: the model.
        rows: the text that the tokens stand in.
        inputs: site and dictionary before the MLP (resid_pre, resid_mid or mlp_in); `coder` None is the raw site.
        target: those behind it (mlp_in, mlp_hidden or mlp_out).
        tokens: where the tokens stand.
        codes: of the inputs on them, which say where each fires.
        block_rows: rows of text that are run at once.

    Raises:
        InputError: other sites than these, dictionaries that do not fit, no token.
    """
    part = between(lm.config, [inputs.site], target.site)
    if part.part != "mlp" or part.source.name == "mlp_hidden" or part.target.name == "mlp_in":
        raise InputError(
            f"from {inputs.site} to {target.site}: mean Jacobians in closed form are those of an MLP; go from "
            "resid_pre, resid_mid or mlp_in to mlp_hidden or mlp_out"
        )
    directions, columns = checked_directions(lm, inputs), checked_columns(lm, target)
    if not len(tokens) or len(codes) != len(tokens) or codes.n_features != len(directions):
        raise InputError(
            f"{len(tokens)} tokens, codes of {len(codes)} tokens and {codes.n_features} features for a dictionary of "
            f"{len(directions)}: give as many of each, at least one token"
        )
    numbers, inverse = np.unique(tokens.row, return_inverse=True)
    totals, firings = None, np.zeros(len(directions), np.int64)
    for begin in range(0, len(numbers), block_rows):
        inside = np.flatnonzero((inverse >= begin) & (inverse < begin + block_rows))
        block = np.pad(numbers[begin : begin + block_rows], (0, max(0, begin + block_rows - len(numbers))), mode="edge")
        text = rows[block].tokens
        # One shape: a row holds each of its places once at most.
        fill = (0, text.size - len(inside))
        here = codes.at(inside)
        places = (np.pad(a, fill).astype(np.int32) for a in (inverse[inside] - begin, tokens.position[inside]))
        fires = SparseCodes(*(np.pad(a, (fill, (0, 0))) for a in (here.values > 0, here.indices)))
        np.add.at(firings, here.indices[here.values > 0], 1)
        weight = np.arange(text.size) < len(inside)
        given = (jnp.array(text), *map(jnp.array, (*places, weight)), jax.tree.map(jnp.array, fires))
        sums = _sums(lm, part, directions, *given)
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return _means(lm, part, directions, columns, totals, firings, len(tokens))


def _into(lm, part: Between, directions) -> jax.Array:
    """`[n_in, d_model]`: s d', what the directions are behind the norm but for its denominator."""
    if not part.has_norm:
        return directions
    scale = lm.params["blocks"]["ln_mlp"]["scale"][part.source.layer]
    return centred(lm, directions) * scale.astype(directions.dtype)


def kernels(lm: LanguageModel, layer: int) -> tuple[jax.Array, ...]:
    """The MLP's kernels `[d_model, d_mlp]` in the order of `branches`."""
    mlp = lm.params["blocks"]["mlp"]
    names = ("gate", "up") if "gate" in mlp else ("up",)
    return tuple(mlp[name]["kernel"][layer].astype(accurate_dtype(lm.dtype)) for name in names)


def branches(lm: LanguageModel, layer: int, normed: jax.Array) -> tuple[Branch, ...]:
    """How the neurons of a layer move with the MLP's input, at `normed [tokens, d_model]`."""
    mlp, fn = lm.params["blocks"]["mlp"], activation(lm.config.activation)

    def before(name, kernel):
        bias = mlp[name].get("bias")
        made = normed @ kernel
        return made if bias is None else made + bias[layer].astype(made.dtype)

    if "gate" not in mlp:
        (up,) = kernels(lm, layer)
        h = before("up", up)
        return (Branch(up, jax.jvp(fn, (h,), (jnp.ones_like(h),))[1]),)
    gate, up = kernels(lm, layer)
    g, u = before("gate", gate), before("up", up)
    value, slope = jax.jvp(fn, (g,), (jnp.ones_like(g),))
    return Branch(gate, slope * u), Branch(up, value)


@partial(jax.jit, static_argnames=("part",))
def _sums(lm, part, directions, text, rows, positions, weight, fires) -> tuple[_Sums, ...]:
    """Sums of each branch over the places of one block of rows that count."""
    layer, accurate = part.source.layer, accurate_dtype(lm.dtype)
    behind = Site("mlp_in", layer)
    captured = forward(lm, text, capture={part.source, behind}, stop=layer + 1).captured
    x, normed = (captured[str(site)][rows, positions].astype(accurate) for site in (part.source, behind))
    weight = weight.astype(accurate)
    inverse = reciprocal_denominator(lm, x) if part.has_norm else jnp.ones(len(x), accurate)
    z = centred(lm, x) * inverse[:, None]
    scaled = z * lm.params["blocks"]["ln_mlp"]["scale"][layer].astype(accurate)
    once = SparseCodes(fires.values.astype(accurate) * weight[:, None], fires.indices)
    # z . d' = z . d: z has no mean where d' has none.
    along = SparseCodes(once.values * value_gradient(once, directions, z), once.indices)
    found = []
    for kernel, slope in branches(lm, layer, normed):
        frozen = slope * inverse[:, None]
        live = (scaled @ kernel) * frozen / x.shape[1] if part.has_norm else jnp.zeros_like(frozen)
        by_input = (row_gradient(codes, g, len(directions)) for codes, g in ((once, frozen), (along, live)))
        found.append(_Sums(*by_input, weight @ frozen, (z * weight[:, None]).T @ live))
    return tuple(found)


def _means(lm, part, directions, columns, totals, firings, n_tokens) -> MeanJacobians:
    """The sums between the dictionaries."""
    layer = part.source.layer
    into, out = _into(lm, part, directions), columns
    if part.target.name == "mlp_out":
        out = lm.params["blocks"]["mlp"]["down"]["kernel"][layer].astype(columns.dtype) @ columns
    per_firing = 1 / np.maximum(firings, 1)[:, None]
    found = dict.fromkeys(("firing", "firing_frozen", "everywhere", "everywhere_frozen"), 0)
    for kernel, sums in zip(kernels(lm, layer), totals, strict=True):
        through, kind = into @ kernel.astype(into.dtype), into.dtype
        frozen = through * jnp.array(sums.frozen * per_firing, kind)
        live = jnp.array(sums.live * per_firing, kind)
        all_frozen = through * jnp.array(sums.all_frozen / n_tokens, kind)
        all_live = directions @ jnp.array(sums.all_live / n_tokens, kind)
        for name, hidden in (
            ("firing", frozen - live),
            ("firing_frozen", frozen),
            ("everywhere", all_frozen - all_live),
            ("everywhere_frozen", all_frozen),
        ):
            found[name] = found[name] + hidden @ out
    return MeanJacobians(**jax.tree.map(np.asarray, found), firings=firings, tokens=n_tokens)
