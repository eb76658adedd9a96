"""Least squares on given atoms: by hand, against every subset, conditions of the minimum, atoms that are alike."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding.least_squares_on_support import least_squares_on_support
from sparse_jax.errors import InputError

ROWS, N, D, K = 40, 30, 12, 6
solve = jax.jit(least_squares_on_support, static_argnames=("non_negative", "iterations"))


def problem(seed, noise=1.0, rows=ROWS, k=K, d=D):
    """Atoms of many norms, among them a zero atom (3) and two that are the same (4, 5); the smaller `noise`, the more
    alike they are. Slots hold any atoms, repeated ones too; some are not in use; the first row is 0."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(1, d)) * (noise < 1)
    W = (common + noise * generator.normal(size=(N, d))) * np.exp(generator.normal(size=(N, 1)))
    W[3], W[5] = 0, W[4]
    x = common + noise * generator.normal(size=(rows, d))
    x[0] = 0
    indices = generator.integers(0, N, size=(rows, k)).astype(np.int32)
    indices[1], indices[2] = 4, 3
    mask = generator.random((rows, k)) < 0.85
    return tuple(map(jnp.array, (x, W, indices, mask)))


def left_of(x, W, indices, mask, values):
    """Residual and atoms in NumPy."""
    atoms = np.asarray(W)[np.asarray(indices)] * np.asarray(mask)[:, :, None]
    return np.asarray(x) - np.einsum("bm,bmd->bd", values, atoms), atoms


def test_by_hand():
    W = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    x = jnp.array([[3.0, -1.0], [1.0, 3.0], [-1.0, -1.0]])
    indices, mask = jnp.array([[0, 1], [0, 1], [0, 2]]), jnp.ones((3, 2), bool)
    # Row 0: 4 w0 - w1 without a sign, 3 w0 with. Row 1: -2 w0 + 3 w1, or 2 w1. Row 2: nothing.
    np.testing.assert_allclose(solve(x, W, indices, mask), [[3, 0], [0, 2], [0, 0]], atol=1e-6)
    free = solve(x, W, indices, mask, non_negative=False)
    np.testing.assert_allclose(free, [[4, -1], [-2, 3], [-1, -0.5]], atol=1e-6)


def test_orthonormal_atoms_are_only_products(x64):
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    x = np.random.default_rng(1).normal(size=(ROWS, D))
    indices = np.stack([np.random.default_rng(i).permutation(D)[:K] for i in range(ROWS)]).astype(np.int32)
    products = np.take_along_axis(x @ Q.T, indices, axis=1)
    given = jnp.array(x), jnp.array(Q), jnp.array(indices), jnp.ones(indices.shape, bool)
    np.testing.assert_allclose(solve(*given, non_negative=False), products, atol=1e-13)
    np.testing.assert_allclose(solve(*given), np.maximum(products, 0), atol=1e-13)


@pytest.mark.parametrize("noise", [1.0, 0.1, 1e-3])
def test_as_good_as_the_best_of_all_subsets(x64, noise):
    x, W, indices, mask = problem(0, noise)
    values = np.asarray(solve(x, W, indices, mask))
    assert values.min() >= 0
    left, atoms = left_of(x, W, indices, mask, values)
    for row in range(ROWS):
        best = np.sum(np.square(x[row]))
        for size in range(1, K + 1):
            for subset in map(list, combinations(range(K), size)):
                v, *_ = np.linalg.lstsq(atoms[row, subset].T, x[row], rcond=1e-12)
                if v.min() >= 0:
                    best = min(best, np.sum(np.square(x[row] - v @ atoms[row, subset])))
        assert np.sum(left[row] ** 2) <= best * (1 + 1e-9) + 1e-14 * np.sum(np.square(x[row]))


@pytest.mark.parametrize("noise", [1.0, 0.01])
@pytest.mark.parametrize("k", [1, K, 20])
def test_conditions_of_the_minimum(x64, noise, k):
    """More atoms than dimensions too."""
    x, W, indices, mask = problem(1, noise, k=k)
    lengths = np.maximum(np.linalg.norm(np.asarray(W)[np.asarray(indices)], axis=-1), 1e-300)
    values = np.asarray(solve(x, W, indices, mask))
    left, atoms = left_of(x, W, indices, mask, values)
    products = np.einsum("bmd,bd->bm", atoms, left) / lengths
    assert values.min() >= 0
    assert np.max(products) < 1e-10
    assert np.max(np.abs(products[values > 0])) < 1e-10
    free = np.asarray(solve(x, W, indices, mask, non_negative=False))
    left, atoms = left_of(x, W, indices, mask, free)
    assert np.max(np.abs(np.einsum("bmd,bd->bm", atoms, left)) / lengths) < 1e-10
    for answer in (values, free):
        assert not np.any(answer[~np.asarray(mask)])
        assert not np.any(answer[np.asarray(indices) == 3])
        assert not np.any(answer[0])
        assert np.count_nonzero(answer[1]) <= 1  # slots that all hold the same atom, or its double


