"""Small Linen layers that the families share. Parameters keep their own dtype; computing is in `dtype`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.lm.tap import Tap
from sparse_jax.numerics import dot_general


def accurate_dtype(dtype) -> np.dtype:
    """float32, or float64 where `dtype` is that: what sums, scores and angles are made in, at any compute dtype."""
    return np.dtype(np.float64 if jnp.dtype(dtype) == np.float64 else np.float32)


class Linear(nn.Module):
    """`x [..., *inputs] -> [..., *features]`, contracting as many trailing axes as `inputs` has.

    The kernel has shape `[*inputs, *features]`, the bias `features`.
    """

    inputs: tuple[int, ...]
    features: tuple[int, ...]
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n = len(self.inputs)
        kernel = self.param("kernel", nn.initializers.normal(0.02), (*self.inputs, *self.features))
        axes = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
        y = dot_general(x, kernel.astype(self.dtype), (axes, ((), ())))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), self.features).astype(self.dtype)
        return y


class LayerNorm(nn.Module):
    """Layer norm over the last axis; statistics in float32 (or float64), by the two-pass variance.

    Linen's own layer norm has another default epsilon and a one-pass variance that loses digits.
    """

    width: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (self.width,))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        accurate = accurate_dtype(x.dtype)
        x = x.astype(accurate)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(accurate) + bias.astype(accurate)).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, without a centre. Source: Zhang & Sennrich 2019, eq. 4.

    The mean square is taken in float32 (or float64); the normed value is rounded to the compute dtype before the
    scale, as Llama does it.
    """

    width: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (self.width,))
        x = x.astype(accurate_dtype(x.dtype))
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


def _gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def _gelu_exact(x):
    # As PyTorch has it. JAX's own is by erfc, which costs twice as much and differs only where gelu is next to 0.
    return 0.5 * x * (1 + lax.erf(x * np.asarray(np.sqrt(0.5), x.dtype)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu_exact,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The nonlinearity that a Hugging Face config calls `name` (its "gelu" is the exact one).

    Raises:
        InputError: a name that is not known here.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"activation function {name!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """`down(activation(up(x)))`, both with bias; the tap sees "mlp_hidden" between them."""

    d_model: int
    d_mlp: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        hidden = activation(self.activation)(Linear((self.d_model,), (self.d_mlp,), dtype=self.dtype, name="up")(x))
        return Linear((self.d_mlp,), (self.d_model,), dtype=self.dtype, name="down")(tap("mlp_hidden", hidden))


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; the tap sees "mlp_hidden", the product. Source: Shazeer 2020 (SwiGLU)."""

    d_model: int
    d_mlp: int
    activation: str
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        def into(name):
            return Linear((self.d_model,), (self.d_mlp,), self.use_bias, self.dtype, name=name)(x)

        hidden = tap("mlp_hidden", activation(self.activation)(into("gate")) * into("up"))
        return Linear((self.d_mlp,), (self.d_model,), self.use_bias, self.dtype, name="down")(hidden)
