"""The k largest by magnitude against a plain reference."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as arrays

from sparse_jax.numerics import keep_top_k

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
