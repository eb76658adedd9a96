"""The matrix products: exact where they claim to be, rounded where asked to be, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.numerics import dot_general, matmul
from sparse_jax.numerics.matmul import product, product_nt, product_tn


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def rounded(a):
    """float64 values of `a` rounded to bfloat16."""
    return np.asarray(a).astype(jnp.bfloat16).astype(np.float64)


def objective(a, b, g, compute_dtype=None):
    """A scalar whose gradients are those of the product with the cotangent `g`."""
    return jnp.sum(matmul(a, b, compute_dtype) * g)


gradients = jax.grad(objective, argnums=(0, 1))


@pytest.mark.parametrize("compute_dtype", [None, "float32", jnp.float32])
def test_float32_is_numpys_product(compute_dtype):
    # Small whole numbers: every sum is exact in float32, in any order.
    a, b = (
        np.random.default_rng(i).integers(-9, 9, size).astype(np.float32) for i, size in enumerate([(7, 5), (5, 3)])
    )
    g = np.arange(21, dtype=np.float32).reshape(7, 3)
    product = matmul(a, b, compute_dtype)
    assert product.dtype == jnp.float32
    np.testing.assert_array_equal(product, a @ b)
    grad_a, grad_b = gradients(jnp.array(a), jnp.array(b), g, compute_dtype)
    np.testing.assert_array_equal(grad_a, g @ b.T)
    np.testing.assert_array_equal(grad_b, a.T @ g)


@pytest.mark.parametrize("shape", [(64, 48, 80), (1, 33, 5), (7, 1, 3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_rounds_the_inputs_and_nothing_else(shape, compiled):
    rows, m, n = shape
    a, b, g = normal(0, rows, m), normal(1, m, n), normal(2, rows, n)
    product, pullback = matmul, gradients
    if compiled:
        product, pullback = jax.jit(matmul, static_argnums=2), jax.jit(gradients, static_argnums=3)
    made = product(a, b, "bfloat16")
    grad_a, grad_b = pullback(jnp.array(a), jnp.array(b), g, "bfloat16")
    assert {made.dtype, grad_a.dtype, grad_b.dtype} == {jnp.dtype(jnp.float32)}
    # Sums are float32: far closer to the product of the rounded inputs than bfloat16's 3 digits.
    np.testing.assert_allclose(made, rounded(a) @ rounded(b), atol=2e-5)
    np.testing.assert_allclose(grad_a, rounded(g) @ rounded(b).T, atol=2e-5)
    np.testing.assert_allclose(grad_b, rounded(a).T @ rounded(g), atol=2e-5)
    # ... and the inputs were rounded.
    if rows * m * n > 1000:
        assert np.abs(made - a.astype(np.float64) @ b).max() > 1e-4


def test_bfloat16_arrays_answer_in_bfloat16():
    a, b = jnp.array(normal(0, 4, 8)).astype(jnp.bfloat16), jnp.array(normal(1, 8, 3)).astype(jnp.bfloat16)
    assert matmul(a, b).dtype == jnp.bfloat16
    np.testing.assert_array_equal(matmul(a, b), (rounded(a) @ rounded(b)).astype(jnp.bfloat16))


@pytest.mark.parametrize("axes", [(0, 0), (1, 2), (2, 0), (None, 1), (0, None)])
@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_vmap_equals_a_loop(axes, compute_dtype):
    a, b, g = normal(0, 3, 6, 8), normal(1, 3, 8, 5), normal(2, 6, 5)
    pairs = [(a[i if axes[0] is not None else 0], b[i if axes[1] is not None else 0]) for i in range(3)]
    placed = [x[0] if axis is None else np.moveaxis(x, 0, axis) for x, axis in zip((a, b), axes)]

    def both(a, b):
        return matmul(a, b, compute_dtype), *gradients(a, b, g, compute_dtype)

    batched = jax.jit(jax.vmap(both, in_axes=axes))(*placed)
    for one, looped in zip(batched, zip(*(both(jnp.array(a), jnp.array(b)) for a, b in pairs)), strict=True):
        np.testing.assert_allclose(one, np.stack(looped), atol=1e-5)


def test_gradients_against_finite_differences(x64):
    a, b, g = (jnp.array(normal(i, *shape, dtype=np.float64)) for i, shape in enumerate([(4, 3), (3, 5), (4, 5)]))
    grad_a, grad_b = gradients(a, b, g)
    assert grad_a.dtype == grad_b.dtype == jnp.float64
    for given, grad, place in ((a, grad_a, 0), (b, grad_b, 1)):
        for index in np.ndindex(*given.shape):
            step = jnp.zeros_like(given).at[index].set(1e-6)
            arguments = [[a, b], [a, b]]
            arguments[0][place], arguments[1][place] = given + step, given - step
            numeric = (objective(*arguments[0], g) - objective(*arguments[1], g)) / 2e-6
            np.testing.assert_allclose(grad[index], numeric, atol=1e-8)


def test_dot_general_unbatched_dtypes():
    a, b = jnp.array(normal(0, 6, 32)), jnp.array(normal(1, 4, 32))
    numbers = (((1,), (1,)), ((), ()))
    low = dot_general(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), numbers)
    high = dot_general(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), numbers, preferred_element_type=jnp.float32)
    assert (low.dtype, high.dtype, dot_general(a, b, numbers).dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    expected = rounded(a) @ rounded(b).T
    np.testing.assert_allclose(high, expected, atol=1e-5)
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))
    np.testing.assert_allclose(dot_general(a, b, numbers), np.asarray(a) @ np.asarray(b).T, atol=1e-5)


@pytest.mark.parametrize("left", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("right", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_dot_general_batched_bfloat16_in_many_layouts(left, right):
    """Some of these layouts have no bfloat16 product in XLA's CPU backend and fail when they are run."""
    a, b = normal(0, 2, 4, 8), normal(1, 2, 6, 8)
    x, y = (jnp.array(v.transpose(order)).astype(jnp.bfloat16) for v, order in ((a, left), (b, right)))
    numbers = (((left.index(2),), (right.index(2),)), ((left.index(0),), (right.index(0),)))

    @jax.jit
    def products(x, y):
        return dot_general(x, y, numbers, preferred_element_type=jnp.float32), dot_general(x, y, numbers)

    expected = np.einsum("erm,enm->ern", rounded(a), rounded(b))
    high, low = products(x, y)
    assert (high.dtype, low.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(high, expected, atol=1e-5)
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(64, 48, 80), (1, 33, 5), (7, 1, 3)])
def test_products_of_rounded_operands_in_every_layout(shape, dtype):
    """Compiled, and with the answer transposed: what XLA's CPU backend compiles and then refuses to run in bfloat16."""
    rows, m, n = shape
    a, b, c, d = (jnp.array(normal(i, *s), dtype) for i, s in enumerate([(rows, m), (m, n), (n, m), (rows, n)]))
    forms = {
        "nn": (lambda: product(a, b, jnp.float32), lambda a, b, c, d: a @ b),
        "nt": (lambda: product_nt(a, c, jnp.float32), lambda a, b, c, d: a @ c.T),
        "tn": (lambda: product_tn(a, d, jnp.float32), lambda a, b, c, d: a.T @ d),
        "of a transpose": (lambda: product_nt(a, b.T, jnp.float32), lambda a, b, c, d: a @ b),
    }
    exact = [np.asarray(each, np.float64) for each in (a, b, c, d)]
    for name, (form, expected) in forms.items():
        made, transposed = form(), jax.jit(lambda form=form: form().T)()
        assert made.dtype == transposed.dtype == jnp.float32
        np.testing.assert_allclose(made, expected(*exact), atol=5e-5, err_msg=name)
        np.testing.assert_allclose(transposed.T, expected(*exact), atol=5e-5, err_msg=name)


def test_products_round_no_answer():
    a, b = (jnp.array(normal(i, *s), jnp.bfloat16) for i, s in enumerate([(9, 40), (40, 6)]))
    assert np.any(product(a, b, jnp.float32) != product(a, b, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32))
