"""Rotary position embedding in the half-split layout (GPT-NeoX, Llama). Source: Su et al. 2021, eq. 34."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.lm.config_json import ConfigJson
from sparse_jax.lm.layers import accurate_dtype


@dataclass(frozen=True)
class Rotary:
    """How positions become angles.

    Attributes:
        dim: entries of each head that are turned, from the first.
        base: frequency i is base^(-2 i / dim).
        scaling: how frequencies are stretched for contexts longer than the model was first trained on. "linear": all
            are divided by `factor` (Chen et al. 2023). "llama3": those with a wavelength above
            original_positions / low_factor are divided by it, those below original_positions / high_factor stay, and
            those between are mixed (Llama 3.1).
        factor, low_factor, high_factor, original_positions: numbers of the scaling.
    """

    dim: int
    base: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192


def read_rotary(raw: ConfigJson, head_dim: int, fraction: float = 1.0) -> Rotary:
    """The rotary embedding of a `config.json`: the hub's older keys (`rope_theta` or NeoX's `rotary_emb_base`, with
    `rope_scaling` beside it) or transformers 5's `rope_parameters`.

    Args:
        raw: the config.
        head_dim: entries of a head.
        fraction: share of them that is turned where the config does not say.

    Raises:
        InputError: a kind of scaling that is not supported, or one that lacks its numbers.
    """
    new, old = raw.table("rope_parameters"), raw.table("rope_scaling")
    if any(isinstance(value, dict) for value in new.raw.values()):
        raise InputError(f"{raw.model_type} with rotary embeddings that differ by layer ({new.raw}) is not supported")
    kinds = [t.text("rope_type", t.text("type", "default")) for t in (new, old)]
    stretched, kind = (new, kinds[0]) if kinds[0] != "default" else (old, kinds[1])
    base = new.number("rope_theta", raw.number("rope_theta", raw.number("rotary_emb_base", 10000.0)))
    share = new.number("partial_rotary_factor", raw.number("partial_rotary_factor", raw.number("rotary_pct", fraction)))
    dim = int(head_dim * share)
    if kind == "default":
        return Rotary(dim, base)
    if kind not in ("linear", "llama3"):
        raise InputError(
            f"{raw.model_type} with rotary scaling {kind!r} ({stretched.raw}) is not supported; "
            "supported are default, linear, llama3"
        )
    if kind == "linear":
        return Rotary(dim, base, "linear", stretched.number("factor"))
    return Rotary(
        dim, base, "llama3", stretched.number("factor"), stretched.number("low_freq_factor"),
        stretched.number("high_freq_factor"),
        stretched.integer("original_max_position_embeddings", raw.integer("max_position_embeddings", 8192)),
    )  # fmt: skip


def frequencies(rotary: Rotary, dtype) -> np.ndarray:
    """`[dim / 2]` angles per position, each step rounded to `dtype` (float32 or float64)."""
    exponents = np.arange(0, rotary.dim, 2, dtype=dtype) / np.dtype(dtype).type(rotary.dim)
    # The power in float64, then rounded: NumPy's float32 power is off by a unit here and there.
    found = (1 / (rotary.base ** exponents.astype(np.float64)).astype(dtype)).astype(dtype)
    if rotary.scaling == "linear":
        return (found / rotary.factor).astype(dtype)
    if rotary.scaling == "llama3":
        turns = rotary.original_positions * found / (2 * math.pi)  # over the context of the first training
        smooth = np.clip((turns - rotary.low_factor) / (rotary.high_factor - rotary.low_factor), 0, 1)
        return ((1 - smooth) * found / rotary.factor + smooth * found).astype(dtype)
    return found


def rotary_angles(rotary: Rotary, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[*positions.shape, dim / 2]` of position x frequency.

    Angles are made in float32 for every compute dtype below float64, as the models were trained: exponent, power,
    reciprocal and angle are each rounded, because at position 2047 one unit in the last place of a frequency turns
    the query or key by up to 1e-4.
    """
    accurate = accurate_dtype(dtype)
    angles = positions.astype(accurate)[..., None] * jnp.array(frequencies(rotary, accurate))
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first `2 * cos.shape[-1]` entries of each head of `x [batch, position, head, head_dim]`.

    Entry i is paired with entry i + dim / 2; entries past dim pass unchanged. cos and sin are `[position, dim / 2]`, or
    `[batch, position, dim / 2]` where the rows stand at positions of their own.
    """
    half = cos.shape[-1]
    cos, sin = cos[..., :, None, :], sin[..., :, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
