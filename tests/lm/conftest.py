"""Tiny GPT-NeoX models for the tests of `sparse_jax.lm`."""

import importlib.util
from pathlib import Path

import jax
import pytest

from sparse_jax.lm import load


@pytest.fixture(scope="session")
def reference():
    """The module `make_golden.py` beside this file: tiny models, and transformers' activations where torch is there."""
    spec = importlib.util.spec_from_file_location("make_golden", Path(__file__).with_name("make_golden.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_folder(reference, tmp_path):
    """Name of a tiny model -> a fresh folder with its `config.json` and `model.safetensors`."""

    def write(name, **changes):
        config = reference.MODELS[name].config | changes
        return reference.write_model(tmp_path / name, config, reference.random_tensors(config))

    return write


@pytest.fixture(scope="session")
def loaded(reference, tmp_path_factory):
    """(name of a tiny model, dtype) -> the loaded model, the same object at every call."""
    models = {}

    def get(name, dtype="float32"):
        if (name, dtype) not in models:
            config = reference.MODELS[name].config
            folder = reference.write_model(tmp_path_factory.mktemp(name), config, reference.random_tensors(config))
            with jax.enable_x64(dtype == "float64"):
                models[name, dtype] = load(folder, dtype=dtype)
        return models[name, dtype]

    return get
