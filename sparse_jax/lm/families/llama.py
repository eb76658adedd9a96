"""Llama and the models that share its block: Llama 2 and 3, Mistral, Qwen2, Qwen3.

    mid = x + attention(norm(x)),  out = mid + down(activation(gate(norm(mid))) * up(norm(mid)))

with RMSNorm, rotary embedding of whole heads and grouped-query attention. What differs is data in the config: Mistral
and some Qwen layers see a sliding window, Qwen2 has biases on q, k and v, Qwen3 norms each query and key head.
Source: Touvron et al. 2023; Llama 3 (2024); Jiang et al. 2023 (Mistral); Yang et al. 2024 (Qwen2), 2025 (Qwen3).
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparse_jax.errors import InputError
from sparse_jax.lm.config_json import ConfigJson
from sparse_jax.lm.embedding import embed_tokens
from sparse_jax.lm.embedding import unembed as to_logits
from sparse_jax.lm.family import Family, Pass, check_heads, of_layer, register
from sparse_jax.lm.layers import GatedMLP, Linear, RMSNorm, activation
from sparse_jax.lm.rotary import Rotary, read_rotary, rotary_angles, rotate
from sparse_jax.lm.weight_map import linear, norm, table

# A window that no context reaches: the layer sees everything.
NO_WINDOW = 2**30


@dataclass(frozen=True)
class LlamaConfig:
    """Static choices of a Llama-like model; names as in the rest of the library, values as in `config.json`.

    Attributes:
        n_kv_heads: key-value heads; n_heads / n_kv_heads query heads share one.
        rotary: by default whole heads are turned, with base 10,000.
        windows: positions that a query of each layer sees, its own included; by default NO_WINDOW: all.
        qk_norm: RMSNorm of each query and key head before the rotary embedding.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rotary: Rotary = None  # type: ignore[assignment]
    windows: tuple[int, ...] = ()
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "llama"

    def __post_init__(self):
        if self.rotary is None:
            object.__setattr__(self, "rotary", Rotary(self.head_dim))
        if not self.windows:
            object.__setattr__(self, "windows", (NO_WINDOW,) * self.n_layers)


