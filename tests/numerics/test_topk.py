"""The k largest by magnitude against a plain reference."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays

from sparse_jax.numerics import keep_top_k
from sparse_jax.numerics.topk import batch_top_k_mask, spread_top_k, top_k_mask

# Few distinct values, so that ties are common.
VALUES = st.sampled_from([-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0])
compiled = jax.jit(keep_top_k, static_argnums=1)


def reference(x, k):
    kept = np.zeros_like(x)
    for row, out in zip(x, kept):
        for i in sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:k]:
            out[i] = row[i]
    return kept


@pytest.mark.parametrize("k", [0, 1, 3, 7, 8, 20])
@hypothesis.given(x=arrays.arrays(np.float32, (3, 8), elements=VALUES))
@hypothesis.settings(deadline=None, max_examples=40)
def test_equals_a_sort_with_ties_to_the_lower_index(k, x):
    np.testing.assert_array_equal(compiled(x, k), reference(x, k))


def test_ties_by_hand():
    np.testing.assert_array_equal(keep_top_k(jnp.array([[1.0, -2.0, 2.0, -1.0]]), 1), [[0, -2, 0, 0]])
    np.testing.assert_array_equal(keep_top_k(jnp.array([[1.0, -2.0, 2.0, -1.0]]), 3), [[1, -2, 2, 0]])


def test_the_gradient_reaches_only_what_was_kept():
    x = jnp.array([[1.0, -5.0, 3.0], [4.0, 2.0, 0.5]])
    grad = jax.grad(lambda x: jnp.sum(keep_top_k(x, 1) * jnp.array([[10.0, 20.0, 30.0]])))(x)
    np.testing.assert_array_equal(grad, [[0, 20, 0], [10, 0, 0]])


def mask_reference(x, count):
    """Positions of the `count` largest of a vector, ties to the lower index."""
    kept = np.zeros(len(x), bool)
    kept[sorted(range(len(x)), key=lambda i: (-x[i], i))[:count]] = True
    return kept


by_row = jax.jit(top_k_mask, static_argnums=1)
over_the_batch = jax.jit(batch_top_k_mask, static_argnums=1)


@hypothesis.given(x=arrays.arrays(np.float32, (3, 8), elements=VALUES), k_now=st.integers(0, 5))
@hypothesis.settings(deadline=None, max_examples=40)
def test_masks_equal_a_sort_with_ties_to_the_lower_index(x, k_now):
    np.testing.assert_array_equal(by_row(x, 5, k_now), [mask_reference(row, k_now) for row in x])
    np.testing.assert_array_equal(by_row(x, 5), [mask_reference(row, 5) for row in x])
    count = 4 * k_now
    np.testing.assert_array_equal(over_the_batch(x, 20, count), mask_reference(x.ravel(), count).reshape(3, 8))


def test_masks_of_everything():
    x = jnp.array([[1.0, -5.0, 3.0], [4.0, 2.0, 0.5]])
    assert by_row(x, 3).all()
    assert by_row(x, 30).all()
    assert over_the_batch(x, 99, 99).all()
    assert not by_row(x, 3, 0).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_masks_take_other_dtypes(dtype):
    x = jnp.array([[1.0, -5.0, 3.0], [4.0, 2.0, 0.5]], dtype)
    np.testing.assert_array_equal(by_row(x, 1), [[0, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(over_the_batch(x, 2, 2), [[0, 0, 1], [1, 0, 0]])


def test_spread_top_k_finds_the_largest_and_most_of_the_rest():
    generator = np.random.default_rng(0)
    x = jnp.array(generator.normal(size=(50, 512)), jnp.float32)
    made = np.asarray(spread_top_k(x, 16))
    exact = np.asarray(jax.lax.top_k(x, 16)[1])
    assert all(len(set(row)) == 16 for row in made.tolist())
    np.testing.assert_array_equal(made[:, 0], exact[:, 0])
    shared = np.mean([len(set(a) & set(b)) / 16 for a, b in zip(made.tolist(), exact.tolist())])
    assert 0.85 < shared < 1


@pytest.mark.parametrize(("n", "k"), [(10, 3), (100, 30), (100, 100), (513, 16)])
def test_spread_top_k_of_any_size(n, k):
    x = jnp.array(np.random.default_rng(1).permutation(4 * n).reshape(4, n), jnp.float32)
    made = np.asarray(spread_top_k(x, k))
    assert made.shape == (4, k)
    assert made.dtype == np.int32
    assert made.min() >= 0
    assert made.max() < n
    assert all(len(set(row)) == k for row in made.tolist())
    if n < 4 * k:  # exact
        np.testing.assert_array_equal(made, jax.lax.top_k(x, k)[1])
