"""Matching pursuit: by hand, against a plain loop, repeated choices, starts, odd atoms, the encoder of that name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding.matching_pursuit import matching_pursuit
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes, dense
from tests.coding.pursuits import ROWS, D, N, active, check_orthonormal_atoms, decoded, left_of, problem

pursue = jax.jit(matching_pursuit, static_argnames=("k", "signed"))


def plain(x, W, k, signed, codes=None):
    """One row, dense codes, as the paper says it."""
    x, W = np.asarray(x), np.asarray(W)
    codes = np.zeros(len(W)) if codes is None else np.array(codes)
    left, lengths = x - codes @ W, np.linalg.norm(W, axis=1)
    for _ in range(k):
        scores = np.where(lengths > 0, W @ left / np.maximum(lengths, 1e-300), 0)
        j = np.argmax(np.abs(scores) if signed else scores)
        value = scores[j] / lengths[j] if scores[j] > 0 or signed else 0
        codes[j] += value
        left = left - value * W[j]
    return codes


def test_by_hand():
    W = jnp.array([[2.0, 0.0], [0.6, 0.8]])
    x = jnp.array([[4.0, 1.0], [-4.0, -1.0], [0.0, 0.0], [-1.0, 1.0]])
    # Row 0: w0 takes 2, and w1 0.8 of (0, 1), whose rest (-0.48, 0.36) gives w0 -0.24, or nothing if not signed.
    np.testing.assert_allclose(dense(pursue(x, W, 2), 2), [[2, 0.8], [0, 0], [0, 0], [0, 0.2]], atol=1e-6)
    np.testing.assert_allclose(dense(pursue(x, W, 3), 2), [[2, 0.8], [0, 0], [0, 0], [0, 0.2]], atol=1e-6)
    signed = dense(pursue(x, W, 3, signed=True), 2)
    np.testing.assert_allclose(signed[:3], [[1.76, 0.8], [-1.76, -0.8], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("k", [1, 12])
@pytest.mark.parametrize("signed", [True, False])
def test_equals_a_plain_loop_and_merges(x64, k, signed):
    """Few atoms, so that many are chosen more than once."""
    x, W = problem(0, n=20)
    codes = pursue(x, W, k, signed=signed)
    assert codes.values.shape == codes.indices.shape == (ROWS, k)
    assert codes.indices.dtype == jnp.int32
    for row in range(ROWS):
        used = active(codes, row)
        assert len(used) == len(set(used))
        np.testing.assert_allclose(dense(codes, 20)[row], plain(x[row], W, k, signed), atol=1e-12)
    if k > 1:
        assert np.any(np.count_nonzero(codes.values, axis=1) < k)
    if not signed:
        assert np.min(codes.values) >= 0


def test_orthonormal_atoms(x64):
    """The k largest products; no more than there are."""
    check_orthonormal_atoms(pursue)


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_left_never_grows(x64, signed):
    x, W = problem(2)
    before = np.sum(np.square(x), axis=1)
    for k in (1, 4, 12):
        after = left_of(x, pursue(x, W, k, signed=signed), W)
        assert np.all(after < before)
        before = after


@pytest.mark.parametrize("signed", [True, False])
def test_going_on_from_a_start(x64, signed):
    """Four steps and eight more are twelve."""
    x, W = problem(3, n=20)
    start = pursue(x, W, 4, signed=signed)
    codes = pursue(x, W, 8, signed=signed, start=start)
    assert codes.values.shape == (ROWS, 12)
    expected = pursue(x, W, 12, signed=signed)
    np.testing.assert_allclose(dense(codes, 20), dense(expected, 20), atol=1e-12)
    for row in range(ROWS):
        used = active(codes, row)
        assert len(used) == len(set(used))


def test_a_start_with_empty_slots_and_a_start_that_is_full(x64):
    """An empty slot that points at a feature is not that feature's slot."""
    x, W = problem(4, n=20)
    start = SparseCodes(jnp.tile(jnp.array([0.0, 0.3]), (ROWS, 1)), jnp.tile(jnp.array([7, 7], jnp.int32), (ROWS, 1)))
    codes = pursue(x, W, 8, start=start)
    given = np.zeros(20)
    given[7] = 0.3
    for row in range(ROWS):
        np.testing.assert_allclose(dense(codes, 20)[row], plain(x[row], W, 8, False, given), atol=1e-12)
        assert np.count_nonzero(active(codes, row) == 7) == 1


@pytest.mark.parametrize("signed", [True, False])
def test_odd_atoms_and_rows(x64, signed):
    """Zero and repeated atoms, fewer atoms than steps, a row of zeros, one that no atom has a part in."""
    x, W = problem(5, n=5)
    x, W = np.array(x), np.array(W)
    W[1], W[3] = 0, W[2]
    W[:, -1] = 0
    x[0], x[1] = 0, np.eye(D)[-1]
    codes = pursue(jnp.array(x), jnp.array(W), 12, signed=signed)
    assert np.all(np.isfinite(codes.values))
    assert not np.any(codes.values[:2])
    for row in range(2, ROWS):
        assert 1 not in active(codes, row)
        assert 3 not in active(codes, row)  # ties go to the lower index
        np.testing.assert_allclose(dense(codes, 5)[row], plain(x[row], W, 12, signed), atol=1e-12)
    np.testing.assert_array_equal(pursue(jnp.array(x), jnp.zeros_like(W), 12, signed=signed).values, 0)


def test_is_the_encoder_of_the_autoencoder():
    from sparse_jax.dictionaries.matching_pursuit import dense_codes
    from sparse_jax.dictionaries.matching_pursuit import pursue as encoder

    x, W = (jnp.array(a, jnp.float32) for a in problem(6, norms=False))
    _, values, chosen = jax.jit(encoder, static_argnums=(2, 3))(x, W, 6, "float32")
    np.testing.assert_allclose(dense(pursue(x, W, 6), N), dense_codes(values, chosen, N), atol=1e-5)


def test_derivative(x64):
    x, W = problem(7)
    weight = jnp.array(np.random.default_rng(0).normal(size=(ROWS, N)))
    total = jax.jit(lambda x, W: jnp.sum(weight * dense(matching_pursuit(x, W, 4), N)))
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
        return matching_pursuit(x, W, 3)

    for seed in range(3):
        x, W = (jnp.array(a, jnp.float32) for a in problem(seed))
        made = codes(x, W)
        assert made.values.dtype == jnp.float32
        assert np.all(np.sum(np.square(x - decoded(made, W)), axis=1) < np.sum(np.square(x), axis=1))
    assert len(traced) == 1


def test_refusals():
    x, W = problem(0)
    with pytest.raises(InputError, match="k 0: give 1"):
        matching_pursuit(x, W, 0)
    with pytest.raises(InputError, match=r"give x \[rows, d\]"):
        matching_pursuit(x[:, 1:], W, 2)
    with pytest.raises(InputError, match="start with values"):
        matching_pursuit(x, W, 2, start=SparseCodes(jnp.ones((2, 1)), jnp.ones((2, 1), jnp.int32)))
