"""Norms and unit rows: right, and finite at zero in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.numerics import safe_norm, unit_rows

ROWS = np.array([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]], np.float32)


def test_safe_norm_by_hand():
    np.testing.assert_allclose(safe_norm(ROWS), [5, 0, 2])
    np.testing.assert_allclose(safe_norm(ROWS, axis=0), np.linalg.norm(ROWS, axis=0), rtol=1e-6)
    assert safe_norm(ROWS, keepdims=True).shape == (3, 1)


def test_the_gradient_of_the_norm_is_zero_at_zero():
    grad = jax.grad(lambda x: jnp.sum(safe_norm(x)))(jnp.array(ROWS))
    np.testing.assert_allclose(grad, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)


def test_unit_rows_by_hand():
    np.testing.assert_allclose(unit_rows(jnp.array(ROWS)), [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)


def test_the_gradient_of_unit_rows_is_finite_and_tangent():
    cotangent = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
    grad = np.asarray(jax.grad(lambda x: jnp.sum(unit_rows(x) * cotangent))(jnp.array(ROWS)))
    assert np.isfinite(grad).all()
    # (g - (g . u) u) / ||x|| for the rows that have a direction.
    np.testing.assert_allclose(grad[0], (cotangent[0] - 2.2 * np.array([0.6, 0.8])) / 5, rtol=1e-5)
    np.testing.assert_allclose(grad[2], [0, 3], rtol=1e-5)
