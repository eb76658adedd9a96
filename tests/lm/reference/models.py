"""The tiny models of all families: their weights, their batches, their folders on disk. Needs no torch."""

import hashlib
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors.numpy import save_file

from tests.lm.reference import gpt2, gpt_neox, llama
from tests.lm.reference.tiny import Tiny

FAMILIES: dict[str, ModuleType] = {"gpt_neox": gpt_neox, "gpt2": gpt2, "llama": llama}
MODELS: dict[str, Tiny] = {name: tiny for family in FAMILIES.values() for name, tiny in family.MODELS.items()}


def family_of(config: dict) -> ModuleType:
    """The module that knows a config's family."""
    return FAMILIES["llama" if config["model_type"] in llama.ARCHITECTURES else config["model_type"]]


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights with nothing at its default: biases far from zero, norms' scales far from one. And the buffers.

    Uniform draws of the frozen legacy generator: the same bits with every NumPy and on every machine.
    """
    random, made = np.random.RandomState(seed), {}
    for name, (shape, inputs, norm) in family_of(config).tensors(config).items():
        draw = random.random_sample(shape) * 2 - 1
        if inputs:
            draw = draw * math.sqrt(6 / inputs)
        if norm:
            draw = 1 + draw / 2
        made[name] = draw.astype(np.float32)
    return made | family_of(config).buffers(config)


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
    family = family_of(config)
    return [f"{name}.{layer}" for layer in range(family.n_layers(config)) for name in family.site_names(config)]


def relative_error(ours, theirs) -> float:
    """max |ours - theirs| / max |theirs| (or / 1 where theirs is all zeros), in float64; infinite for another shape."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0))


def errors_at(out, theirs: dict) -> dict[str, float]:
    """Site or "logits" -> relative error of what `sparse_jax.lm.forward` gave."""
    errors = {site: relative_error(value, theirs[site]) for site, value in out.captured.items()}
    return errors | {"logits": relative_error(out.logits, theirs["logits"])}
