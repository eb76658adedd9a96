"""Tiny language models for the tests of `sparse_jax.lm`."""

import jax
import pytest

from sparse_jax.lm import load
from tests.lm.reference import models


@pytest.fixture(scope="session")
def reference():
    """The module `reference/models.py`: the tiny models of every family, and what goes into their folders."""
    return models


@pytest.fixture(scope="session")
def torch_reference():
    """The module `reference/torch_models.py`: transformers' PyTorch models of those folders, with hooks at sites."""
    from tests.lm.reference import torch_models

    return torch_models


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
    found = {}

    def get(name, dtype="float32"):
        if (name, dtype) not in found:
            config = reference.MODELS[name].config
            folder = reference.write_model(tmp_path_factory.mktemp(name), config, reference.random_tensors(config))
            with jax.enable_x64(dtype == "float64"):
                found[name, dtype] = load(folder, dtype=dtype)
        return found[name, dtype]

    return get
