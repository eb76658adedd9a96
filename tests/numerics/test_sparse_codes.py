"""Sparse codes: decoding and its gradients equal the dense product's, empty slots are nothing, ties, the choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.numerics.sparse_codes import (
    SparseCodes,
    decode,
    dense,
    feature_sums,
    row_gradient,
    sparse_is_faster,
    top_k_codes,
    value_gradient,
)

ROWS, N, D, SLOTS = 7, 11, 5, 3


def normal(seed, *shape):
    return jnp.array(np.random.default_rng(seed).normal(size=shape))


@pytest.fixture
def codes(x64):
    """Float64; the second row has one feature, its empty slots point at that same one; the third row has none."""
    generator = np.random.default_rng(0)
    indices = np.stack([generator.choice(N, SLOTS, replace=False) for _ in range(ROWS)]).astype(np.int32)
    values = generator.normal(size=(ROWS, SLOTS))
    values[1, 1:], indices[1] = 0, 4
    values[2] = 0
    return SparseCodes(jnp.array(values), jnp.array(indices))


def test_by_hand():
    codes = SparseCodes(jnp.array([[2.0, 3.0], [0.0, 5.0]]), jnp.array([[1, 0], [1, 1]]))
    W = jnp.array([[1.0, 10.0], [0.5, -1.0], [100.0, 100.0]])
    np.testing.assert_array_equal(dense(codes, 3), [[3, 2, 0], [0, 5, 0]])
    np.testing.assert_array_equal(decode(codes, W), [[4, 28], [2.5, -5]])
    np.testing.assert_array_equal(feature_sums(codes, 3), [3, 7, 0])


def test_equal_to_the_dense_product(codes):
    W, g = normal(1, N, D), normal(2, ROWS, D)
    rows = dense(codes, N)
    assert np.count_nonzero(rows) == SLOTS * (ROWS - 2) + 1
    np.testing.assert_allclose(decode(codes, W), rows @ W, atol=1e-14)
    np.testing.assert_allclose(row_gradient(codes, g, N), rows.T @ g, atol=1e-14)
    expected = np.take_along_axis(np.asarray(g @ W.T), np.asarray(codes.indices), 1)
    np.testing.assert_allclose(value_gradient(codes, W, g), expected, atol=1e-14)
    np.testing.assert_allclose(feature_sums(codes, N), rows.sum(0), atol=1e-14)


def test_gradients_of_decode_are_those_of_the_dense_product(codes):
    W, g = normal(1, N, D), normal(2, ROWS, D)

    def objective(form):
        return lambda values, W: jnp.sum(form(SparseCodes(values, codes.indices), W) ** 2 * g)

    made = jax.jit(jax.grad(objective(decode), argnums=(0, 1)))(codes.values, W)
    expected = jax.grad(objective(lambda codes, W: dense(codes, N) @ W), argnums=(0, 1))(codes.values, W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), made, expected)
    assert np.any(made[1])


def test_the_largest_of_each_row_ties_to_the_lower_index():
    values = jnp.array([[0.0, 3, 1, 3, 2], [0, 0, 0, 1, 0]])
    codes = top_k_codes(values, 3)
    np.testing.assert_array_equal(codes.values, [[3, 3, 2], [1, 0, 0]])
    np.testing.assert_array_equal(codes.indices, [[1, 3, 4], [3, 0, 1]])
    assert codes.indices.dtype == jnp.int32


def test_fewer_than_the_bound_compiles_nothing_new():
    values, traced = jnp.abs(jnp.array(normal(3, ROWS, N), jnp.float32)), []

    @jax.jit
    def active(values, k_now):
        traced.append(1)
        return dense(top_k_codes(values, SLOTS, k_now), N)

    for k in range(SLOTS + 1):
        expected = np.where(np.argsort(np.argsort(-values, 1), 1) < k, values, 0)
        np.testing.assert_array_equal(active(values, jnp.int32(k)), expected)
    assert len(traced) == 1


def test_the_choice_is_static_and_by_size():
    assert sparse_is_faster(16384, 32)
    assert not sparse_is_faster(2048, 32)
