"""A tiny model folder and a tiny text, so that whole experiments run in seconds."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparse_jax.lm.embedded import MODELS
from sparse_jax.lm.families.gpt_neox import read_config, weights
from sparse_jax.lm.weight_map import leaves

CONFIG = {
    "model_type": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
    "rotary_pct": 0.25,
}


def write_model(folder, seed=0, poison=None):
    """A random model in Hugging Face's layout with the embedded model's tokenizer; `poison` sets a weight to NaN."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS["novel-neox"] / name, folder / name)
    config, rng, tensors = read_config(CONFIG), np.random.default_rng(seed), {}
    for path, weight in leaves(weights(config)):
        for layer in range(config.n_layers) if path[0] == "blocks" else (None,):
            draw = rng.normal(size=weight.shape).astype(np.float32)
            tensors[weight.source.format(layer=layer)] = draw if path[-1] == "tokens" else 0.3 * draw
    if poison:
        tensors[poison][...] = np.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """30 documents of random words, about 30,000 tokens."""
    words = np.array("the cat and dog ran over a hill while rain fell on old stones near our house".split())
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(words, 800)) for _ in range(30)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("<|endoftext|>".join(documents))
    return path


@pytest.fixture(scope="session")
def autoencoder(model, text, tmp_path_factory):
    """The run folder of a small l1 dictionary of the tiny model's first layer."""
    return trained(model, text, tmp_path_factory.mktemp("runs") / "autoencoder", "resid_post.0")


@pytest.fixture(scope="session")
def later(model, text, tmp_path_factory):
    """The same of its second layer."""
    return trained(model, text, tmp_path_factory.mktemp("runs") / "later", "resid_post.1")


def trained(model, text, out, site):
    from experiments import train_sae
    from tests.experiments.test_train_sae import flags

    assert train_sae.main(flags(model, text, out, tokens=4096, site=site)) == 0
    return out


def connected_sites(model, text, out, sites):
    """A run folder as a sweep leaves it, with a TopK dictionary at its starting weights of each site."""
    import jax

    from experiments.data import blocks_at, load_data
    from experiments.reading import DataFlags
    from sparse_jax.activations import collect_statistics, fit_normaliser
    from sparse_jax.dictionaries import Normalised, TopK, save

    given = {"model": str(model), "text": str(text), "context": 32, "holdout": 0.2, "bos": "none"}
    for data in load_data(DataFlags(**given, compute_dtype="float32", eval_tokens=4096, tokens=4096), *sites):
        statistics = collect_statistics(blocks_at(data, 0), 1)
        dictionary = TopK(expansion=2, k=4).sized(data.width)
        normaliser = fit_normaliser("centre-scale", statistics.mean, statistics.variance)
        coder = Normalised(dictionary, dictionary.init(jax.random.key(len(str(data.site)))), normaliser)
        folder = out / "dictionaries" / str(data.site)
        save(folder / "k-4", coder, {**data.identity(), "max_norm": None, "seed": 0})
        statistics.save(folder / "statistics.npz")
    return out
