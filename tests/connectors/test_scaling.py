"""Units of inputs and targets, counted by hand."""

import numpy as np
import pytest

from sparse_jax.connectors.scaling import moments_of, scales_of
from sparse_jax.errors import InputError
from tests.connectors.small_pairs import pair_of, site

# Two tokens of four with feature 0 at 2; feature 1 never; feature 2 always 3.
X = np.array([[2, 0, 3], [0, 0, 3], [2, 0, 3], [0, 0, 3]], np.float32)


def test_moments():
    moments = moments_of(site("a", X))
    np.testing.assert_allclose(moments.mean, [1, 0, 3])
    np.testing.assert_allclose(moments.mean_square, [2, 0, 9])
    np.testing.assert_allclose(moments.variance, [1, 0, 0])
    assert moments.firings.tolist() == [2, 0, 4]


@pytest.mark.parametrize(
    ("rules", "scale", "norm"),
    [
        (("variance", "rms"), [1, 1, 1], [2**0.5, 1, 3]),
        (("layer-norm", "none"), [11**0.5] * 3, [1, 1, 1]),
        (("none", "rms"), [1, 1, 1], [2**0.5, 1, 3]),
    ],
)
def test_rules(rules, scale, norm):
    scales = scales_of(pair_of(X, X), *rules)
    np.testing.assert_allclose(scales.target_scale, scale, rtol=1e-6)
    np.testing.assert_allclose(scales.input_norm, norm, rtol=1e-6)
    np.testing.assert_allclose(scales.target_mean, [1, 0, 3])
    assert scales.target_scale.dtype == scales.input_norm.dtype == np.float32


def test_variance_is_that_of_numpy():
    y = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * np.float32([1, 10, 0.1, 5])
    np.testing.assert_allclose(scales_of(pair_of(y, y)).target_scale, y.std(0), rtol=1e-5)


def test_a_rule_that_there_is_not():
    with pytest.raises(InputError, match="give one of variance, layer-norm, none"):
        scales_of(pair_of(X, X), "std")
