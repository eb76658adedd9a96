"""Find a language model (embedded, local folder, or hub) and load it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparse_jax.errors import InputError
from sparse_jax.lm import families  # noqa: F401  registers the families
from sparse_jax.lm.embedded import MODELS
from sparse_jax.lm.family import family_of
from sparse_jax.lm.hub import fetch
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.sharding import MeshAxes
from sparse_jax.lm.weight_map import Axis, leaves
from sparse_jax.lm.weights import read_params

DTYPES = ("float32", "bfloat16", "float16", "float64")

_FETCHED: dict[tuple[str, str | None], Path] = {}


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of a model: an embedded name, an existing directory, or a hub id (fetched to the hub's cache).

    Raises:
        InputError: none of the three; a revision given for something that has none; the hub cannot be reached.
    """
    local = MODELS.get(model) or (Path(model) if Path(model).is_dir() else None)
    if local is not None:
        if revision is not None:
            raise InputError(f"--revision {revision!r} is for hub models; {model!r} is local and has no revisions")
        return local
    if Path(model).exists():
        raise InputError(f"model {model!r} is a file; give the folder that holds config.json and the safetensors")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"model folder {model!r} does not exist")
    # Asked once in a process: a branch that moves must not give a tokenizer of one commit and weights of another.
    folder = _FETCHED.get((model, revision))
    if folder is None or not folder.is_dir():
        folder = _FETCHED[model, revision] = fetch(model, revision)
    return folder


def read_config_json(folder: Path) -> dict:
    """`config.json` of a model folder.

    Raises:
        InputError: it is missing or is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; give a model folder in Hugging Face's layout")
    try:
        raw = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} is not a JSON object")
    return raw


def load(
    model: str | os.PathLike = "novel-neox",
    revision: str | None = None,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Mapping[str, MeshAxes] | None = None,
) -> LanguageModel:
    """Load a language model.

    Args:
        model: "novel-neox" (embedded), a folder in Hugging Face's layout, or a hub id such as "EleutherAI/pythia-70m".
        revision: branch, tag or commit on the hub (Pythia's checkpoints: "step1000").
        dtype: compute dtype.
        param_dtype: dtype of the stored parameters; by default float32 for float32 and bfloat16 compute.
        mesh: devices to lay the parameters out over as they are read; None: all on the default device.
        rules: logical axis -> mesh axis, in place of those of `sharding.RULES`.

    Raises:
        InputError: model not found, architecture not supported, damaged or unfitting weights, unknown dtype, a mesh
            that does not fit.
    """
    dtypes = (dtype, param_dtype or ("float64" if dtype == "float64" else "float32"))
    for given in dtypes:
        if given not in DTYPES:
            raise InputError(f"dtype {given!r} is not known; known are {', '.join(DTYPES)}")
        if given == "float64" and not jax.config.jax_enable_x64:
            raise InputError("dtype 'float64' needs jax_enable_x64 (for example JAX_ENABLE_X64=1)")
    folder = resolve(str(model), revision)
    raw = read_config_json(folder)
    family = family_of(raw.get("model_type"))
    if raw.get("quantization_config"):
        raise InputError(
            f"{folder} holds quantised weights (quantization_config in config.json), which are not supported; "
            "give the model in bfloat16, float16 or float32"
        )
    config = family.read_config(raw)
    params = read_params(family, config, folder, jnp.dtype(dtypes[1]), mesh, rules)
    return LanguageModel(params, config, dtype, str(model), revision)


def logical_axes(model: str | os.PathLike, revision: str | None = None) -> set[Axis]:
    """The logical axes of a model's parameters, with their sizes; nothing but config.json is read.

    Raises:
        InputError: the model is not found, or its architecture is not supported.
    """
    raw = read_config_json(resolve(str(model), revision))
    family = family_of(raw.get("model_type"))
    return {axis for _, weight in leaves(family.weights(family.read_config(raw))) for axis in weight.axes}


def random_model(config, key: jax.Array, *, dtype: str = "float32") -> LanguageModel:
    """A model of the same config with random weights: matrices normal with the config's `initializer_range`,
    norms at one, biases at zero, as transformers initialises them. The control for interpretability figures.
    """
    params: dict = {}
    family = family_of(config.model_type)
    for number, (path, weight) in enumerate(leaves(family.weights(config))):
        lead = (config.n_layers,) if path[0] == "blocks" else ()
        parent = params
        for name in path[:-1]:
            parent = parent.setdefault(name, {})
        if path[-1] in ("scale", "bias"):
            fill = jnp.ones if path[-1] == "scale" else jnp.zeros
            drawn = fill((*lead, *weight.shape), jnp.float32)
        else:
            draw = jax.random.normal(jax.random.fold_in(key, number), (*lead, *weight.shape), jnp.float32)
            drawn = config.initializer_range * draw
        parent[path[-1]] = jax.vmap(weight.convert)(drawn) if lead else weight.convert(drawn)
    return LanguageModel(params, config, dtype, f"random {config.model_type}")
