"""GPT-NeoX: Pythia of every size, GPT-NeoX-20B. Source: Black et al. 2022; Biderman et al. 2023 (Pythia).

One block, with the parallel residual (the default):

    out = x + attention(ln_attn(x)) + mlp(ln_mlp(x))

and the sequential one: `mid = x + attention(ln_attn(x))`, `out = mid + mlp(ln_mlp(mid))`.
Rotary embedding turns the first `rotary_fraction` of each head. The fused qkv weight is laid out
[head, (q, k, v), head_dim].
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.lm.attention import causal_attention
from sparse_jax.lm.family import Family, Weight, register
from sparse_jax.lm.layers import LayerNorm, Linear, accurate_dtype, activation
from sparse_jax.lm.rotary import rotary_angles, rotate
from sparse_jax.lm.tap import Tap
from sparse_jax.numerics import dot_general


@dataclass(frozen=True)
class GPTNeoXConfig:
    """Static choices of a GPT-NeoX model; names as in the rest of the library, values as in `config.json`."""

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    vocab_size: int
    max_positions: int
    rotary_fraction: float = 0.25
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    activation: str = "gelu"
    parallel_residual: bool = True
    attention_bias: bool = True
    tied_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "gpt_neox"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_fraction)


def read_config(raw: dict) -> GPTNeoXConfig:
    """From `config.json`, in the hub's old style (`rotary_pct`, `rotary_emb_base`) or transformers 5's.

    Raises:
        InputError: a size is missing, heads do not divide the width, or a rotary scaling that is not supported.
    """
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [name for name in required if name not in raw]:
        raise InputError(f"config.json of a gpt_neox model lacks {', '.join(missing)}")
    rope = raw.get("rope_parameters") or {}
    scaling = rope.get("rope_type", "default")
    old_scaling = raw.get("rope_scaling") or {}
    if scaling != "default" or old_scaling.get("rope_type", old_scaling.get("type", "default")) != "default":
        raise InputError(f"gpt_neox with rotary scaling {rope or old_scaling} is not supported; only 'default' is")
    if raw["hidden_size"] % raw["num_attention_heads"]:
        raise InputError(
            f"hidden_size {raw['hidden_size']} is not a multiple of num_attention_heads {raw['num_attention_heads']}"
        )
    activation(raw.get("hidden_act", "gelu"))
    return GPTNeoXConfig(
        n_layers=raw["num_hidden_layers"],
        d_model=raw["hidden_size"],
        d_mlp=raw["intermediate_size"],
        n_heads=raw["num_attention_heads"],
        vocab_size=raw["vocab_size"],
        max_positions=raw.get("max_position_embeddings", 2048),
        rotary_fraction=float(rope.get("partial_rotary_factor", raw.get("rotary_pct", 0.25))),
        rotary_base=float(rope.get("rope_theta", raw.get("rotary_emb_base", 10000.0))),
        norm_epsilon=raw.get("layer_norm_eps", 1e-5),
        activation=raw.get("hidden_act", "gelu"),
        parallel_residual=raw.get("use_parallel_residual", True),
        attention_bias=raw.get("attention_bias", True),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        initializer_range=raw.get("initializer_range", 0.02),
    )


class Attention(nn.Module):
    config: GPTNeoXConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, tap: Tap) -> jax.Array:
        cfg = self.config
        heads, head_dim = cfg.n_heads, cfg.head_dim
        qkv = Linear((cfg.d_model,), (heads, 3, head_dim), cfg.attention_bias, self.dtype, name="qkv")(x)
        q, k, v = (tap(name, qkv[..., i, :]) for i, name in enumerate(("attn_q", "attn_k", "attn_v")))
        cos, sin = rotary_angles(positions, cfg.rotary_dim, cfg.rotary_base, self.dtype)
        z = causal_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, head_dim**-0.5, tap)
        return Linear((heads, head_dim), (cfg.d_model,), cfg.attention_bias, self.dtype, name="out")(z)


class MLP(nn.Module):
    config: GPTNeoXConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        cfg = self.config
        hidden = Linear((cfg.d_model,), (cfg.d_mlp,), dtype=self.dtype, name="up")(x)
        hidden = tap("mlp_hidden", activation(cfg.activation)(hidden))
        return Linear((cfg.d_mlp,), (cfg.d_model,), dtype=self.dtype, name="down")(hidden)


class Block(nn.Module):
    """One layer: `x [batch, position, d_model]` to the same, calling `tap` at every site in order."""

    config: GPTNeoXConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, tap: Tap) -> jax.Array:
        cfg = self.config
        x = tap("resid_pre", x)
        normed = LayerNorm(cfg.d_model, cfg.norm_epsilon, self.dtype, name="ln_attn")(x)
        attn_out = tap("attn_out", Attention(cfg, self.dtype, name="attn")(normed, positions, tap))
        mid = x if cfg.parallel_residual else tap("resid_mid", attn_out + x)
        normed = tap("mlp_in", LayerNorm(cfg.d_model, cfg.norm_epsilon, self.dtype, name="ln_mlp")(mid))
        mlp_out = tap("mlp_out", MLP(cfg, self.dtype, name="mlp")(normed, tap))
        out = mlp_out + attn_out + x if cfg.parallel_residual else mlp_out + mid
        return tap("resid_post", out)


def _transposed(tensor: np.ndarray) -> np.ndarray:
    return tensor.T


def weights(config: GPTNeoXConfig) -> dict:
    """Where each parameter stands in a Hugging Face checkpoint."""
    d, mlp, heads, head_dim = config.d_model, config.d_mlp, config.n_heads, config.head_dim
    layer = "gpt_neox.layers.{layer}."

    def norm(name: str) -> dict:
        return {"scale": Weight(f"{name}.weight", (d,)), "bias": Weight(f"{name}.bias", (d,))}

    def linear(name: str, inputs: int, outputs: int, kernel, bias: tuple[int, ...], use_bias: bool = True) -> dict:
        found = {"kernel": Weight(f"{name}.weight", (outputs, inputs), kernel)}
        if use_bias:
            found["bias"] = Weight(f"{name}.bias", (outputs,), lambda tensor: tensor.reshape(bias))
        return found

    def qkv_kernel(tensor):
        return tensor.T.reshape(d, heads, 3, head_dim)

    def out_kernel(tensor):
        return tensor.T.reshape(heads, head_dim, d)

    fused, bias = layer + "attention.query_key_value", config.attention_bias
    blocks = {
        "ln_attn": norm(layer + "input_layernorm"),
        "ln_mlp": norm(layer + "post_attention_layernorm"),
        "attn": {
            "qkv": linear(fused, d, 3 * d, qkv_kernel, (heads, 3, head_dim), bias),
            "out": linear(layer + "attention.dense", d, d, out_kernel, (d,), bias),
        },
        "mlp": {
            "up": linear(layer + "mlp.dense_h_to_4h", d, mlp, _transposed, (mlp,)),
            "down": linear(layer + "mlp.dense_4h_to_h", mlp, d, _transposed, (d,)),
        },
    }
    embedding = "gpt_neox.embed_in.weight"
    unembedding = embedding if config.tied_embeddings else "embed_out.weight"
    return {
        "embed": {"tokens": Weight(embedding, (config.vocab_size, d))},
        "blocks": blocks,
        "head": {
            "norm": norm("gpt_neox.final_layer_norm"),
            "unembed": Weight(unembedding, (config.vocab_size, d), _transposed),
        },
    }


def embed(config: GPTNeoXConfig, params: dict, tokens: jax.Array, dtype) -> jax.Array:
    """Token embeddings `[batch, position, d_model]`; positions enter through the rotary embedding."""
    return params["tokens"][tokens].astype(dtype)


def unembed(config: GPTNeoXConfig, params: dict, residual: jax.Array, dtype) -> jax.Array:
    """Logits `[batch, position, vocab]` in float32 (or float64): final layer norm, then the unembedding."""
    norm = LayerNorm(config.d_model, config.norm_epsilon, dtype)
    x = norm.apply({"params": params["norm"]}, residual)
    accurate = accurate_dtype(dtype)
    kernel = params["unembed"].astype(dtype)
    return dot_general(x, kernel, (((2,), (0,)), ((), ())), preferred_element_type=accurate)


def missing_site(config: GPTNeoXConfig, name: str) -> str | None:
    """Why the model lacks the site `name`, or None if it has it."""
    if name == "resid_mid" and config.parallel_residual:
        return "attention and MLP run in parallel here, so no residual stream stands between them"
    return None


GPT_NEOX = register(
    Family(
        model_types=("gpt_neox",),
        read_config=read_config,
        weights=weights,
        # Saved causal masks and rotary tables; `attention.dense.bias` is a weight and must not match.
        ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
        embed=embed,
        block=Block,
        unembed=unembed,
        missing_site=missing_site,
    )
)
