"""Weights from safetensors, without torch: read, checked by name and shape, stacked by layer."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from sparse_jax.errors import InputError
from sparse_jax.lm.family import Family
from sparse_jax.lm.sharding import MeshAxes, merged_rules, parameter_sharding
from sparse_jax.lm.weight_map import Weight, leaves

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# An unembedding of its own, in every family.
HEAD = r"^(embed_out|lm_head)\.weight$"
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

    Names are those of the whole model: where a file was saved without the head, and so without `prefix` before the
    names, it is put there.

    Raises:
        InputError: a file is truncated or is no safetensors file.
    """

    def __init__(self, files: list[Path], prefix: str = ""):
        self._where = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} cannot be read as safetensors ({error}); it may be cut short") from error
            self._where |= {name: (handle, name) for name in handle.keys()}  # noqa: SIM118  no mapping
        if not any(name.startswith(prefix) for name in self._where):
            bare, self._where = self._where, {}
            for name, place in bare.items():
                self._where[name if re.search(HEAD, name) else prefix + name] = place

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        handle, own_name = self._where[name]
        return tuple(handle.get_slice(own_name).get_shape())

    def __call__(self, name: str) -> np.ndarray:
        handle, own_name = self._where[name]
        return handle.get_tensor(own_name)


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


def read_params(
    family: Family, config, folder: Path, dtype, mesh: Mesh | None = None, rules: Mapping[str, MeshAxes] | None = None
) -> dict:
    """The port's parameters from a model folder, block parameters stacked `[layer, ...]`, as jax arrays of `dtype`.

    With a mesh every parameter is laid out over it as it is read (see `sharding.RULES`): a process holds one tensor
    of the files at a time and the parts of one parameter that belong to its devices.

    Raises:
        InputError: no or damaged files; tensors missing, of wrong shape, or unknown; a config that ties the embeddings
            over files where they differ; a mesh that a parameter cannot be divided over.
    """
    wanted = family.weights(config)
    table = None if mesh is None else merged_rules(mesh, rules)

    def sharding(path: tuple[str, ...], weight: Weight) -> jax.sharding.Sharding | None:
        axes = (("layer", config.n_layers), *weight.axes) if path[0] == "blocks" else weight.axes
        if mesh is None:
            return None
        return parameter_sharding(mesh, table, axes, ".".join(path))

    shardings = _map_leaves(sharding, wanted)  # a mesh that does not fit is told before anything is read
    reader = TensorReader(weight_files(folder), family.prefix)
    # Some exports leave a tied unembedding in the file as a second copy.
    ignored = (*family.ignored, HEAD) if config.tied_embeddings else family.ignored
    check_tensors(wanted, config.n_layers, reader, ignored, str(folder))
    if config.tied_embeddings:
        _check_tied(reader, wanted["embed"]["tokens"].source, folder)

    def load(path: tuple[str, ...], weight: Weight) -> jax.Array:
        def one(layer) -> np.ndarray:
            return weight.convert(reader(weight.source.format(layer=layer)))

        at = shardings
        for name in path:
            at = at[name]
        if path[0] == "blocks":
            return _placed((config.n_layers, *weight.port_shape), dtype, at, one, config.n_layers)
        return _placed(weight.port_shape, dtype, at, one, None)

    return _map_leaves(load, wanted)


def _check_tied(reader: TensorReader, embedding: str, folder: Path) -> None:
    for name in reader.names:
        if re.search(HEAD, name) and not np.array_equal(reader(name), reader(embedding)):
            raise InputError(
                f"{folder}: config.json ties the embeddings (tie_word_embeddings), but {name} differs from "
                f"{embedding}; one of the two is wrong, set tie_word_embeddings to false to use {name}"
            )


def _placed(
    shape: tuple[int, ...], dtype, sharding: jax.sharding.Sharding | None, read: Callable, n_layers: int | None
) -> jax.Array:
    """An array filled tensor by tensor, `read(layer)` for each layer or `read(None)`, and laid out as `sharding` says.

    Without a sharding it lies on the default device, not bound to it.
    """
    places = (
        {None: (slice(None),) * len(shape)} if sharding is None else sharding.addressable_devices_indices_map(shape)
    )
    # Devices that hold the same part share its buffer.
    parts = {_key(index): index for index in places.values()}
    sizes = {key: [len(range(*part.indices(n))) for part, n in zip(index, shape)] for key, index in parts.items()}
    buffers = {key: np.empty(size, dtype) for key, size in sizes.items()}
    for layer in (None,) if n_layers is None else range(n_layers):
        tensor = read(layer)
        for key, index in parts.items():
            if layer is None:
                buffers[key][...] = tensor[index]
            elif layer in (held := range(*index[0].indices(n_layers))):
                buffers[key][held.index(layer)] = tensor[index[1:]]
    # The buffers are written no more, so it does no harm where a CPU device keeps them as they are.
    arrays = [jax.device_put(buffers[_key(index)], device) for device, index in places.items()]
    return arrays[0] if sharding is None else jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _key(index: tuple[slice, ...]) -> tuple:
    return tuple((part.start, part.stop) for part in index)


def _map_leaves(fn: Callable, tree: dict, path: tuple[str, ...] = ()) -> dict:
    return {
        key: _map_leaves(fn, value, (*path, key)) if isinstance(value, dict) else fn((*path, key), value)
        for key, value in tree.items()
    }
