"""Weights from safetensors, without torch: read, checked by name and shape, stacked by layer."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sparse_jax.errors import InputError
from sparse_jax.lm.family import Family, Weight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those that the index names, or the single one.

    Raises:
        InputError: there is none; the index names a file that is missing; there are only pickled weights.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / INDEX} is not a safetensors index: {error}") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise InputError(f"{folder} lacks {', '.join(missing)}, which its {INDEX} names; download it whole")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if pickled := [name for name in PICKLES if (folder / name).is_file()]:
        raise InputError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when loaded; "
            "convert them with transformers' save_pretrained, or give a revision that has safetensors"
        )
    raise InputError(f"{folder} has no weights: expected {SINGLE} or {INDEX}")


class TensorReader:
    """The tensors of several safetensors files under one roof, read one at a time.

    Raises:
        InputError: a file is truncated or is no safetensors file.
    """

    def __init__(self, files: list[Path]):
        self._where = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} cannot be read as safetensors ({error}); it may be cut short") from error
            self._where |= dict.fromkeys(handle.keys(), handle)

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def __call__(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)


def leaves(tree: dict, path: tuple[str, ...] = ()):
    """(path, Weight) of a nested dict of weights."""
    for key, value in tree.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def check_tensors(wanted: dict, n_layers: int, reader: TensorReader, ignored: tuple[str, ...], where: str) -> None:
    """Compare the checkpoint with what the port needs.

    Raises:
        InputError: naming every tensor that is missing, of another shape, or not known, with both shapes.
    """
    expected = {}
    for path, weight in leaves(wanted):
        layers = range(n_layers) if path[0] == "blocks" else (None,)
        expected |= {weight.source.format(layer=layer): weight.shape for layer in layers}
    names = reader.names
    faults = [f"{name}: missing, expected {list(shape)}" for name, shape in expected.items() if name not in names]
    faults += [
        f"{name}: expected {list(shape)}, found {list(reader.shape(name))}"
        for name, shape in expected.items()
        if name in names and reader.shape(name) != shape
    ]
    unknown = [n for n in sorted(names - set(expected)) if not any(re.search(pattern, n) for pattern in ignored)]
    faults += [f"{name}: not part of this architecture, found {list(reader.shape(name))}" for name in unknown]
    if faults:
        shown = "; ".join(faults[:12]) + (f"; and {len(faults) - 12} more" if len(faults) > 12 else "")
        raise InputError(f"the weights in {where} do not fit config.json ({len(faults)} tensors): {shown}")


def read_params(family: Family, config, folder: Path, dtype) -> dict:
    """The port's parameters from a model folder, block parameters stacked `[layer, ...]`, as jax arrays of `dtype`.

    Raises:
        InputError: no or damaged files; tensors missing, of wrong shape, or unknown.
    """
    reader = TensorReader(weight_files(folder))
    wanted = family.weights(config)
    # Some exports leave a tied unembedding in the file as a second copy.
    ignored = (*family.ignored, r"^(embed_out|lm_head)\.weight$") if config.tied_embeddings else family.ignored
    check_tensors(wanted, config.n_layers, reader, ignored, str(folder))

    def load(path: tuple[str, ...], weight: Weight) -> jnp.ndarray:
        def one(layer) -> np.ndarray:
            return weight.convert(reader(weight.source.format(layer=layer))).astype(dtype)

        if path[0] == "blocks":
            return jnp.array(np.stack([one(layer) for layer in range(config.n_layers)]))
        return jnp.array(np.ascontiguousarray(one(None)))

    return _map_leaves(load, wanted)


def _map_leaves(fn: Callable, tree: dict, path: tuple[str, ...] = ()) -> dict:
    return {
        key: _map_leaves(fn, value, (*path, key)) if isinstance(value, dict) else fn((*path, key), value)
        for key, value in tree.items()
    }
