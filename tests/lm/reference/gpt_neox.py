"""Tiny GPT-NeoX models. Checkpoint names are those of EleutherAI's files on the hub."""

from collections.abc import Callable, Iterator

import numpy as np

from tests.lm.reference.places import Place, heads
from tests.lm.reference.tiny import Drawn, Tiny, layer_norm, linear


def _config(**changes) -> dict:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    } | changes


def _rope(fraction: float, theta: float) -> dict:
    return {"rope_type": "default", "partial_rotary_factor": fraction, "rope_theta": theta}


# Half of the configs are in the hub's old style (rotary_pct, rotary_emb_base), half in transformers 5's.
MODELS = {
    "parallel": Tiny(_config(num_hidden_layers=3, num_attention_heads=4, rotary_pct=0.5, rotary_emb_base=10000), 2, 9),
    "sequential": Tiny(_config(use_parallel_residual=False, rope_parameters=_rope(1.0, 10000.0)), 2, 7),
    # Three of twelve dimensions are rotated: the odd number is rounded up to two pairs.
    "one-head": Tiny(_config(num_attention_heads=1, hidden_size=12, rotary_pct=0.25, rotary_emb_base=10000), 1, 13),
    "no-attention-bias": Tiny(_config(attention_bias=False, rope_parameters=_rope(0.25, 10000.0)), 1, 5),
    "tanh-sequential": Tiny(
        _config(hidden_act="gelu_new", use_parallel_residual=False, rotary_pct=0.25, rotary_emb_base=10000), 2, 3
    ),
    "tied-theta": Tiny(_config(tie_word_embeddings=True, rope_parameters=_rope(1.0, 100.0)), 1, 11),
    "epsilon-relu": Tiny(
        _config(layer_norm_eps=0.03, hidden_act="relu", num_attention_heads=4, rotary_pct=1.0, rotary_emb_base=500),
        2,
        5,
    ),
    "one-position": Tiny(_config(num_hidden_layers=1, rope_parameters=_rope(0.5, 10000.0)), 3, 1),
}


def n_layers(config: dict) -> int:
    return config["num_hidden_layers"]


def tensors(config: dict) -> dict[str, Drawn]:
    """Every tensor that is drawn."""
    d, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    bias = config.get("attention_bias", True)
    found = {"gpt_neox.embed_in.weight": Drawn((vocab, d))} | layer_norm("gpt_neox.final_layer_norm", d)
    linears = {}
    for layer in range(n_layers(config)):
        at = f"gpt_neox.layers.{layer}."
        found |= layer_norm(at + "input_layernorm", d) | layer_norm(at + "post_attention_layernorm", d)
        linears |= linear(at + "attention.query_key_value", d, 3 * d, bias) | linear(at + "attention.dense", d, d, bias)
        linears |= linear(at + "mlp.dense_h_to_4h", d, mlp) | linear(at + "mlp.dense_4h_to_h", mlp, d)
    found |= linears
    return found if config["tie_word_embeddings"] else found | {"embed_out.weight": Drawn((vocab, d))}


def buffers(config: dict) -> dict[str, np.ndarray]:
    """Saved tensors that are no parameters: none."""
    return {}


def site_names(config: dict) -> list[str]:
    """The sites of a block in the order in which a pass meets them."""
    names = ["resid_pre", "attn_q", "attn_k", "attn_v", "attn_pattern", "attn_z", "attn_out"]
    return names + ([] if config["use_parallel_residual"] else ["resid_mid"]) + [
        "mlp_in", "mlp_hidden", "mlp_out", "resid_post",
    ]  # fmt: skip


def places(model) -> Iterator[Place]:
    """Every site of a PyTorch model."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads

    def part(index: int) -> Callable:
        # The query, key and value of one head stand side by side, then those of the next.
        return lambda tensor: tensor.unflatten(-1, (-1, 3, head_dim))[..., index, :]

    for i, layer in enumerate(model.gpt_neox.layers):
        attention = layer.attention
        yield Place(f"resid_pre.{i}", layer, "input")
        for index, name in enumerate(("attn_q", "attn_k", "attn_v")):
            yield Place(f"{name}.{i}", attention.query_key_value, "output", part(index))
        yield Place(f"attn_pattern.{i}", attention, "pattern")
        yield Place(f"attn_z.{i}", attention.dense, "input", heads(head_dim))
        yield Place(f"attn_out.{i}", attention, "output")
        if not config.use_parallel_residual:
            yield Place(f"resid_mid.{i}", layer.post_attention_layernorm, "input")
        yield Place(f"mlp_in.{i}", layer.mlp, "input")
        yield Place(f"mlp_hidden.{i}", layer.mlp.dense_4h_to_h, "input")
        yield Place(f"mlp_out.{i}", layer.mlp, "output")
        yield Place(f"resid_post.{i}", layer, "output")
