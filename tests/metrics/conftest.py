"""A tiny model with random weights, large enough ones that replacing an activation matters."""

import jax
import pytest

from sparse_jax.lm import random_model
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig


@pytest.fixture(scope="session")
def lm():
    config = GPTNeoXConfig(
        n_layers=2,
        d_model=16,
        d_mlp=32,
        n_heads=4,
        vocab_size=40,
        max_positions=16,
        initializer_range=0.4,
    )
    return random_model(config, jax.random.key(0))
