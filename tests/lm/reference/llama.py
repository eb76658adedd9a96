"""Tiny Llama, Mistral, Qwen2 and Qwen3 models: one architecture with options. Names as on the hub."""

from collections.abc import Iterator

import numpy as np

from tests.lm.reference.places import Place, heads
from tests.lm.reference.tiny import Drawn, Tiny, linear

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _config(model_type: str, **changes) -> dict:
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    } | changes


# The wavelengths of the eight frequencies of a head of 16 with base 500 are 6.3, 13.7, 29.7, 64.6, ...: one is short
# enough to stay, two lie between 8 and 32 and are mixed, the rest are divided.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

MODELS = {
    "llama": Tiny(
        _config("llama", num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
                pretraining_tp=1, torch_dtype="float16"),
        2, 9,
    ),
    "llama-biases": Tiny(
        _config("llama", attention_bias=True, mlp_bias=True, rms_norm_eps=0.03, rope_theta=500.0), 2, 7
    ),
    "llama3-old": Tiny(
        _config("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
                rope_theta=500.0, rope_scaling={"rope_type": "llama3", **LLAMA3}),
        1, 13,
    ),
    "llama3-new": Tiny(
        _config("llama", num_attention_heads=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
                rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}),
        1, 11,
    ),
    "llama-linear-old": Tiny(
        _config("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=12,
                rope_scaling={"type": "linear", "factor": 4.0}),
        2, 5,
    ),
    "llama-linear-gelu": Tiny(
        _config("llama", hidden_size=12, num_attention_heads=1, num_key_value_heads=1, hidden_act="gelu",
                rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}),
        1, 9,
    ),
    "mistral": Tiny(_config("mistral", sliding_window=3, rope_theta=10000.0), 2, 9),
    "mistral-full": Tiny(
        _config("mistral", sliding_window=None, num_key_value_heads=1, head_dim=6, rms_norm_eps=1e-5,
                rope_theta=1000000.0),
        1, 8,
    ),
    "mistral-wide": Tiny(
        _config("mistral", num_hidden_layers=3, num_attention_heads=2, sliding_window=5, tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
        1, 6,
    ),
    # Layer 0 sees everything, layer 1 three positions.
    "qwen2-window": Tiny(
        _config("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1, rope_theta=1000000.0), 1, 9
    ),
    # The window is written down but not used, as in the released models.
    "qwen2-tied": Tiny(
        _config("qwen2", use_sliding_window=False, sliding_window=2, max_window_layers=0, tie_word_embeddings=True,
                rope_theta=10000.0),
        2, 7,
    ),
    # Transformers 5's style: the kind of each layer by name, whatever max_window_layers says.
    "qwen2-layer-types": Tiny(
        _config("qwen2", hidden_act="gelu_new", use_sliding_window=True, sliding_window=4, max_window_layers=2,
                layer_types=["sliding_attention", "full_attention"],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        1, 8,
    ),
    "qwen3": Tiny(
        _config("qwen3", num_attention_heads=2, num_key_value_heads=1, head_dim=12, attention_bias=False,
                use_sliding_window=False, sliding_window=None, max_window_layers=2, rope_theta=1000000.0),
        2, 7,
    ),
    "qwen3-bias": Tiny(
        _config("qwen3", head_dim=6, attention_bias=True, tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        1, 9,
    ),
    "qwen3-window": Tiny(
        _config("qwen3", head_dim=4, hidden_act="gelu", rms_norm_eps=0.03, use_sliding_window=True, sliding_window=2,
                max_window_layers=1, rope_scaling={"rope_type": "linear", "factor": 3.0}, rope_theta=100.0),
        1, 8,
    ),
}  # fmt: skip


def n_layers(config: dict) -> int:
    return config["num_hidden_layers"]


def _biases(config: dict) -> tuple[bool, bool]:
    """Whether the projections of queries, keys and values have a bias, and whether the output projection has."""
    if config["model_type"] == "qwen2":
        return True, False
    both = config["model_type"] != "mistral" and config.get("attention_bias", False)
    return both, both


def tensors(config: dict) -> dict[str, Drawn]:
    """Every tensor that is drawn."""
    d, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or d // config["num_attention_heads"]
    queries, shared = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    (bias, out_bias), mlp_bias = _biases(config), config.get("mlp_bias", False)
    found = {"model.embed_tokens.weight": Drawn((vocab, d))}
    for layer in range(n_layers(config)):
        at = f"model.layers.{layer}."
        found |= linear(at + "self_attn.q_proj", d, queries, bias) | linear(at + "self_attn.k_proj", d, shared, bias)
        found |= linear(at + "self_attn.v_proj", d, shared, bias) | linear(
            at + "self_attn.o_proj", queries, d, out_bias
        )
        found |= linear(at + "mlp.gate_proj", d, mlp, mlp_bias) | linear(at + "mlp.up_proj", d, mlp, mlp_bias)
        found |= linear(at + "mlp.down_proj", mlp, d, mlp_bias)
        norms = {"input_layernorm": d, "post_attention_layernorm": d}
        if config["model_type"] == "qwen3":
            norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
        found |= {f"{at}{name}.weight": Drawn((width,), norm=True) for name, width in norms.items()}
    found["model.norm.weight"] = Drawn((d,), norm=True)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = Drawn((vocab, d), d)
    return found


def buffers(config: dict) -> dict[str, np.ndarray]:
    """Saved tensors that are no parameters: the rotary frequencies of the oldest Llama files."""
    if config.get("pretraining_tp") is None:
        return {}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    frequencies = (config.get("rope_theta", 10000.0) ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies.copy() for i in range(n_layers(config))}


def site_names(config: dict) -> list[str]:
    """The sites of a block in the order in which a pass meets them."""
    return [
        "resid_pre", "attn_q", "attn_k", "attn_v", "attn_pattern", "attn_z", "attn_out", "resid_mid",
        "mlp_in", "mlp_hidden", "mlp_out", "resid_post",
    ]  # fmt: skip


def places(model) -> Iterator[Place]:
    """Every site of a PyTorch model."""
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        split = heads(attention.head_dim)
        yield Place(f"resid_pre.{i}", layer, "input")
        for name in "qkv":
            yield Place(f"attn_{name}.{i}", getattr(attention, f"{name}_proj"), "output", split)
        yield Place(f"attn_pattern.{i}", attention, "pattern")
        yield Place(f"attn_z.{i}", attention.o_proj, "input", split)
        yield Place(f"attn_out.{i}", attention, "output")
        yield Place(f"resid_mid.{i}", layer.post_attention_layernorm, "input")
        yield Place(f"mlp_in.{i}", mlp, "input")
        yield Place(f"mlp_hidden.{i}", mlp.down_proj, "input")
        yield Place(f"mlp_out.{i}", mlp, "output")
        yield Place(f"resid_post.{i}", layer, "output")