def test_float32_is_near_float64():
    x, W, indices, mask = problem(2)
    values = solve(x, W, indices, mask)
    assert values.dtype == jnp.float32
    left = np.sum(left_of(x, W, indices, mask, values)[0] ** 2, axis=-1)
    with jax.enable_x64(True):
        exact = solve(*(jnp.array(np.asarray(a), jnp.float64) for a in (x, W)), indices, mask)
        least = np.sum(left_of(x, W, indices, mask, exact)[0] ** 2, axis=-1)
    np.testing.assert_allclose(left, least, rtol=1e-4, atol=1e-5)


def test_derivative_in_x_and_atoms(x64):
    x, W, indices, mask = problem(3)
    indices, weight = indices.at[1:3].set(indices[3:5]), jnp.array(np.random.default_rng(0).normal(size=(ROWS, K)))

    @jax.jit
    def total(x, W):
        return jnp.sum(weight * least_squares_on_support(x, W, indices, mask))

    gradients = jax.jit(jax.grad(total, (0, 1)))(x, W)
    generator, small = np.random.default_rng(1), 1e-7
    for i, gradient in enumerate(gradients):
        direction = jnp.array(generator.normal(size=gradient.shape))
        # A zero atom becomes one that is not, and doubles differ: other sets. The zero row has every atom at the edge.
        direction = direction.at[jnp.array([0] if i == 0 else [3, 4, 5])].set(0)
        up, down = ([x, W], [x, W])
        up[i], down[i] = up[i] + small * direction, down[i] - small * direction
        expected = (total(*up) - total(*down)) / (2 * small)
        np.testing.assert_allclose(jnp.sum(gradient * direction), expected, rtol=1e-5)


def test_stopped_early_is_admissible_and_better_the_later(x64):
    x, W, indices, mask = problem(4, 0.3, k=12)
    before = np.sum(np.square(x), axis=-1)
    for iterations in (0, 3, 4, 5, 6):
        values = np.asarray(solve(x, W, indices, mask, iterations=iterations))
        assert values.min() >= 0
        after = np.sum(left_of(x, W, indices, mask, values)[0] ** 2, axis=-1)
        assert np.all(after <= before * (1 + 1e-12))
        before = after
    assert np.any(after > 1.0001 * np.sum(left_of(x, W, indices, mask, solve(x, W, indices, mask))[0] ** 2, axis=-1))


def test_compiles_once(x64):
    traced = []

    @jax.jit
    def values(*given):
        traced.append(1)
        return least_squares_on_support(*given)

    for seed in range(3):
        values(*problem(seed))
    assert len(traced) == 1


def test_refusals():
    x, W, indices, mask = problem(0)
    for wrong in (
        (x[:, :3], W, indices, mask),
        (x, W, indices[1:], mask),
        (x, W, indices, mask[:, 1:]),
        (x, W, indices[0], mask[0]),
    ):
        with pytest.raises(InputError, match="give"):
            least_squares_on_support(*wrong)
    with pytest.raises(InputError, match="iterations -1"):
        least_squares_on_support(x, W, indices, mask, iterations=-1)


@pytest.mark.torch  # with the other peers
@pytest.mark.parametrize(("k", "d"), [(6, 12), (20, 30), (20, 10)])
@pytest.mark.parametrize("noise", [1.0, 0.1, 1e-2, 1e-4])
def test_equals_scipy(x64, k, d, noise):
    nnls = pytest.importorskip("scipy.optimize").nnls
    x, W, indices, mask = problem(5, noise, k=k, d=d)
    values = np.asarray(solve(x, W, indices, mask))
    left, atoms = left_of(x, W, indices, mask, values)
    for row in range(ROWS):
        expected, residual = nnls(atoms[row].T, np.asarray(x[row]), maxiter=10_000)
        scale = np.sum(np.square(x[row]))
        np.testing.assert_allclose(np.sum(left[row] ** 2), residual**2, rtol=1e-8, atol=1e-14 * scale)
        # The values themselves where they are the only ones.
        used = np.asarray(indices[row])[np.asarray(mask[row])]
        if noise == 1 and d >= k and len(set(used) - {3}) == len(used) and not {4, 5} <= set(used):
            np.testing.assert_allclose(values[row], expected, atol=1e-8)
