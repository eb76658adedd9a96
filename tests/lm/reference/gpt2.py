"""Tiny GPT-2 models, in each of the styles in which GPT-2 checkpoints lie on the hub.

A config with `n_ctx` is of OpenAI's own files: names without a prefix (`h.0.attn.c_attn.weight`) and the causal mask of
each layer saved beside the weights. The others have the prefix `transformer.`; the mask is beside the weights there too
where the config has `transformers_version` below 5 (as for distilgpt2), then as booleans.
"""

from collections.abc import Callable, Iterator

import numpy as np

from tests.lm.reference.places import Place, heads
from tests.lm.reference.tiny import Drawn, Tiny, layer_norm

POSITIONS = 24


def _config(**changes) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 29,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": POSITIONS,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 28,
        "eos_token_id": 28,
    } | changes


# OpenAI's config.json says all this too; none of it bears on the forward pass.
OPENAI = {
    "n_ctx": POSITIONS,
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "initializer_range": 0.02,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}

MODELS = {
    "gpt2-hub": Tiny(_config(n_head=4, **OPENAI), 2, 9),
    "gpt2-inner": Tiny(_config(n_inner=24, n_head=4, activation_function="gelu"), 2, 5),
    "gpt2-unscaled": Tiny(_config(scale_attn_weights=False, **OPENAI), 1, 7),
    "gpt2-by-layer": Tiny(
        _config(scale_attn_by_inverse_layer_idx=True, n_layer=3, n_inner=20, transformers_version="4.20.0"), 1, 11
    ),
    # The two options of Stanford's GPT-2 models, together.
    "gpt2-upcast": Tiny(
        _config(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True, n_inner=None, n_embd=12), 1, 9
    ),
    "gpt2-relu-epsilon": Tiny(
        _config(activation_function="relu", layer_norm_epsilon=0.03, n_inner=32, **OPENAI), 2, 3
    ),
    "gpt2-one-head": Tiny(_config(n_head=1, n_embd=12, n_inner=24, **OPENAI), 1, 13),
    "gpt2-untied": Tiny(_config(tie_word_embeddings=False, activation_function="silu", n_inner=24), 1, 8),
}  # fmt: skip


def n_layers(config: dict) -> int:
    return config["n_layer"]


def _prefix(config: dict) -> str:
    return "" if "n_ctx" in config else "transformer."


def _conv1d(name: str, inputs: int, outputs: int) -> dict[str, Drawn]:
    """GPT-2's linear map, which keeps its kernel as `[inputs, outputs]`."""
    return {f"{name}.weight": Drawn((inputs, outputs), inputs), f"{name}.bias": Drawn((outputs,))}


def tensors(config: dict) -> dict[str, Drawn]:
    """Every tensor that is drawn."""
    d, vocab, prefix = config["n_embd"], config["vocab_size"], _prefix(config)
    mlp = config.get("n_inner") or 4 * d
    found = {f"{prefix}wte.weight": Drawn((vocab, d)), f"{prefix}wpe.weight": Drawn((config["n_positions"], d))}
    for layer in range(n_layers(config)):
        at = f"{prefix}h.{layer}."
        found |= layer_norm(at + "ln_1", d) | layer_norm(at + "ln_2", d)
        found |= _conv1d(at + "attn.c_attn", d, 3 * d) | _conv1d(at + "attn.c_proj", d, d)
        found |= _conv1d(at + "mlp.c_fc", d, mlp) | _conv1d(at + "mlp.c_proj", mlp, d)
    found |= layer_norm(f"{prefix}ln_f", d)
    return found if config.get("tie_word_embeddings", True) else found | {"lm_head.weight": Drawn((vocab, d))}


def buffers(config: dict) -> dict[str, np.ndarray]:
    """Saved tensors that are no parameters: the causal mask, and the score that it once put in hidden places."""
    old = config.get("transformers_version", "5").split(".")[0] < "5"
    if not (old or "n_ctx" in config):
        return {}
    n, prefix = config["n_positions"], _prefix(config)
    mask = np.tril(np.ones((1, 1, n, n), bool if old else np.float32))
    found = {}
    for layer in range(n_layers(config)):
        found[f"{prefix}h.{layer}.attn.bias"] = mask.copy()
        found[f"{prefix}h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return found


def site_names(config: dict) -> list[str]:
    """The sites of a block in the order in which a pass meets them."""
    return [
        "resid_pre", "attn_q", "attn_k", "attn_v", "attn_pattern", "attn_z", "attn_out", "resid_mid",
        "mlp_in", "mlp_hidden", "mlp_out", "resid_post",
    ]  # fmt: skip


def places(model) -> Iterator[Place]:
    """Every site of a PyTorch model."""
    head_dim = model.config.n_embd // model.config.n_head

    def part(index: int) -> Callable:
        # All queries, then all keys, then all values.
        return lambda tensor: tensor.unflatten(-1, (3, -1, head_dim))[..., index, :, :]

    for i, block in enumerate(model.transformer.h):
        yield Place(f"resid_pre.{i}", block, "input")
        for index, name in enumerate(("attn_q", "attn_k", "attn_v")):
            yield Place(f"{name}.{i}", block.attn.c_attn, "output", part(index))
        yield Place(f"attn_pattern.{i}", block.attn, "pattern")
        yield Place(f"attn_z.{i}", block.attn.c_proj, "input", heads(head_dim))
        yield Place(f"attn_out.{i}", block.attn, "output")
        yield Place(f"resid_mid.{i}", block.ln_2, "input")
        yield Place(f"mlp_in.{i}", block.mlp, "input")
        yield Place(f"mlp_hidden.{i}", block.mlp.c_proj, "input")
        yield Place(f"mlp_out.{i}", block.mlp, "output")
        yield Place(f"resid_post.{i}", block, "output")
