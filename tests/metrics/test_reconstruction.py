"""FVU, explained variance and shrinkage: answers worked by hand, and sums that neither cancel nor depend on batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.metrics import explained_variance, fvu, reconstruction_sums, shrinkage

X = np.array([[2.0, 0.0], [0.0, 4.0]], np.float32)
X_HAT = np.array([[2.0, 1.0], [0.0, 3.0]], np.float32)
ONES, ZEROS = np.ones(2, np.float32), np.zeros(2, np.float32)


def exact_fvu(x, x_hat):
    x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    return np.sum((x - x_hat) ** 2) / np.sum((x - x.mean(0)) ** 2)


def test_fvu_by_hand():
    # errors 1 + 1; about the mean (1, 2): (1 + 4) + (1 + 4)
    sums = reconstruction_sums(X, X_HAT, ONES, ZEROS)
    assert fvu(sums) == pytest.approx(0.2)
    assert explained_variance(sums) == pytest.approx(0.8)
    assert int(sums.tokens) == 2


def test_the_mean_and_the_thing_itself():
    assert fvu(reconstruction_sums(X, np.array([[1.0, 2.0], [1.0, 2.0]], np.float32), ONES, ZEROS)) == pytest.approx(1)
    assert fvu(reconstruction_sums(X, X, ONES, ZEROS)) == 0


@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (-3, 50)])
def test_the_shift_does_not_matter(shift):
    sums = reconstruction_sums(X, X_HAT, ONES, np.array(shift, np.float32))
    assert fvu(sums) == pytest.approx(0.2, rel=1e-3)


def test_masked_tokens_do_not_matter():
    x, x_hat = (np.concatenate([v, [[1e15, -1e15]]]).astype(np.float32) for v in (X, X_HAT))
    sums = reconstruction_sums(x, x_hat[::-1][[1, 2, 0]][[1, 0, 2]], np.array([1, 1, 0], np.float32), ZEROS)
    plain = reconstruction_sums(x[:2], x_hat[::-1][[1, 2]][[1, 0]], ONES, ZEROS)
    jax.tree.map(np.testing.assert_array_equal, sums, plain)


def test_batches_of_different_sizes_add_up_to_the_whole():
    """Not to the mean of the batches' figures."""
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(100, 5)) * np.linspace(0.2, 4, 100)[:, None] + 3).astype(np.float32)
    x_hat = (0.8 * x + 0.3 * generator.normal(size=(100, 5))).astype(np.float32)
    weight = (generator.random(100) < 0.8).astype(np.float32)
    shift = x[:10].mean(0)
    cuts = [slice(0, 7), slice(7, 60), slice(60, 100)]
    parts = [reconstruction_sums(x[cut], x_hat[cut], weight[cut], shift) for cut in cuts]
    total = jax.tree.map(lambda *values: np.sum([np.asarray(v, np.float64) for v in values], axis=0), *parts)
    counted = weight > 0
    assert fvu(total) == pytest.approx(exact_fvu(x[counted], x_hat[counted]), rel=1e-5)
    assert fvu(total) == pytest.approx(fvu(reconstruction_sums(x, x_hat, weight, shift)), rel=1e-5)
    assert abs(np.mean([fvu(part) for part in parts]) - fvu(total)) > 0.02
    centred, rebuilt = x[counted] - shift, x_hat[counted] - shift
    assert shrinkage(total) == pytest.approx(np.sum(rebuilt**2) / np.sum(rebuilt * centred), rel=1e-5)


def test_nothing_cancels_where_the_mean_is_a_thousand_times_the_spread():
    generator = np.random.default_rng(1)
    x = (generator.normal(size=(4096, 32)) + 1000 * np.sign(generator.normal(size=32))).astype(np.float32)
    x_hat = (x + 0.5 * generator.normal(size=x.shape)).astype(np.float32)
    # The mean of other, training, tokens: near, not equal.
    shift = jnp.array(x[:50].mean(0))
    sums = reconstruction_sums(x, x_hat, np.ones(4096, np.float32), shift)
    assert fvu(sums) == pytest.approx(exact_fvu(x, x_hat), rel=1e-5)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_shrinkage_is_the_factor_by_which_everything_is_too_short(factor):
    x = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    shift = np.array([1.0, -2.0, 3.0, 0.0], np.float32)
    sums = reconstruction_sums(x + shift, factor * x + shift, np.ones(50, np.float32), shift)
    assert shrinkage(sums) == pytest.approx(factor, rel=1e-5)


def test_dividing_by_the_shrinkage_minimises_the_error():
    generator = np.random.default_rng(3)
    x = generator.normal(size=(500, 4)).astype(np.float32)
    x_hat = (0.6 * x + 0.3 * generator.normal(size=x.shape)).astype(np.float32)
    ones, shift = np.ones(500, np.float32), np.zeros(4, np.float32)
    bias = shrinkage(reconstruction_sums(x, x_hat, ones, shift))
    errors = [float(reconstruction_sums(x, x_hat / (bias * f), ones, shift).error) for f in (0.95, 1.0, 1.05)]
    assert errors[1] < min(errors[0], errors[2])


def test_an_unbiased_reconstruction_has_shrinkage_one():
    """A projection: its error is orthogonal to it."""
    x = np.random.default_rng(4).normal(size=(50, 4)).astype(np.float32)
    projected = x * np.array([1, 1, 0, 0], np.float32)
    sums = reconstruction_sums(x, projected, np.ones(50, np.float32), np.zeros(4, np.float32))
    assert shrinkage(sums) == pytest.approx(1, rel=1e-6)
