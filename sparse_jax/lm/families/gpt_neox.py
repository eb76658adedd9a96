"""GPT-NeoX: Pythia of every size, GPT-NeoX-20B. Source: Black et al. 2022; Biderman et al. 2023 (Pythia).

One block, with the parallel residual (the default):

    out = x + attention(ln_attn(x)) + mlp(ln_mlp(x))

and the sequential one: `mid = x + attention(ln_attn(x))`, `out = mid + mlp(ln_mlp(mid))`.
Rotary embedding turns the first `rotary.dim` entries of each head. The fused qkv weight is laid out
[head, (q, k, v), head_dim].
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparse_jax.lm.config_json import ConfigJson
from sparse_jax.lm.embedding import embed_tokens
from sparse_jax.lm.embedding import unembed as to_logits
from sparse_jax.lm.family import Family, Pass, check_heads, register
from sparse_jax.lm.layers import MLP, LayerNorm, Linear, activation
from sparse_jax.lm.rotary import Rotary, read_rotary, rotary_angles, rotate
from sparse_jax.lm.weight_map import linear, norm, table


@dataclass(frozen=True)
class GPTNeoXConfig:
    """Static choices of a GPT-NeoX model; names as in the rest of the library, values as in `config.json`.

    Attributes:
        rotary: by default a quarter of each head is turned, as in Pythia.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    vocab_size: int
    max_positions: int
    rotary: Rotary = None  # type: ignore[assignment]
    norm_epsilon: float = 1e-5
    activation: str = "gelu"
    parallel_residual: bool = True
    attention_bias: bool = True
    tied_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "gpt_neox"

    def __post_init__(self):
        if self.rotary is None:
            object.__setattr__(self, "rotary", Rotary(self.head_dim // 4))

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads


def read_config(config_json: dict) -> GPTNeoXConfig:
    """From `config.json`, in the hub's old style (`rotary_pct`, `rotary_emb_base`) or transformers 5's.

    Raises:
        InputError: a size is missing or no number, heads do not divide the width, an activation or rotary scaling
            that is not known.
    """
    raw = ConfigJson(config_json, "gpt_neox")
    raw.require("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    width, heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    check_heads(width, heads, raw.model_type)
    activation(raw.text("hidden_act", "gelu"))
    return GPTNeoXConfig(
        n_layers=raw.integer("num_hidden_layers"),
        d_model=width,
        d_mlp=raw.integer("intermediate_size"),
        n_heads=heads,
        vocab_size=raw.integer("vocab_size"),
        max_positions=raw.integer("max_position_embeddings", 2048),
        rotary=read_rotary(raw, width // heads, fraction=0.25),
        norm_epsilon=raw.number("layer_norm_eps", 1e-5),
        activation=raw.text("hidden_act", "gelu"),
        parallel_residual=raw.boolean("use_parallel_residual", True),
        attention_bias=raw.boolean("attention_bias", True),
        tied_embeddings=raw.boolean("tie_word_embeddings", False),
        initializer_range=raw.number("initializer_range", 0.02),
    )


class Attention(nn.Module):
    config: GPTNeoXConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, run: Pass) -> jax.Array:
        cfg = self.config
        heads, head_dim = cfg.n_heads, cfg.head_dim
        qkv = Linear((cfg.d_model,), (heads, 3, head_dim), cfg.attention_bias, self.dtype, name="qkv")(x)
        q, k, v = (run.tap(name, qkv[..., i, :]) for i, name in enumerate(("attn_q", "attn_k", "attn_v")))
        turn = rotary_angles(cfg.rotary, run.positions, self.dtype)
        z = run.attend(rotate(q, *turn), rotate(k, *turn), v, head_dim**-0.5, run.tap)
        return Linear((heads, head_dim), (cfg.d_model,), cfg.attention_bias, self.dtype, name="out")(z)


class Block(nn.Module):
    """One layer: `x [batch, position, d_model]` to the same, calling the tap at every site in order."""

    config: GPTNeoXConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, run: Pass) -> jax.Array:
        cfg, tap = self.config, run.tap
        x = tap("resid_pre", x)
        normed = LayerNorm(cfg.d_model, cfg.norm_epsilon, self.dtype, name="ln_attn")(x)
        attn_out = tap("attn_out", Attention(cfg, self.dtype, name="attn")(normed, run))
        mid = x if cfg.parallel_residual else tap("resid_mid", attn_out + x)
        normed = tap("mlp_in", LayerNorm(cfg.d_model, cfg.norm_epsilon, self.dtype, name="ln_mlp")(mid))
        mlp = MLP(cfg.d_model, cfg.d_mlp, cfg.activation, dtype=self.dtype, name="mlp")
        mlp_out = tap("mlp_out", mlp(normed, tap))
        out = mlp_out + attn_out + x if cfg.parallel_residual else mlp_out + mid
        return tap("resid_post", out)


def weights(config: GPTNeoXConfig) -> dict:
    """Where each parameter stands in a Hugging Face checkpoint."""
    d, mlp, vocab = ("d_model", config.d_model), ("d_mlp", config.d_mlp), ("vocab", config.vocab_size)
    heads, qkv, head_dim = ("heads", config.n_heads), ("qkv", 3), ("head_dim", config.head_dim)
    layer, bias = "gpt_neox.layers.{layer}.", config.attention_bias
    blocks = {
        "ln_attn": norm(layer + "input_layernorm", d),
        "ln_mlp": norm(layer + "post_attention_layernorm", d),
        "attn": {
            "qkv": linear(layer + "attention.query_key_value", (d,), (heads, qkv, head_dim), bias=bias),
            "out": linear(layer + "attention.dense", (heads, head_dim), (d,), bias=bias),
        },
        "mlp": {
            "up": linear(layer + "mlp.dense_h_to_4h", (d,), (mlp,)),
            "down": linear(layer + "mlp.dense_4h_to_h", (mlp,), (d,)),
        },
    }
    head = {"norm": norm("gpt_neox.final_layer_norm", d)}
    if not config.tied_embeddings:
        head["unembed"] = table("embed_out.weight", vocab, d)
    return {"embed": {"tokens": table("gpt_neox.embed_in.weight", vocab, d)}, "blocks": blocks, "head": head}


def embed(config: GPTNeoXConfig, params: dict, tokens: jax.Array, positions: jax.Array, dtype) -> jax.Array:
    """Token embeddings `[batch, position, d_model]`; positions enter through the rotary embedding."""
    return embed_tokens(params, tokens, dtype)


def unembed(config: GPTNeoXConfig, params: dict, residual: jax.Array, dtype) -> jax.Array:
    """Logits `[batch, position, vocab]`: final layer norm, then the unembedding."""
    final = LayerNorm(config.d_model, config.norm_epsilon, dtype)
    return to_logits(params, final.apply({"params": params["head"]["norm"]}, residual), dtype)


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
        prefix="gpt_neox.",
        # Saved causal masks and rotary tables; `attention.dense.bias` is a weight and must not match.
        ignored=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
        embed=embed,
        block=Block,
        unembed=unembed,
        missing_site=missing_site,
    )
)
