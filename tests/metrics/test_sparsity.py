"""L0, L1 and densities by hand."""

import jax
import numpy as np
import pytest

from sparse_jax.metrics import density, density_shares, l0, l1, sparsity_sums

CODES = np.array([[1.0, 0.0, -2.0, 0.0], [0.5, 0.0, 0.0, 0.0], [3.0, 0.0, 1.0, 9.0]], np.float32)
LENGTHS = np.array([1.0, 5.0, 0.5, 2.0], np.float32)


def test_by_hand():
    sums = sparsity_sums(CODES, np.ones(3, np.float32), LENGTHS)
    np.testing.assert_array_equal(sums.fired, [3, 0, 2, 1])
    assert sums.fired.dtype == np.int32
    assert l0(sums) == pytest.approx(6 / 3)
    # 1 + 2/2, 0.5, 3 + 1/2 + 18
    assert l1(sums) == pytest.approx((2 + 0.5 + 21.5) / 3)
    np.testing.assert_allclose(density(sums), [1, 0, 2 / 3, 1 / 3])
    assert density_shares(sums) == {"dead_fraction": 0.25, "rare_fraction": 0.25, "dense_fraction": 0.75}


def test_masked_tokens_do_not_count():
    sums = sparsity_sums(CODES, np.array([1, 1, 0], np.float32), LENGTHS)
    np.testing.assert_array_equal(sums.fired, [2, 0, 1, 0])
    assert int(sums.tokens) == 2
    assert l0(sums) == pytest.approx(1.5)
    assert l1(sums) == pytest.approx((2 + 0.5) / 2)
    assert density_shares(sums)["dead_fraction"] == 0.5


def test_batches_add_up():
    whole = sparsity_sums(CODES, np.ones(3, np.float32), LENGTHS)
    parts = [
        sparsity_sums(CODES[cut], np.ones(len(CODES[cut]), np.float32), LENGTHS) for cut in (slice(1), slice(1, 3))
    ]
    jax.tree.map(np.testing.assert_allclose, jax.tree.map(np.add, *parts), whole)


def test_rare_and_dense_are_strict_bounds():
    codes = np.zeros((1, 3), np.float32)
    sums = sparsity_sums(codes, np.ones(1, np.float32), np.ones(3, np.float32))
    counts = np.array([1, 100_000 // 10, 100_000 // 10 + 1])
    shares = density_shares(sums._replace(tokens=np.int64(100_000), fired=counts))
    # 1e-5 is not rare, 0.1 is not dense.
    assert shares == {"dead_fraction": 0, "rare_fraction": 0, "dense_fraction": pytest.approx(1 / 3)}
    assert density_shares(sums._replace(tokens=np.int64(100_001), fired=counts))["rare_fraction"] == pytest.approx(
        1 / 3
    )
