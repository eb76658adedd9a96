"""Orthogonal matching pursuit: by hand, against a plain loop, residuals, atoms that depend on others, scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding.least_squares_on_support import least_squares_on_support
from sparse_jax.coding.orthogonal_matching_pursuit import orthogonal_matching_pursuit
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import dense
from tests.coding.pursuits import ROWS, D, N, active, check_orthonormal_atoms, decoded, left_of, problem

pursue = jax.jit(orthogonal_matching_pursuit, static_argnames=("k", "signed"))
least_squares = jax.jit(least_squares_on_support, static_argnames="non_negative")


def plain(x, W, k):
    """One row, as the paper says it."""
    x, W = np.asarray(x), np.asarray(W)
    chosen, left, values = [], x, None
    for _ in range(k):
        chosen.append(int(np.argmax(np.abs(W @ left) / np.linalg.norm(W, axis=1))))
        values = np.linalg.lstsq(W[chosen].T, x, rcond=None)[0]
        left = x - values @ W[chosen]
    return np.array(chosen), values


def test_by_hand():
    W = jnp.array([[2.0, 0.0], [1.0, 1.0]])
    x = jnp.array([[4.0, 1.0], [-4.0, -1.0], [0.0, 0.0]])
    one = pursue(x, W, 1)
    np.testing.assert_allclose(one.values, [[2], [-2], [0]])
    np.testing.assert_array_equal(one.indices[:2], [[0], [0]])
    np.testing.assert_allclose(dense(pursue(x, W, 2), 2), [[1.5, 1], [-1.5, -1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(dense(pursue(x, W, 2, signed=False), 2), [[1.5, 1], [0, 0], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("k", [1, 8])
def test_equals_a_plain_loop(x64, k):
    x, W = problem(0)
    codes = pursue(x, W, k)
    assert codes.indices.dtype == jnp.int32
    for row in range(ROWS):
        chosen, values = plain(x[row], W, k)
        np.testing.assert_array_equal(codes.indices[row], chosen)
        np.testing.assert_allclose(codes.values[row], values, atol=1e-10)


def test_orthonormal_atoms(x64):
    """The k largest products."""
    check_orthonormal_atoms(pursue)


def test_what_is_left_is_orthogonal_to_the_chosen(x64):
    x, W = problem(2)
    codes = pursue(x, W, 8)
    products = (np.asarray(x) - decoded(codes, W)) @ np.asarray(W).T
    assert np.max(np.abs(np.take_along_axis(products, np.asarray(codes.indices), axis=1))) < 1e-12


def test_non_negative_equals_a_plain_loop(x64):
    """Chosen by what the non-negative values leave; an atom that they leave at 0 is not chosen again."""
    x, W = problem(3)
    W, k = W / jnp.array(np.linalg.norm(W, axis=1, keepdims=True)) + 0.15, 8
    codes = pursue(x, W, k, signed=False)
    assert jnp.min(codes.values) >= 0
    indices, found, left = np.zeros((ROWS, k), np.int32), np.zeros((ROWS, k), bool), np.asarray(x)
    for slot in range(k):
        scores = left @ np.asarray(W).T / np.linalg.norm(W, axis=1)
        np.put_along_axis(scores, indices[:, :slot], -np.inf, axis=1)
        found[:, slot] = np.max(scores, axis=1) > 1e-9
        indices[:, slot] = np.where(found[:, slot], np.argmax(scores, axis=1), 0)
        values = np.asarray(least_squares(x, W, jnp.array(indices), jnp.array(found)))
        left = np.asarray(x) - np.einsum("bk,bkd->bd", values, np.asarray(W)[indices])
    np.testing.assert_array_equal(codes.indices, indices)
    np.testing.assert_allclose(codes.values, values, atol=1e-10)
    # The atoms are so alike that some lose their value to later ones.
    assert np.mean(found) > 0.7
    assert np.count_nonzero(found & (values == 0)) > 5


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_without_rest_chooses_no_more(x64, signed, dtype):
    """A combination of two orthogonal atoms, a row of zeros, a row that no atom has a part in."""
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    W = Q[:12] * np.arange(1, 13)[:, None]
    x = np.stack([W[2] + 3 * W[7], np.zeros(D), Q[-1]])
    codes = pursue(jnp.array(x, dtype), jnp.array(W, dtype), 8, signed=signed)
    assert codes.values.dtype == dtype
    assert set(active(codes, 0)) == {2, 7}
    assert not np.any(codes.values[1:])
    np.testing.assert_allclose(decoded(codes, W)[0], x[0], atol=1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_and_repeated_atoms_and_k_above_n(x64, signed):
    """Five atoms, of which one is zero, and one stands there three times: at most two can be active."""
    x, W = problem(5, n=5)
    W = np.array(W)
    W[1], W[3], W[4] = 0, W[2], (-2 if signed else 2) * W[2]
    codes = pursue(x, jnp.array(W), 8, signed=signed)
    assert codes.values.shape == (ROWS, 8)
    assert np.all(np.isfinite(codes.values))
    for row in range(ROWS):
        used = active(codes, row)
        assert 1 not in used
        assert len(used) == len(set(used)) <= 2
    both, in_use = jnp.tile(jnp.array([0, 2], jnp.int32), (ROWS, 1)), jnp.ones((ROWS, 2), bool)
    exact = least_squares(x, jnp.array(W), both, in_use, non_negative=not signed)
    np.testing.assert_allclose(decoded(codes, W), exact @ W[[0, 2]], atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_an_atom_that_cannot_be_told_from_another_is_not_taken(x64, signed):
    """Its small part in what is left would have it at a value of 1e8, of which rounding leaves nothing right."""
    W = np.zeros((2, D))
    W[:, 0], W[1, 1] = 1, 1e-8
    x = np.zeros((1, D))
    x[0, :2] = 1
    codes = pursue(jnp.array(x), jnp.array(W), 8, signed=signed)
    assert len(active(codes, 0)) == 1
    np.testing.assert_allclose(np.sum(codes.values), 1, atol=1e-6)


def test_more_steps_than_dimensions(x64):
    x, W = problem(6, d=5)
    codes = pursue(x, W, 8)
    np.testing.assert_allclose(decoded(codes, W), x, atol=1e-12)
    assert all(len(active(codes, row)) <= 5 for row in range(ROWS))


@pytest.mark.parametrize("signed", [True, False])
def test_nearly_equal_atoms_in_float32(signed):
    """The answer is as good as float64's, or nearly."""
    generator = np.random.default_rng(7)
    base = generator.normal(size=(8, D))
    W = (base[:, None] + 3e-3 * generator.normal(size=(8, 5, D))).reshape(-1, D)
    x, left = generator.normal(size=(ROWS, D)), {}
    with jax.enable_x64(True):
        for dtype in ("float32", "float64"):
            left[dtype] = left_of(x, pursue(jnp.array(x, dtype), jnp.array(W, dtype), 8, signed=signed), W)
    assert np.mean(left["float32"]) < 1.02 * np.mean(left["float64"])


