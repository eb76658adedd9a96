"""Matrix products with a chosen compute dtype: the one place where a bfloat16 product is made.

bfloat16 inputs are accumulated in float32 (`preferred_element_type`), forward and backward alike; plain autodiff of
such a product would multiply a float32 cotangent with a bfloat16 operand, which no fast library does.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from sparse_jax.numerics.axes import divided


def dot_general(lhs, rhs, dimension_numbers, preferred_element_type=None):
    """`lax.dot_general` that accumulates bfloat16 in float32 and answers in the inputs' dtype by default.

    Args:
        lhs, rhs: arrays of one dtype.
        dimension_numbers: as `lax.dot_general` takes them.
        preferred_element_type: dtype of the answer; by default that of the inputs.

    XLA's CPU backend can refuse a *batched* bfloat16-to-float32 product at run time, not at compile time. There, and
    only there, the inputs (already rounded to bfloat16) are multiplied as float32, which gives the same numbers.
    """
    out_dtype = preferred_element_type or lhs.dtype
    if lhs.dtype == jnp.bfloat16:
        if dimension_numbers[1][0] and jax.default_backend() == "cpu":
            lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
        return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=jnp.float32).astype(out_dtype)
    return lax.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a: jax.Array, b: jax.Array, compute_dtype: DTypeLike | None = None) -> jax.Array:
    """`a @ b` with the inputs rounded to `compute_dtype` and the answer in `a`'s dtype.

    Args:
        a: `[rows, m]`.
        b: `[m, n]`, of the same dtype as `a`.
        compute_dtype: dtype of the inputs of the product (None: theirs); the backward products are rounded the same.

    Returns:
        `[rows, n]`, in the dtype of `a`.
    """
    return _product(a, b, a.dtype, compute_dtype)


def _product(a, b, out_dtype, compute_dtype):
    dtype = compute_dtype or a.dtype
    return dot_general(a.astype(dtype), b.astype(dtype), (((1,), (0,)), ((), ())), preferred_element_type=out_dtype)


def _forward(a, b, compute_dtype):
    return _product(a, b, a.dtype, compute_dtype), (a, b)


def _backward(compute_dtype, saved, g):
    a, b = saved
    grad_a = _product(g, _transposed(b, compute_dtype), a.dtype, compute_dtype)
    grad_b = _product(_transposed(a, compute_dtype), g, b.dtype, compute_dtype)
    return grad_a, grad_b


def _transposed(a, compute_dtype):
    """The transpose, laid out in memory first where that is what makes the fast matrix units reachable."""
    a = a.astype(compute_dtype or a.dtype).T
    return _row_major(a) if a.dtype == jnp.bfloat16 else a


def _row_major(a):
    """The matrix laid out row by row in memory, on a CPU; elsewhere, and on a mesh, the compiler chooses.

    The partitioner would gather the whole matrix for it.
    """
    if jax.default_backend() != "cpu" or divided():
        return a
    return with_layout_constraint(a, Layout((0, 1)))


matmul.defvjp(_forward, _backward)


# Products for gradients written by hand: the operands come already rounded, the dtype of the answer is asked for.
# XLA's CPU backend would turn a bfloat16 product whose answer is transposed later into one that it then refuses to run;
# a layout for the answer prevents that.


def product(a: jax.Array, b: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """`a @ b` for `a [rows, m]` and `b [m, n]` of one dtype."""
    return _laid_out(dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=out_dtype), a.dtype)


def product_nt(a: jax.Array, b: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """`a @ b.T` for `a [rows, m]` and `b [n, m]` of one dtype."""
    return _laid_out(dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype), a.dtype)


def product_tn(a: jax.Array, b: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """`a.T @ b` for `a [rows, m]` and `b [rows, n]` of one dtype; `a` is what gets transposed in memory, if need be."""
    return product(_transposed(a, None), b, out_dtype)


def transposed(a: jax.Array) -> jax.Array:
    """`a.T` with rows one after another in memory.

    For the transpose of a product's answer that leaves a compiled function: XLA's CPU backend gives the answer's own
    memory back in its place, in an order by columns that the caller does not know of, and the numbers are read wrongly.
    """
    return _row_major(a.T)


def _laid_out(answer, dtype):
    return _row_major(answer) if dtype == jnp.bfloat16 else answer
