"""Tiny GPT-NeoX models, and what transformers' PyTorch implementation computes with them.

    .venv/bin/python tests/lm/make_golden.py

writes `golden/NAME.npz` for each model of `MODELS`: the value at every site and the logits, in float32 and float64.
Making them needs torch and transformers; `test_golden.py`, which holds the port to them, needs neither, since the
weights come from NumPy. `test_parity_torch.py` runs the same reference live, and `conftest.py` uses the tiny models.
"""

import contextlib
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "golden"
DTYPES = ("float32", "float64")


class Tiny(NamedTuple):
    """A tiny model: `config.json` as a dict, and the shape of the batch its golden values are for."""

    config: dict
    rows: int
    length: int


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


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint on disk, by the names that EleutherAI's files on the hub have."""
    d, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    found = {"gpt_neox.embed_in.weight": (vocab, d)}
    norms = ["gpt_neox.final_layer_norm"]
    linears = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"gpt_neox.layers.{layer}."
        norms += [at + "input_layernorm", at + "post_attention_layernorm"]
        linears |= {at + "attention.query_key_value": (3 * d, d), at + "attention.dense": (d, d)}
        linears |= {at + "mlp.dense_h_to_4h": (mlp, d), at + "mlp.dense_4h_to_h": (d, mlp)}
    for norm in norms:
        found |= {norm + ".weight": (d,), norm + ".bias": (d,)}
    for linear, (outputs, inputs) in linears.items():
        found[linear + ".weight"] = (outputs, inputs)
        if config.get("attention_bias", True) or ".attention." not in linear:
            found[linear + ".bias"] = (outputs,)
    if not config["tie_word_embeddings"]:
        found["embed_out.weight"] = (vocab, d)
    return found


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights with nothing at its default: biases far from zero, norms' scales far from one.

    Uniform draws of the frozen legacy generator: the same bits with every NumPy and on every machine.
    """
    random, made = np.random.RandomState(seed), {}
    for name, shape in shapes(config).items():
        draw = random.random_sample(shape) * 2 - 1
        if len(shape) == 2 and "embed" not in name:
            draw = draw * math.sqrt(6 / shape[1])
        if name.endswith("norm.weight"):
            draw = 1 + draw / 2
        made[name] = draw.astype(np.float32)
    return made


def random_tokens(model: Tiny, seed: int = 1) -> np.ndarray:
    """`[rows, length]` token ids."""
    return np.random.RandomState(seed).randint(0, model.config["vocab_size"], (model.rows, model.length))


def write_model(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A model folder in the hub's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fingerprint(model: Tiny) -> str:
    """A hash of all that goes into the golden values: config, weights and tokens."""
    hashed = hashlib.sha256(json.dumps([model.config, model.rows, model.length]).encode())
    for name, tensor in sorted(random_tensors(model.config).items()):
        hashed.update(name.encode() + tensor.astype("<f4").tobytes())
    hashed.update(random_tokens(model).astype("<i8").tobytes())
    return hashed.hexdigest()


def sites(config: dict) -> list[str]:
    """Every site of such a model as text, in the order in which a pass meets them."""
    names = ["resid_pre", "attn_q", "attn_k", "attn_v", "attn_pattern", "attn_z", "attn_out"]
    names += ([] if config["use_parallel_residual"] else ["resid_mid"]) + ["mlp_in", "mlp_hidden", "mlp_out"]
    return [f"{name}.{layer}" for layer in range(config["num_hidden_layers"]) for name in [*names, "resid_post"]]


def relative_error(ours, theirs) -> float:
    """max |ours - theirs| / max |theirs|, in float64; infinite for another shape."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# What follows needs torch and transformers.


def torch_model(folder: Path, dtype: str):
    """transformers' model with eager attention; in float64 made float64 throughout.

    transformers takes the softmax and the rotary tables in float32 whatever the model's dtype. For float64 both are
    replaced here by their textbook forms in float64 (`_float64_attention`, `_float64_rotary`). The float32 model is
    transformers' own, untouched.
    """
    import torch
    from transformers import GPTNeoXForCausalLM

    implementation = "eager" if dtype == "float32" else _registered_float64_attention()
    model, report = GPTNeoXForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=implementation, output_loading_info=True
    )
    if wrong := {kind: names for kind, names in report.items() if names}:
        raise ValueError(f"transformers found other tensors in {folder} than it wants: {wrong}")
    if dtype == "float64":
        model.gpt_neox.rotary_emb.forward = _float64_rotary(model.config)
    return model.eval()


