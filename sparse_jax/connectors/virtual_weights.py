"""Virtual weights: decoder x W x encoder, what a connection would be if the module between were its linear part.

    stream      V = D1 E2                              both dictionaries at what is added up in one stream
    attention   V_h = D1' W_V^h W_O^h E2               head h at a place that looks at itself alone, norm folded
    MLP         V = D1' W_up diag(a'(h0)) W_down E2    the MLP linearised at one point

D1 `[n_in, d]` raw decoder directions, E2 `[d, n_out]` the encoder columns of raw activations; D1' are the directions
behind the layer norm (centred, times its gain) over one denominator for all tokens, which is 1 where none is known: V
is then known up to one positive factor, which neither the cosine nor the correlation with learned weights sees.

Points of the MLP: "zero", a stream of zeros, which the norm turns into its bias; or any stream `[d]`, the mean
activation say, whose denominator is used.

Source: Elhage et al. 2021 (virtual weights, OV circuits); Dunefsky et al. 2024 (between dictionaries).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from sparse_jax.connectors.attention_heads import heads_of
from sparse_jax.connectors.attention_maps import ov_map
from sparse_jax.connectors.between import between, centred, reciprocal_denominator
from sparse_jax.connectors.causal import checked_columns, checked_directions
from sparse_jax.connectors.mean_jacobian import branches
from sparse_jax.errors import InputError
from sparse_jax.features.causes import Located
from sparse_jax.lm.model import LanguageModel


class Likeness(NamedTuple):
    """Virtual (or mean-Jacobian) weights beside learned ones.

    Attributes:
        connections: learned weights that are not 0: the support.
        cosine, correlation: of the two on the support.
        same_sign: share of the support with one sign.
        auc: probability that |virtual| of a random connection is larger than that of a random pair without one; 0.5 is
            chance. NaN where every pair is a connection.
    """

    connections: int
    cosine: float
    correlation: float
    same_sign: float
    auc: float


def stream_weights(lm: LanguageModel, inputs: Located, target: Located) -> jax.Array:
    """`[n_in, n_out]`: the path through the residual stream itself.

    Args:
        lm: the model.
        inputs, target: sites of one width and dictionaries; `coder` None is the raw site.

    Raises:
        InputError: sites of another width than each other.
    """
    directions, columns = checked_directions(lm, inputs), checked_columns(lm, target)
    if directions.shape[1] != columns.shape[0]:
        raise InputError(f"{inputs.site} has {directions.shape[1]} numbers, {target.site} {columns.shape[0]}")
    return directions @ columns


def attention_weights(lm: LanguageModel, inputs: Located, target: Located, head: int) -> jax.Array:
    """`[n_in, n_out]`: the OV path of one head, for a pattern of 1 and a denominator of 1.

    Times what the head's pattern has on the place itself (or on an earlier one) and over the norm's denominator there,
    it is what the input adds to the target's pre-activation by that head, pattern and denominator held.

    Args:
        lm: the model.
        inputs: at resid_pre.
        target: at attn_out of the same layer, or at the stream behind it.
        head: which.

    Raises:
        InputError: other sites, no such head.
    """
    part = between(lm.config, [inputs.site], target.site)
    if part.part not in ("attention", "block") or part.target.name in ("attn_q", "attn_k", "attn_v", "attn_z"):
        raise InputError(f"from {inputs.site} to {target.site}: OV paths go from resid_pre to attn_out or the stream")
    heads = heads_of(lm, part.target.layer)
    return ov_map(heads, head, checked_directions(lm, inputs), checked_columns(lm, target))


def mlp_weights(
    lm: LanguageModel, inputs: Located, target: Located, point: Literal["zero"] | np.ndarray = "zero"
) -> jax.Array:
    """`[n_in, n_out]`: the MLP linearised at one point, the norm's denominator held.

    Args:
        lm: the model.
        inputs: at resid_pre, resid_mid or mlp_in.
        target: at mlp_hidden or mlp_out of the same layer.
        point: "zero", with a denominator of 1; or `[d_model]` what the norm reads (from mlp_in: what stands there).

    Raises:
        InputError: other sites, a point of another width.
    """
    part = between(lm.config, [inputs.site], target.site)
    if part.part != "mlp" or part.source.name == "mlp_hidden" or part.target.name == "mlp_in":
        raise InputError(f"from {inputs.site} to {target.site}: give sites before and behind an MLP's neurons")
    directions, columns = checked_directions(lm, inputs), checked_columns(lm, target)
    layer, norm = part.source.layer, lm.params["blocks"]["ln_mlp"]
    zero = isinstance(point, str)
    if (zero and point != "zero") or (not zero and np.shape(point) != (lm.config.d_model,)):
        raise InputError(f"point {point if zero else np.shape(point)}: give zero, or [{lm.config.d_model}] numbers")
    x = jnp.zeros(lm.config.d_model, directions.dtype) if zero else jnp.array(point, directions.dtype)
    inverse = jnp.ones((), directions.dtype)
    if part.has_norm:
        scale = norm["scale"][layer].astype(directions.dtype)
        inverse = inverse if zero else reciprocal_denominator(lm, x)
        x, directions = centred(lm, x) * inverse * scale, centred(lm, directions) * scale
        if "bias" in norm:
            x = x + norm["bias"][layer].astype(x.dtype)
    if part.target.name == "mlp_out":
        columns = lm.params["blocks"]["mlp"]["down"]["kernel"][layer].astype(columns.dtype) @ columns
    hidden = sum((directions @ kernel) * slope for kernel, slope in branches(lm, layer, x[None]))
    return inverse * hidden @ columns


def likeness(learned: np.ndarray, other: np.ndarray) -> Likeness:
    """How `other [n_in, n_out]` looks like learned weights of the same shape.

    Raises:
        InputError: other shapes, or no learned weight that is not 0.
    """
    learned, other = np.asarray(learned, np.float64), np.asarray(other, np.float64)
    support = learned != 0
    if learned.shape != other.shape or not support.any():
        raise InputError(
            f"weights {learned.shape} and {other.shape}, {support.sum()} connections: give two of one shape"
        )
    w, v = learned[support], other[support]
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = w @ v / np.sqrt(w @ w * (v @ v))
        a, b = w - w.mean(), v - v.mean()
        correlation = a @ b / np.sqrt(a @ a * (b @ b))
    n, total = len(w), learned.size
    auc = float("nan")
    if n < total:
        ranks = rankdata(np.abs(other), axis=None).reshape(other.shape)
        auc = (ranks[support].sum() - n * (n + 1) / 2) / (n * (total - n))
    return Likeness(n, float(cosine), float(correlation), float(np.mean(w * v > 0)), float(auc))
