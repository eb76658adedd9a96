"""Gradient pursuit: by hand, against a plain loop, between the other two pursuits, odd atoms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding.gradient_pursuit import gradient_pursuit
from sparse_jax.coding.matching_pursuit import matching_pursuit
from sparse_jax.coding.orthogonal_matching_pursuit import orthogonal_matching_pursuit
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import dense
from tests.coding.pursuits import ROWS, D, N, active, check_orthonormal_atoms, left_of, problem

pursue = jax.jit(gradient_pursuit, static_argnames=("k", "signed"))


def plain(x, W, k, signed):
    """(dense codes, atoms that were chosen) of one row; atoms of norm 1 inside."""
    x, W = np.asarray(x), np.asarray(W)
    lengths = np.linalg.norm(W, axis=1)
    U = W / lengths[:, None]
    codes, chosen, left = np.zeros(len(W)), np.zeros(len(W), bool), x
    for _ in range(k):
        scores = U @ left
        j = np.argmax(np.abs(scores) if signed else scores)
        chosen[j] |= signed or scores[j] > 0
        g = np.where(chosen, scores, 0)
        if not signed:
            g[(codes == 0) & (g < 0)] = 0
        v = g @ U
        step = left @ v / max(v @ v, 1e-300)
        if not signed and np.any(g < 0):
            step = min(step, np.min(codes[g < 0] / -g[g < 0]))
        codes = codes + step * g
        codes[np.abs(codes) < 1e-14] = 0
        left = x - codes @ U
    return codes / lengths, chosen


def test_by_hand():
    W = jnp.array([[2.0, 0.0], [0.6, 0.8]])
    x = jnp.array([[4.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(dense(pursue(x, W, 1), 2), [[2, 0], [0, 0]])
    # What is left is (0, 1): the gradient is 0 and 0.8, so the step is matching pursuit's.
    np.testing.assert_allclose(dense(pursue(x, W, 2), 2), [[2, 0.8], [0, 0]], atol=1e-6)
    # Then (-0.48, 0.36), g = (-0.48, 0), v = (-0.48, 0), a = 1.
    np.testing.assert_allclose(dense(pursue(x, W, 3), 2), [[1.76, 0.8], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("k", [1, 12])
@pytest.mark.parametrize("signed", [True, False])
def test_equals_a_plain_loop(x64, k, signed):
    x, W = problem(0, n=20)
    codes, used_up = pursue(x, W, k, signed=signed), 0
    assert codes.values.shape == codes.indices.shape == (ROWS, k)
    assert codes.indices.dtype == jnp.int32
    for row in range(ROWS):
        used = active(codes, row)
        assert len(used) == len(set(used))
        expected, chosen = plain(x[row], W, k, signed)
        np.testing.assert_allclose(dense(codes, 20)[row], expected, atol=1e-11)
        used_up += np.count_nonzero(chosen) > len(used)
    if not signed:
        assert np.min(codes.values) >= 0
    # A code that fell to 0 ended its step, and is 0 exactly.
    assert (used_up > 0) == (k > 1 and not signed)


def test_orthonormal_atoms(x64):
    """The k largest products."""
    check_orthonormal_atoms(pursue)


@pytest.mark.parametrize("signed", [True, False])
def test_falls_with_k_and_lies_between_the_other_pursuits(x64, signed):
    x, W = problem(2)
    before = np.sum(np.square(x), axis=1)
    for k in (1, 4, 12):
        after = left_of(x, pursue(x, W, k, signed=signed), W)
        assert np.all(after < before)
        before = after
    greedy, best = (
        np.mean(left_of(x, jax.jit(f, static_argnames=("k", "signed"))(x, W, k=12, signed=signed), W))
        for f in (matching_pursuit, orthogonal_matching_pursuit)
    )
    assert best < np.mean(after) < greedy


@pytest.mark.parametrize("signed", [True, False])
def test_odd_atoms_and_rows(x64, signed):
    """Zero and repeated atoms, fewer atoms than steps, a row of zeros, one that no atom has a part in."""
    x, W = problem(3, n=5)
    x, W = np.array(x), np.array(W)
    W[1], W[3] = 0, W[2]
    W[:, -1] = 0
    x[0], x[1] = 0, np.eye(D)[-1]
    codes = pursue(jnp.array(x), jnp.array(W), 12, signed=signed)
    assert np.all(np.isfinite(codes.values))
    assert not np.any(codes.values[:2])
    for row in range(2, ROWS):
        assert 1 not in active(codes, row)
    np.testing.assert_array_equal(pursue(jnp.array(x), jnp.zeros_like(W), 12, signed=signed).values, 0)


@pytest.mark.parametrize("signed", [True, False])
def test_derivative(x64, signed):
    x, W = problem(4)
    weight = jnp.array(np.random.default_rng(0).normal(size=(ROWS, N)))
    total = jax.jit(lambda x, W: jnp.sum(weight * dense(gradient_pursuit(x, W, 4, signed=signed), N)))
    gradients = jax.jit(jax.grad(total, (0, 1)))(x, W)
    generator, small = np.random.default_rng(1), 1e-7
    along = [generator.normal(size=a.shape) for a in (x, W)]
    up, down = (total(*(jnp.array(a + s * b) for a, b in zip((x, W), along))) for s in (small, -small))
    expected = sum(np.sum(np.asarray(g) * b) for g, b in zip(gradients, along))
    np.testing.assert_allclose((up - down) / (2 * small), expected, rtol=1e-5)


def test_float32_and_compiles_once():
    traced = []

    @jax.jit
    def codes(x, W):
        traced.append(1)
        return gradient_pursuit(x, W, 3)

    for seed in range(3):
        x, W = (jnp.array(a, jnp.float32) for a in problem(seed))
        made = codes(x, W)
        assert made.values.dtype == jnp.float32
        assert np.all(left_of(x, made, W) < np.sum(np.square(x), axis=1))
    assert len(traced) == 1


def test_refusals():
    x, W = problem(0)
    with pytest.raises(InputError, match="k 0: give 1"):
        gradient_pursuit(x, W, 0)
    with pytest.raises(InputError, match=r"give x \[rows, d\]"):
        gradient_pursuit(x[:, 1:], W, 2)
