"""Activations around places, against the direct encoding of each row."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.windows import _windows, window_activations
from sparse_jax.lm import forward
from tests.features.planted import CONTEXT, N_FEATURES, SITE, planted


@pytest.fixture(scope="module")
def codes():
    """`[rows, position, features]` of all the text."""
    p = planted()
    tokens = p.rows[np.arange(len(p.rows))].tokens
    x = forward(p.lm, jnp.array(tokens), capture=[SITE]).captured[str(SITE)]
    return np.maximum(np.asarray(p.coder.encode(x.reshape(-1, x.shape[-1]))), 0).reshape(*tokens.shape, -1)


@pytest.mark.parametrize(("before", "after", "batch_rows"), [(14, 6, 8), (3, 0, 16), (40, 40, 3)])
def test_windows_are_the_direct_encoding(codes, before, after, batch_rows):
    p, generator = planted(), np.random.default_rng(0)
    features = generator.integers(0, N_FEATURES, 300)
    # Some rows are asked for often, most never; the places come in no order.
    rows = np.r_[generator.integers(0, 200, 200), np.full(100, 7)]
    positions = generator.integers(0, CONTEXT, 300)
    positions[:4] = 0, 0, CONTEXT - 1, CONTEXT - 1
    found = window_activations(
        p.lm, SITE, p.rows, p.coder, features, rows, positions, before=before, after=after, batch_rows=batch_rows
    )
    expected = np.full((300, before + 1 + after), np.nan, np.float32)
    for i, (feature, row, position) in enumerate(zip(features, rows, positions)):
        for column, at in enumerate(range(position - before, position + after + 1)):
            if 0 <= at < CONTEXT:
                expected[i, column] = codes[row, at, feature]
    assert (expected > 0).sum() > 30
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_programs_are_few():
    p, generator = planted(), np.random.default_rng(0)
    _windows.clear_cache()
    for count in (1, 3, 50, 400, 401, 402):
        rows = generator.integers(0, 200, count)
        window_activations(p.lm, SITE, p.rows, p.coder, rows % N_FEATURES, rows, rows % CONTEXT)
    assert _windows._cache_size() <= 4


def test_no_places_are_no_windows():
    p, none = planted(), np.zeros(0, np.int64)
    assert window_activations(p.lm, SITE, p.rows, p.coder, none, none, none).shape == (0, 21)


def test_what_is_not_there_is_refused():
    p = planted()

    def ask(features, rows, positions):
        window_activations(p.lm, SITE, p.rows, p.coder, *map(np.array, (features, rows, positions)))

    with pytest.raises(InputError, match="features 0 to 80: there are 0 to 79"):
        ask([0, 80], [0, 0], [0, 0])
    with pytest.raises(InputError, match="rows -1 to 0"):
        ask([0, 0], [0, -1], [0, 0])
    with pytest.raises(InputError, match="positions 32 to 32"):
        ask([0], [0], [32])
    with pytest.raises(InputError, match="give one of each"):
        ask([0], [0, 1], [0])
