"""A tiny model with random weights and a text of random tokens for it."""

import jax
import numpy as np
import pytest

from sparse_jax.lm import random_model
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.rows import Rows

VOCAB, CONTEXT, N_ROWS, SEPARATOR = 50, 12, 24, 0


@pytest.fixture(scope="session")
def lm():
    config = GPTNeoXConfig(
        n_layers=3,
        d_model=16,
        d_mlp=32,
        n_heads=4,
        vocab_size=VOCAB,
        max_positions=32,
        initializer_range=0.3,
    )
    return random_model(config, jax.random.key(0))


@pytest.fixture(scope="session")
def make_rows():
    """Options of `Rows` -> a text in which about every ninth token is a separator and the last ids never occur."""

    def make(n_rows=N_ROWS, **options):
        generator = np.random.default_rng(0)
        stream = generator.integers(1, VOCAB - 5, n_rows * CONTEXT + 1)
        starts = np.union1d([0], generator.choice(n_rows * CONTEXT, n_rows * CONTEXT // 9, replace=False))
        stream[starts] = SEPARATOR
        choices = {"skip_positions": 1, "masked_ids": (SEPARATOR,), **options}
        return Rows(
            stream=stream.astype(np.uint16),
            document_starts=starts,
            documents=tuple(f"document {i}" for i in range(len(starts))),
            context=CONTEXT,
            bos_id=None,
            fill_id=SEPARATOR,
            n_dropped=0,
            **choices,
        )

    return make


@pytest.fixture(scope="session")
def rows(make_rows):
    return make_rows()
