"""Products with codes in every form, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors import sparse_product
from sparse_jax.connectors.sparse_product import CHUNK, as_dense, times, transposed_times, two_way
from sparse_jax.numerics.sparse_codes import SparseCodes
from tests.connectors.small_pairs import forms, random_codes

N, D = 60, 5


@pytest.fixture(params=["dense", "sparse", "two-way"])
def form(request):
    return request.param


@pytest.mark.parametrize("slots", [1, 6, 11])
def test_products_are_those_of_dense_codes(form, slots):
    rng = np.random.default_rng(slots)
    codes = random_codes(rng, 70, N, slots)
    x = np.zeros((70, N))
    np.add.at(x, (np.arange(70)[:, None], codes.indices), codes.values)
    W, g = (jnp.array(rng.normal(size=(m, D)), jnp.float32) for m in (N, 70))
    given = jax.tree.map(jnp.array, forms(codes, N)[form])
    np.testing.assert_allclose(as_dense(given, N), x, rtol=1e-6)
    y, pull = jax.vjp(lambda W: times(given, W), W)
    np.testing.assert_allclose(y, x @ W, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull(g)[0], x.T @ g, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(transposed_times(given, g, N), x.T @ g, rtol=1e-5, atol=1e-5)


def test_sparse_codes_have_a_gradient_too():
    rng = np.random.default_rng(0)
    codes = random_codes(rng, 20, N, 6, empty=0)
    W = jnp.array(rng.normal(size=(N, D)), jnp.float32)
    assert sparse_product.gather_is_faster(N, 6)
    by_values = jax.grad(lambda v: jnp.sum(times(SparseCodes(v, codes.indices), W) ** 2))(jnp.array(codes.values))
    by_x = jax.grad(lambda x: jnp.sum((x @ W) ** 2))(as_dense(codes, N))
    np.testing.assert_allclose(by_values, np.take_along_axis(np.array(by_x), codes.indices, 1), rtol=1e-4)


def test_a_feature_that_always_fires_takes_many_chunks():
    rows = 5 * CHUNK + 3
    codes = SparseCodes(np.ones((rows, 2), np.float32), np.tile(np.array([[3, 7]], np.int32), (rows, 1)))
    chunks = two_way(codes, N).chunks
    used = chunks.feature < N
    assert sorted(chunks.feature[used]) == [3] * 6 + [7] * 6
    assert chunks.values[used].sum() == 2 * rows
    # Shapes are those of any other batch.
    other = two_way(random_codes(np.random.default_rng(0), rows, N, 2), N).chunks
    assert jax.tree.map(np.shape, other) == jax.tree.map(np.shape, chunks)


def test_more_features_than_16_bits_number():
    codes = SparseCodes(np.array([[1.0, 2.0]], np.float32), np.array([[70_000, 5]], np.int32))
    chunks = two_way(codes, 70_001).chunks
    assert chunks.feature[0] == 5
    assert chunks.feature[1] == 70_000
