"""GPT-2 of every size, and models of its architecture (distilgpt2, Stanford CRFM's). Source: Radford et al. 2019.

One block: `mid = x + attention(ln_attn(x))`, `out = mid + mlp(ln_mlp(mid))`. Positions are learned vectors, added to
the token embeddings. The fused qkv weight is laid out [(q, k, v), head, head_dim]; on disk kernels are
`[inputs, outputs]` (Conv1D), not PyTorch's usual `[outputs, inputs]`.
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
from sparse_jax.lm.family import Family, Pass, check_heads, register
from sparse_jax.lm.layers import MLP, LayerNorm, Linear, accurate_dtype, activation
from sparse_jax.lm.weight_map import linear, norm, table


@dataclass(frozen=True)
class GPT2Config:
    """Static choices of a GPT-2 model; names as in the rest of the library, values as in `config.json`.

    Attributes:
        scale_scores: divide attention scores by sqrt(head_dim).
        scale_by_layer: divide them by the layer's number too, counted from 1 (Stanford CRFM's training).
    """

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float = 1e-5
    activation: str = "gelu_new"
    scale_scores: bool = True
    scale_by_layer: bool = False
    tied_embeddings: bool = True
    initializer_range: float = 0.02
    model_type: str = "gpt2"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads


def read_config(config_json: dict) -> GPT2Config:
    """From `config.json`.

    Raises:
        InputError: a size is missing or no number, heads do not divide the width, an unknown activation,
            cross-attention.
    """
    raw = ConfigJson(config_json, "gpt2")
    raw.require("n_embd", "n_layer", "n_head", "vocab_size")
    width, heads = raw.integer("n_embd"), raw.integer("n_head")
    check_heads(width, heads, raw.model_type)
    activation(raw.text("activation_function", "gelu_new"))
    if raw.boolean("add_cross_attention", False):
        raise InputError("gpt2 with add_cross_attention is half of an encoder-decoder model; it is not supported")
    # `reorder_and_upcast_attn` takes the softmax in float32, which is done here for every model.
    return GPT2Config(
        n_layers=raw.integer("n_layer"),
        d_model=width,
        d_mlp=raw.integer("n_inner", 4 * width),
        n_heads=heads,
        vocab_size=raw.integer("vocab_size"),
        max_positions=raw.integer("n_positions", raw.integer("n_ctx", 1024)),
        norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
        activation=raw.text("activation_function", "gelu_new"),
        scale_scores=raw.boolean("scale_attn_weights", True),
        scale_by_layer=raw.boolean("scale_attn_by_inverse_layer_idx", False),
        tied_embeddings=raw.boolean("tie_word_embeddings", True),
        initializer_range=raw.number("initializer_range", 0.02),
    )


class Attention(nn.Module):
    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, run: Pass) -> jax.Array:
        cfg = self.config
        heads, head_dim = cfg.n_heads, cfg.head_dim
        qkv = Linear((cfg.d_model,), (3, heads, head_dim), dtype=self.dtype, name="qkv")(x)
        q, k, v = (run.tap(name, qkv[..., i, :, :]) for i, name in enumerate(("attn_q", "attn_k", "attn_v")))
        scale = head_dim**-0.5 if cfg.scale_scores else 1.0
        if cfg.scale_by_layer:
            scale = scale / (jnp.asarray(run.layer).astype(accurate_dtype(self.dtype)) + 1)
        return Linear((heads, head_dim), (cfg.d_model,), dtype=self.dtype, name="out")(
            run.attend(q, k, v, scale, run.tap)
        )


class Block(nn.Module):
    """One layer: `x [batch, position, d_model]` to the same, calling the tap at every site in order."""

    config: GPT2Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, run: Pass) -> jax.Array:
        cfg, tap = self.config, run.tap
        x = tap("resid_pre", x)
        normed = LayerNorm(cfg.d_model, cfg.norm_epsilon, self.dtype, name="ln_attn")(x)
        attn_out = tap("attn_out", Attention(cfg, self.dtype, name="attn")(normed, run))
        mid = tap("resid_mid", attn_out + x)
        normed = tap("mlp_in", LayerNorm(cfg.d_model, cfg.norm_epsilon, self.dtype, name="ln_mlp")(mid))
        mlp = MLP(cfg.d_model, cfg.d_mlp, cfg.activation, dtype=self.dtype, name="mlp")
        return tap("resid_post", mid + tap("mlp_out", mlp(normed, tap)))


def weights(config: GPT2Config) -> dict:
    """Where each parameter stands in a Hugging Face checkpoint (OpenAI's on the hub lack the prefix)."""
    d, mlp, vocab = ("d_model", config.d_model), ("d_mlp", config.d_mlp), ("vocab", config.vocab_size)
    heads, qkv, head_dim = ("heads", config.n_heads), ("qkv", 3), ("head_dim", config.head_dim)
    layer = "transformer.h.{layer}."
    blocks = {
        "ln_attn": norm(layer + "ln_1", d),
        "ln_mlp": norm(layer + "ln_2", d),
        "attn": {
            "qkv": linear(layer + "attn.c_attn", (d,), (qkv, heads, head_dim), conv1d=True),
            "out": linear(layer + "attn.c_proj", (heads, head_dim), (d,), conv1d=True),
        },
        "mlp": {
            "up": linear(layer + "mlp.c_fc", (d,), (mlp,), conv1d=True),
            "down": linear(layer + "mlp.c_proj", (mlp,), (d,), conv1d=True),
        },
    }
    stem = {
        "tokens": table("transformer.wte.weight", vocab, d),
        "positions": table("transformer.wpe.weight", ("positions", config.max_positions), d),
    }
    head = {"norm": norm("transformer.ln_f", d)}
    if not config.tied_embeddings:
        head["unembed"] = table("lm_head.weight", vocab, d)
    return {"embed": stem, "blocks": blocks, "head": head}


def embed(config: GPT2Config, params: dict, tokens: jax.Array, positions: jax.Array, dtype) -> jax.Array:
    """Token plus position embeddings `[batch, position, d_model]`."""
    return embed_tokens(params, tokens, dtype) + params["embed"]["positions"][positions].astype(dtype)


def unembed(config: GPT2Config, params: dict, residual: jax.Array, dtype) -> jax.Array:
    """Logits `[batch, position, vocab]`: final layer norm, then the unembedding."""
    final = LayerNorm(config.d_model, config.norm_epsilon, dtype)
    return to_logits(params, final.apply({"params": params["head"]["norm"]}, residual), dtype)


GPT2 = register(
    Family(
        model_types=("gpt2",),
        read_config=read_config,
        weights=weights,
        prefix="transformer.",
        # Saved causal masks; `attn.c_attn.bias` is a weight and must not match.
        ignored=(r"(^|\.)attn\.(bias|masked_bias)$",),
        embed=embed,
        block=Block,
        unembed=unembed,
    )
)
