"""transformers' PyTorch models with hooks at sites: their own numerics in float32, made float64 throughout in float64.

transformers takes the softmax, the rotary tables and RMSNorm in float32 whatever the model's dtype. In float64 all
three are replaced by their textbook forms in float64; everything else is transformers' own.
"""

import contextlib
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.lm.reference.models import family_of


def torch_model(folder: Path, dtype: str):
    """transformers' model of a folder, with eager attention whose pattern can be tapped."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=TAPPED, output_loading_info=True
    )
    # Some of the buffers that old files hold are strangers to transformers too.
    buffers = family_of(model.config.to_dict()).buffers(json.loads((folder / "config.json").read_text()))
    if wrong := {kind: left for kind, names in report.items() if (left := set(names) - set(buffers))}:
        raise ValueError(f"transformers found other tensors in {folder} than it wants: {wrong}")
    if dtype == "float64":
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.forward = partial(_rotary, model.config)
            elif type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(_rms_norm, module)
    return model.eval()


def _attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """transformers' eager attention step by step, `module.pattern_tap` called between softmax and mixing.

    In float32 it is bit for bit theirs (`test_reference_torch.py`); the one thing left out is that they take the
    softmax in float32 also for a float64 model.
    """
    group = query.shape[1] // key.shape[1]  # query heads that share a key and a value
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if getattr(module, "reorder_and_upcast_attn", False) and query.dtype == torch.float32:
        # GPT-2's way of scaling inside the product, which rounds otherwise.
        q, k = query.flatten(0, 1), key.transpose(2, 3).flatten(0, 1)
        scores = torch.baddbmm(q.new_empty(q.shape[0], q.shape[1], k.shape[2]), q, k, beta=0, alpha=scaling)
        scores = scores.unflatten(0, query.shape[:2])
    else:
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    pattern = torch.softmax(scores + attention_mask, dim=-1)
    if tap := getattr(module, "pattern_tap", None):
        tap(pattern)
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


TAPPED = "eager_tapped"
ALL_ATTENTION_FUNCTIONS.register(TAPPED, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(TAPPED, eager_mask)


def rotary_frequencies(config) -> torch.Tensor:
    """`[dim / 2]` float64 angles per position, with the scaling that the config names."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if rope["rope_type"] == "default":
        return frequencies
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] != "llama3":
        raise ValueError(f"no float64 form here of the rotary scaling {rope}")
    # Llama 3.1: long waves are stretched, short ones stay, those between are mixed by their turns over the old context.
    low, high, turns = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = turns * frequencies / (2 * math.pi)
    stay = ((turns - low) / (high - low)).clamp(0, 1)
    return stay * frequencies + (1 - stay) * frequencies / rope["factor"]


def _rotary(config, x, position_ids):
    angles = position_ids[..., None].double() * rotary_frequencies(config)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rms_norm(module, x):
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


@contextlib.contextmanager
def torch_taps(model, tap):
    """Hooks at every site: `tap(site as text, tensor)` sees each value and may return another to go on with."""
    tapped, handles = [], []

    def write(place, tensor):
        value = place.view(tensor)
        changed = tap(place.site, value)
        if changed is not None:
            value.copy_(changed)  # in place: `value` is a view of what the model goes on with

    def on_input(place):
        return place.module.register_forward_pre_hook(lambda _, args: write(place, args[0]))

    def on_output(place):
        return place.module.register_forward_hook(
            lambda _, args, output: write(place, output[0] if isinstance(output, tuple) else output)
        )

    for place in family_of(model.config.to_dict()).places(model):
        if place.side == "pattern":
            place.module.pattern_tap = partial(write, place)
            tapped.append(place.module)
        else:
            handles.append((on_input if place.side == "input" else on_output)(place))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in tapped:
            del module.pattern_tap


def torch_values(model, tokens: np.ndarray, edit=None) -> dict[str, np.ndarray]:
    """The value at every site and the "logits" of a pass. `edit(site, tensor)` may return another tensor to go on with.

    Like the captures of `sparse_jax.lm.forward`, the values are those after the edit.
    """
    found = {}

    def tap(site, value):
        changed = edit(site, value) if edit else None
        found[site] = (value if changed is None else changed).numpy().copy()
        return changed

    with torch.no_grad(), torch_taps(model, tap):
        found["logits"] = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    return found