def _registered_float64_attention() -> str:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("eager_float64", _float64_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("eager_float64", eager_mask)
    return "eager_float64"


def _float64_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    pattern = scores.softmax(-1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def _float64_rotary(config):
    import torch

    rope = config.rope_parameters
    dim = int(config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"])

    def forward(x, position_ids):
        frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    return forward


@contextlib.contextmanager
def torch_taps(model, tap):
    """Hooks at every site: `tap(site as text, tensor)` sees each value and may return another to go on with."""
    import torch

    config, handles = model.config, []
    head_dim = config.hidden_size // config.num_attention_heads

    def tapped(site, value):
        changed = tap(site, value)
        return value if changed is None else changed

    def on_input(module, site, split_heads=False):
        def hook(_, args):
            shape = args[0].shape
            seen = args[0].unflatten(-1, (-1, head_dim)) if split_heads else args[0]
            return (tapped(site, seen).reshape(shape), *args[1:])

        handles.append(module.register_forward_pre_hook(hook))

    def on_output(module, site, pattern=None):
        def hook(_, args, output):
            if pattern:
                tap(pattern, output[1])  # read only: the mixed values have been made from it already
                return (tapped(site, output[0]), *output[1:])
            return tapped(site, output)

        handles.append(module.register_forward_hook(hook))

    def on_fused(module, layer):
        def hook(_, args, output):
            # The query, key and value of one head stand side by side, then those of the next.
            parts = output.unflatten(-1, (-1, 3, head_dim)).unbind(-2)
            return torch.stack(
                [tapped(f"attn_{part}.{layer}", value) for part, value in zip("qkv", parts, strict=True)], -2
            ).flatten(-3)

        handles.append(module.register_forward_hook(hook))

    for i, layer in enumerate(model.gpt_neox.layers):
        on_input(layer, f"resid_pre.{i}")
        on_fused(layer.attention.query_key_value, i)
        on_input(layer.attention.dense, f"attn_z.{i}", split_heads=True)
        on_output(layer.attention, f"attn_out.{i}", pattern=f"attn_pattern.{i}")
        if not config.use_parallel_residual:
            on_input(layer.post_attention_layernorm, f"resid_mid.{i}")
        on_input(layer.mlp, f"mlp_in.{i}")
        on_input(layer.mlp.dense_4h_to_h, f"mlp_hidden.{i}")
        on_output(layer.mlp, f"mlp_out.{i}")
        on_output(layer, f"resid_post.{i}")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def torch_values(model, tokens: np.ndarray, edit=None) -> dict[str, np.ndarray]:
    """The value at every site and the "logits" of a pass. `edit(site, tensor)` may return another tensor to go on with.

    Where an edit of a sequential model's resid_mid is given, only the MLP's branch sees it: no hook reaches the sum.
    """
    import torch

    found = {}

    def tap(site, value):
        changed = edit(site, value) if edit else None
        found[site] = (value if changed is None else changed).numpy().copy()
        return changed

    with torch.no_grad(), torch_taps(model, tap):
        found["logits"] = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    return found


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, tiny in MODELS.items():
        golden = {"fingerprint": np.array(fingerprint(tiny))}
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), tiny.config, random_tensors(tiny.config))
            for dtype in DTYPES:
                found = torch_values(torch_model(Path(folder), dtype), random_tokens(tiny))
                if set(found) != {*sites(tiny.config), "logits"}:
                    raise ValueError(f"{name}: hooks missed {set(sites(tiny.config)) - set(found)}")
                golden |= {f"{dtype} {site}": value for site, value in found.items()}
        np.savez_compressed(FOLDER / f"{name}.npz", **golden)
        print(f"{name}: {len(golden)} arrays, {(FOLDER / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
