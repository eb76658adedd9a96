"""Tiny models of every family, with norms that are not at their start, and dictionaries that fire often on them."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Normalised
from sparse_jax.lm import random_model
from sparse_jax.lm.families.gpt2 import GPT2Config
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.families.llama import LlamaConfig

VOCAB, LAYERS, WIDTH, CONTEXT = 24, 3, 8, 12
_SIZES = {"n_layers": LAYERS, "d_model": WIDTH, "d_mlp": 16, "n_heads": 2, "vocab_size": VOCAB, "max_positions": 40}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**_SIZES, initializer_range=0.6),
    "sequential": GPTNeoXConfig(**_SIZES, initializer_range=0.6, parallel_residual=False),
    "gpt2": GPT2Config(**_SIZES, initializer_range=0.6),
    "llama": LlamaConfig(
        **_SIZES, n_kv_heads=1, head_dim=4, windows=(2**30, 5, 2**30), initializer_range=0.6, tied_embeddings=True
    ),
}


def tiny(name: str, dtype: str = "float32"):
    """The model, its norms' scales and biases drawn at random."""
    generator = np.random.default_rng(4)

    def drawn(path, leaf):
        if path[-1].key in ("scale", "bias"):
            return jnp.array(np.asarray(leaf) + 0.4 * generator.normal(size=leaf.shape), dtype)
        return leaf.astype(dtype)

    lm = _random(name)
    return dataclasses.replace(lm, params=jax.tree_util.tree_map_with_path(drawn, lm.params), dtype=dtype)


@cache
def _random(name):
    return random_model(CONFIGS[name], jax.random.key(3))


def coder(width: int, n_features: int, seed: int, dtype: str = "float32", sparse: float = 1.0, **options) -> Normalised:
    """An L1 dictionary with random weights behind a normaliser; larger `sparse` fires less. The last never fires."""
    dictionary = L1(n_features=n_features, **options).sized(width)
    generator = np.random.default_rng(seed)
    W_dec = generator.normal(size=(n_features, width))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    params = {
        "W_dec": W_dec,
        "b_enc": -sparse * generator.uniform(0.5, 1.5, n_features),
        "b_dec": 0.1 * generator.normal(size=width),
    }
    params["b_enc"][-1] = -1e6
    if not dictionary.tied:
        params["W_enc"] = W_dec.T + 0.3 * generator.normal(size=(width, n_features))
    params = {name: jnp.array(value, dtype) for name, value in params.items()}
    return Normalised(dictionary, params, Normaliser(jnp.full(width, 0.2, dtype), jnp.array(1.5, dtype)))


def text(rows: int, seed: int = 0):
    """(tokens, targets, mask) `[rows, CONTEXT]`: random tokens, masked at the first place and at some others; the
    last row has no next token at its end."""
    generator = np.random.default_rng(seed)
    stream = generator.integers(0, VOCAB, (rows, CONTEXT + 1)).astype(np.int32)
    mask = generator.random((rows, CONTEXT)) < 0.8
    mask[:, 0] = False
    mask[-1, -1] = True
    targets = stream[:, 1:].copy()
    targets[-1, -1] = -1
    return stream[:, :-1].copy(), targets, mask
