"""Iterative hard thresholding: by hand, a plain loop, the objective never rises, recovery, odd atoms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding.iterative_hard_thresholding import iterative_hard_thresholding
from sparse_jax.coding.lasso import spectral_bound
from sparse_jax.errors import InputError
from tests.coding.pursuits import ROWS, D, problem

threshold = jax.jit(iterative_hard_thresholding, static_argnames=("k", "iterations", "signed", "adaptive"))


def value(x, W, codes):
    """`[rows]`."""
    return np.sum(np.square(np.asarray(x) - np.asarray(codes) @ np.asarray(W)), axis=1)


def kept(codes, k):
    least = np.sort(np.abs(codes))[-k] if k < len(codes) else 0
    return np.where(np.abs(codes) >= least, codes, 0)


def test_by_hand():
    """Orthogonal atoms of length 2: the safe step is 1/4 (to the bound's few percent), the best one reaches the end."""
    W, x = 2 * jnp.eye(3), jnp.array([[4.0, -6.0, 1.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(threshold(x, W, 1, 1, signed=True), [[0, -3, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(threshold(x, W, 1, 1), [[2, 0, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(threshold(x, W, 2, 1), [[2, 0, 0.5], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(threshold(x, W, 2, 1, adaptive=False), [[2, 0, 0.5], [0, 0, 0]], rtol=0.03)
    np.testing.assert_allclose(threshold(x, W, 9, 1, signed=True), [[2, -3, 0.5], [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_safe_step_equals_a_plain_loop(x64, signed):
    x, W = problem(0)
    codes = threshold(x, W, 4, 20, signed=signed, adaptive=False)
    step, W = 1 / float(jax.jit(spectral_bound)(W)), np.asarray(W)
    for row in range(ROWS):
        c = np.zeros(len(W))
        for _ in range(20):
            c = c + step * (np.asarray(x[row]) - c @ W) @ W.T
            c = kept(c if signed else np.maximum(c, 0), 4)
        np.testing.assert_allclose(codes[row], c, atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_objective_never_rises(x64, signed, adaptive, dtype):
    x, W = (np.asarray(a, dtype) for a in problem(1))
    W = W + W.mean(0) + 0.3  # coherent
    codes = threshold(jnp.array(x), jnp.array(W), 4, 0, signed=signed, adaptive=adaptive)
    before = value(x, W, codes)
    for _ in range(60):
        codes = threshold(jnp.array(x), jnp.array(W), 4, 1, signed=signed, adaptive=adaptive, start=codes)
        assert codes.dtype == dtype
        assert np.max(np.count_nonzero(codes, axis=1)) <= 4
        assert signed or np.min(codes) >= 0
        after = value(x, W, codes)
        assert np.all(after <= before * (1 + 20 * np.finfo(dtype).eps))
        before = after
    assert np.all(after <= np.sum(np.square(x), axis=1))


def test_adaptive_steps_find_what_made_x(x64):
    """Few active features of not many: recovered exactly, in a time in which safe steps are far from it."""
    generator = np.random.default_rng(2)
    W = np.linalg.qr(generator.normal(size=(40, 40)))[0][:, :30]
    codes = np.zeros((ROWS, 40))
    for row in codes:
        row[generator.permutation(40)[:2]] = generator.uniform(1, 2, size=2)
    x, W = jnp.array(codes @ W), jnp.array(W * generator.uniform(0.9, 1.1, size=(40, 1)))
    exact = np.mean(value(x, W, threshold(x, W, 2, 60)) < 1e-12)
    assert exact > 0.85
    assert np.mean(value(x, W, threshold(x, W, 2, 10))) < np.mean(value(x, W, threshold(x, W, 2, 10, adaptive=False)))


def test_start_is_cut_to_k_and_to_what_is_admissible(x64):
    x, W = problem(3)
    start = jnp.tile(jnp.array([3.0, -4.0, 1.0, 2.0] + [0.0] * 36), (ROWS, 1))
    for signed, expected in ((True, [3, -4, 0, 0]), (False, [3, 0, 0, 2])):
        np.testing.assert_array_equal(threshold(x, W, 2, 0, start=start, signed=signed)[:, :4], [expected] * ROWS)
    ten = threshold(x, W, 4, 10)
    np.testing.assert_allclose(threshold(x, W, 4, 20), threshold(x, W, 4, 10, start=ten), atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_odd_atoms_and_rows(x64, signed):
    x, W = (np.array(a) for a in problem(4, n=5))
    W[1], W[3], x[0] = 0, W[2], 0
    codes = threshold(jnp.array(x), jnp.array(W), 9, 200, signed=signed)
    assert np.all(np.isfinite(codes))
    assert not np.any(codes[0])
    assert not np.any(codes[:, 1])
    products = (x - np.asarray(codes) @ W) @ W.T
    assert np.max(np.abs(products) if signed else products) < 1e-6  # k above n: least squares
    assert not np.any(threshold(jnp.array(x), jnp.zeros_like(W), 9, 3, signed=signed))


def test_orthonormal_atoms(x64):
    x, _ = problem(5)
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    products = np.asarray(x) @ Q.T
    expected = np.stack([kept(row, 4) for row in products])
    np.testing.assert_allclose(threshold(x, jnp.array(Q), 4, 3, signed=True), expected, atol=1e-12)


def test_compiles_once(x64):
    traced = []

    @jax.jit
    def codes(x, W):
        traced.append(1)
        return iterative_hard_thresholding(x, W, 3, 5)

    for seed in range(3):
        codes(*problem(seed))
    assert len(traced) == 1


def test_refusals():
    x, W = problem(0)
    with pytest.raises(InputError, match="k 0: give 1"):
        iterative_hard_thresholding(x, W, 0, 1)
    with pytest.raises(InputError, match="iterations -1"):
        iterative_hard_thresholding(x, W, 1, -1)
    with pytest.raises(InputError, match="start of shape"):
        iterative_hard_thresholding(x, W, 1, 1, start=x)