def test_tolerance_for_all_and_for_each_row(x64):
    x, W = problem(8)
    enough = 0.3 * np.sum(np.square(x), axis=1)
    codes = pursue(x, W, 8, tolerance=jnp.array(enough))
    count = np.count_nonzero(codes.values, axis=1)
    assert 1 < count.min() < count.max() < 8
    for row in range(ROWS):
        for k, done in ((count[row], True), (count[row] - 1, False)):
            chosen, values = plain(x[row], W, k)
            assert (np.sum(np.square(x[row] - values @ np.asarray(W)[chosen])) <= enough[row]) == done
    assert not np.any(pursue(x, W, 8, tolerance=1e3).values)


@pytest.mark.parametrize("signed", [True, False])
def test_derivative(x64, signed):
    x, W = problem(9)
    weight = jnp.array(np.random.default_rng(0).normal(size=(ROWS, N)))

    @jax.jit
    def total(x, W):
        return jnp.sum(weight * dense(orthogonal_matching_pursuit(x, W, 4, signed=signed), N))

    gradients = jax.jit(jax.grad(total, (0, 1)))(x, W)
    generator, small = np.random.default_rng(1), 1e-7
    along = [generator.normal(size=a.shape) for a in (x, W)]
    up, down = (total(*(jnp.array(a + s * b) for a, b in zip((x, W), along))) for s in (small, -small))
    expected = sum(np.sum(np.asarray(g) * b) for g, b in zip(gradients, along))
    np.testing.assert_allclose((up - down) / (2 * small), expected, rtol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_compiles_once(x64, signed):
    traced = []

    @jax.jit
    def codes(x, W, tolerance):
        traced.append(1)
        return orthogonal_matching_pursuit(x, W, 3, signed=signed, tolerance=tolerance)

    for seed in range(3):
        codes(*problem(seed), jnp.array(0.1 * seed))
    assert len(traced) == 1


def test_refusals():
    x, W = problem(0)
    with pytest.raises(InputError, match="k 0: give 1"):
        orthogonal_matching_pursuit(x, W, 0)
    with pytest.raises(InputError, match=r"give x \[rows, d\]"):
        orthogonal_matching_pursuit(x[:, 1:], W, 2)


@pytest.mark.torch  # with the other peers
@pytest.mark.parametrize("k", [1, 5, 12])
def test_equals_scikit_learn(x64, k):
    orthogonal_mp = pytest.importorskip("sklearn.linear_model").orthogonal_mp
    x, W = problem(10, rows=100, n=64, d=24, norms=False)
    expected = orthogonal_mp(np.asarray(W).T, np.asarray(x).T, n_nonzero_coefs=k).T
    np.testing.assert_allclose(dense(pursue(x, W, k), 64), expected, atol=1e-10)


@pytest.mark.torch  # with the other peers
def test_tolerance_equals_scikit_learn(x64):
    orthogonal_mp = pytest.importorskip("sklearn.linear_model").orthogonal_mp
    x, W = problem(11, rows=100, n=64, d=24, norms=False)
    expected = orthogonal_mp(np.asarray(W).T, np.asarray(x).T, tol=5.0).T
    np.testing.assert_allclose(dense(pursue(x, W, 24, tolerance=5.0), 64), expected, atol=1e-10)
