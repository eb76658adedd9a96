"""Rotary position embedding in the half-split layout (GPT-NeoX, Llama). Source: Su et al. 2021, eq. 34."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.lm.layers import accurate_dtype


def rotary_angles(positions: jax.Array, rotary_dim: int, base: float, dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[position, rotary_dim / 2]` of position x base^(-2 i / rotary_dim).

    Angles are made in float32 for every compute dtype below float64, as the models were trained: exponent, power,
    reciprocal and angle are each rounded, because at position 2047 one unit in the last place of a frequency turns
    the query or key by up to 1e-4.
    """
    accurate = accurate_dtype(dtype)
    exponents = np.arange(0, rotary_dim, 2, dtype=accurate) / accurate.type(rotary_dim)
    # The power in float64, then rounded: NumPy's float32 power is off by a unit here and there.
    frequencies = 1 / (base ** exponents.astype(np.float64)).astype(accurate)
    angles = positions.astype(accurate)[:, None] * jnp.array(frequencies)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first `2 * cos.shape[-1]` entries of each head of `x [batch, position, head, head_dim]`.

    Entry i is paired with entry i + rotary_dim / 2; entries past rotary_dim pass unchanged.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