def read_config(config_json: dict) -> LlamaConfig:
    """From `config.json` of a llama, mistral, qwen2 or qwen3 model, in transformers' older style or in that of 5.

    Raises:
        InputError: a size is missing or no number, heads that do not divide each other or the width, an activation,
            rotary scaling or kind of layer that is not known.
    """
    raw = ConfigJson(config_json, config_json.get("model_type", "llama"))
    raw.require("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    kind, width, heads = raw.model_type, raw.integer("hidden_size"), raw.integer("num_attention_heads")
    absent = {} if "num_key_value_heads" in raw.raw else _KV_HEADS
    kv_heads = raw.integer("num_key_value_heads", absent.get(kind, heads))
    if heads % kv_heads:
        raise InputError(
            f"config.json of a {kind} model: num_attention_heads {heads} is not a multiple of its "
            f"num_key_value_heads {kv_heads}"
        )
    if raw.raw.get("head_dim") is None and kind != "qwen3":
        check_heads(width, heads, kind)
    head_dim = raw.integer("head_dim", 128 if kind == "qwen3" else width // heads)
    activation(raw.text("hidden_act", "silu"))
    attention_bias = kind in ("llama", "qwen3") and raw.boolean("attention_bias", False)
    layers = raw.integer("num_hidden_layers")
    return LlamaConfig(
        n_layers=layers,
        d_model=width,
        d_mlp=raw.integer("intermediate_size"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=raw.integer("vocab_size"),
        max_positions=raw.integer("max_position_embeddings", _MAX_POSITIONS[kind]),
        rotary=read_rotary(raw, head_dim),
        windows=_windows(raw, layers),
        norm_epsilon=raw.number("rms_norm_eps", 1e-6),
        activation=raw.text("hidden_act", "silu"),
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=kind == "llama" and raw.boolean("mlp_bias", False),
        qk_norm=kind == "qwen3",
        tied_embeddings=raw.boolean("tie_word_embeddings", False),
        initializer_range=raw.number("initializer_range", 0.02),
        model_type=kind,
    )


# What transformers takes where config.json does not say (null means as many as there are query heads).
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


def _windows(raw: ConfigJson, layers: int) -> tuple[int, ...]:
    """The window of each layer: none in Llama, one for all layers in Mistral, by layer in Qwen."""
    if raw.model_type == "llama":
        return (NO_WINDOW,) * layers
    # Absent means transformers' default; null means none.
    width = 4096 if "sliding_window" not in raw.raw else raw.integer("sliding_window", NO_WINDOW)
    kinds = raw.raw.get("layer_types")
    if raw.model_type == "mistral":
        if kinds is not None:
            raise InputError("config.json of a mistral model has layer_types, which that architecture does not know")
        return (width,) * layers
    window = width if raw.boolean("use_sliding_window", False) else None
    if kinds is None:
        first = raw.integer("max_window_layers", 28, at_least=0)
        return tuple(window if window is not None and i >= first else NO_WINDOW for i in range(layers))
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in allowed for kind in kinds):
        raise InputError(
            f"config.json of a {raw.model_type} model has layer_types {kinds}; give one of {allowed} for each of its "
            f"{layers} layers"
        )
    if window is None and "sliding_attention" in kinds:
        raise InputError(
            f"config.json of a {raw.model_type} model has layers of sliding_attention, but use_sliding_window is false"
        )
    return tuple(window if kind == "sliding_attention" else NO_WINDOW for kind in kinds)


class Attention(nn.Module):
    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, run: Pass) -> jax.Array:
        cfg = self.config

        def project(name, heads):
            made = Linear((cfg.d_model,), (heads, cfg.head_dim), cfg.qkv_bias, self.dtype, name=name)(x)
            return run.tap(f"attn_{name}", made)

        q, k, v = project("q", cfg.n_heads), project("k", cfg.n_kv_heads), project("v", cfg.n_kv_heads)
        if cfg.qk_norm:
            q = RMSNorm(cfg.head_dim, cfg.norm_epsilon, self.dtype, name="q_norm")(q)
            k = RMSNorm(cfg.head_dim, cfg.norm_epsilon, self.dtype, name="k_norm")(k)
        turn = rotary_angles(cfg.rotary, run.positions, self.dtype)
        window = None if set(cfg.windows) == {NO_WINDOW} else of_layer(cfg.windows, run.layer)
        z = run.attend(rotate(q, *turn), rotate(k, *turn), v, cfg.head_dim**-0.5, run.tap, window)
        return Linear((cfg.n_heads, cfg.head_dim), (cfg.d_model,), cfg.out_bias, self.dtype, name="out")(z)


class Block(nn.Module):
    """One layer: `x [batch, position, d_model]` to the same, calling the tap at every site in order."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, run: Pass) -> jax.Array:
        cfg, tap = self.config, run.tap
        x = tap("resid_pre", x)
        normed = RMSNorm(cfg.d_model, cfg.norm_epsilon, self.dtype, name="ln_attn")(x)
        mid = tap("resid_mid", x + tap("attn_out", Attention(cfg, self.dtype, name="attn")(normed, run)))
        normed = tap("mlp_in", RMSNorm(cfg.d_model, cfg.norm_epsilon, self.dtype, name="ln_mlp")(mid))
        mlp = GatedMLP(cfg.d_model, cfg.d_mlp, cfg.activation, cfg.mlp_bias, self.dtype, name="mlp")
        return tap("resid_post", mid + tap("mlp_out", mlp(normed, tap)))


def weights(config: LlamaConfig) -> dict:
    """Where each parameter stands in a Hugging Face checkpoint."""
    d, mlp, vocab = ("d_model", config.d_model), ("d_mlp", config.d_mlp), ("vocab", config.vocab_size)
    heads, kv_heads, head_dim = (
        ("heads", config.n_heads),
        ("kv_heads", config.n_kv_heads),
        ("head_dim", config.head_dim),
    )
    layer = "model.layers.{layer}."
    attention = {
        "q": linear(layer + "self_attn.q_proj", (d,), (heads, head_dim), bias=config.qkv_bias),
        "k": linear(layer + "self_attn.k_proj", (d,), (kv_heads, head_dim), bias=config.qkv_bias),
        "v": linear(layer + "self_attn.v_proj", (d,), (kv_heads, head_dim), bias=config.qkv_bias),
        "out": linear(layer + "self_attn.o_proj", (heads, head_dim), (d,), bias=config.out_bias),
    }
    if config.qk_norm:
        attention |= {name: norm(f"{layer}self_attn.{name}", head_dim, bias=False) for name in ("q_norm", "k_norm")}
    blocks = {
        "ln_attn": norm(layer + "input_layernorm", d, bias=False),
        "ln_mlp": norm(layer + "post_attention_layernorm", d, bias=False),
        "attn": attention,
        "mlp": {
            "gate": linear(layer + "mlp.gate_proj", (d,), (mlp,), bias=config.mlp_bias),
            "up": linear(layer + "mlp.up_proj", (d,), (mlp,), bias=config.mlp_bias),
            "down": linear(layer + "mlp.down_proj", (mlp,), (d,), bias=config.mlp_bias),
        },
    }
    head = {"norm": norm("model.norm", d, bias=False)}
    if not config.tied_embeddings:
        head["unembed"] = table("lm_head.weight", vocab, d)
    return {"embed": {"tokens": table("model.embed_tokens.weight", vocab, d)}, "blocks": blocks, "head": head}


def embed(config: LlamaConfig, params: dict, tokens: jax.Array, positions: jax.Array, dtype) -> jax.Array:
    """Token embeddings `[batch, position, d_model]`; positions enter through the rotary embedding."""
    return embed_tokens(params, tokens, dtype)


def unembed(config: LlamaConfig, params: dict, residual: jax.Array, dtype) -> jax.Array:
    """Logits `[batch, position, vocab]`: final RMSNorm, then the unembedding."""
    final = RMSNorm(config.d_model, config.norm_epsilon, dtype)
    return to_logits(params, final.apply({"params": params["head"]["norm"]}, residual), dtype)


LLAMA = register(
    Family(
        model_types=tuple(_MAX_POSITIONS),
        read_config=read_config,
        weights=weights,
        prefix="model.",
        ignored=(r"rotary_emb\.inv_freq$",),
        embed=embed,
        block=Block,
        unembed=unembed,
    )
)
