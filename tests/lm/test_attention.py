"""Attention in blocks of queries equals attention with its whole pattern, and both equal NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.lm.attention import QUERY_BLOCK, causal_attention
from sparse_jax.lm.tap import NO_TAP, Tap

WHOLE = Tap(watched=frozenset({"attn_pattern"}))
LENGTHS = [1, 7, QUERY_BLOCK, QUERY_BLOCK + 1, 3 * QUERY_BLOCK - 5]


def draw(length, dtype=jnp.float32):
    return [jax.random.normal(jax.random.key(i), (2, length, 3, 8), jnp.float32).astype(dtype) for i in range(3)]


def numpy_attention(q, k, v, scale):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) * scale
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tap", [NO_TAP, WHOLE])
def test_attention_equals_numpy(length, tap):
    q, k, v = draw(length)
    np.testing.assert_allclose(
        causal_attention(3 * q, k, v, 0.7, tap), numpy_attention(3 * q, k, v, 0.7), rtol=2e-5, atol=2e-6
    )


def test_large_scores_do_not_overflow():
    q, k, v = draw(200)
    assert np.isfinite(causal_attention(1e3 * q, 1e3 * k, v, 1.0, NO_TAP)).all()


def test_gradients_of_both_forms_are_equal():
    q, k, v = draw(QUERY_BLOCK + 9)

    def loss(tap):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(causal_attention(*a, 0.5, tap))), argnums=(0, 1, 2))(q, k, v)

    for a, b in zip(loss(NO_TAP), loss(WHOLE)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_answers_in_bfloat16():
    q, k, v = draw(150, jnp.bfloat16)
    for tap in (NO_TAP, WHOLE):
        z = causal_attention(q, k, v, 0.3, tap)
        assert z.dtype == jnp.bfloat16
        np.testing.assert_allclose(z.astype(jnp.float32), numpy_attention(q, k, v, 0.3), atol=0.03)


def test_the_pattern_that_the_tap_returns_is_the_one_that_is_used():
    q, k, v = draw(5)
    first = Tap(lambda name, value: jnp.zeros_like(value).at[..., 0].set(1), frozenset({"attn_pattern"}))
    np.testing.assert_allclose(causal_attention(q, k, v, 1.0, first), np.broadcast_to(v[:, :1], v.shape))
