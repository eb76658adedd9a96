"""The Jacobian of an MLP between the active features of two dictionaries, in closed form, and its L1.

Input codes c are decoded, go through the MLP and are encoded again. For a TopK encoder, as long as the same features
stay active, the slope of output feature o in input feature i is

    J[o, i] = sum over units m of  Q[o, m] (sum over branches r of  g[r, m] P[i, r, m])
    P = W_dec1 W_in      [n_in, branches x d_mlp]       what a unit of an input feature adds to the pre-activations
    Q = (W_out W_enc2)^T [n_out, d_mlp]                 how an output feature reads the hidden layer
    g = dh/dz            [branches, d_mlp]              at the MLP's pre-activations: see folded_mlp.py

All other slopes are 0: with k active on each side J is k x k. Nothing of size [rows, n, n] is ever made, and of
[rows, k, d_mlp] only some rows at once. P and Q are two products a step, whatever the number of rows.

The L1 is differentiated by hand: given the signs of J, its gradients in P, Q and g are two more k x k products a row,
made while the row's part of P and Q is at hand. Adding them up is a scatter into two tables.

Source: Farnik et al. 2025, "Jacobian Sparse Autoencoders: Sparsify Computations, Not Just Activations" (ICML), section
4 and appendix A; the gated form is derived here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.connectors.folded_mlp import FoldedMlp
from sparse_jax.numerics.sparse_codes import SparseCodes

# Rows whose gathered parts of P and Q are in memory at once: with k 32 and 1,024 units 2 x 128 kB a row. Of 1 to 64,
# 4 and 8 took the least time on a CPU.
ROWS_AT_ONCE = 8


class Tables(NamedTuple):
    """What all rows share.

    Attributes:
        P: `[n_in, branches * d_mlp]`.
        Q: `[n_out, d_mlp]`.
    """

    P: jax.Array
    Q: jax.Array


class Active(NamedTuple):
    """The active features of each row.

    Attributes:
        inputs, outputs: `[rows, k]` int32 features.
        input_on, output_on: `[rows, k]` bool, False for empty slots.
    """

    inputs: jax.Array
    outputs: jax.Array
    input_on: jax.Array
    output_on: jax.Array


def tables(W_dec: jax.Array, W_enc: jax.Array, mlp: FoldedMlp) -> Tables:
    """P and Q of the inputs' decoder `[n_in, d_in]` and the outputs' encoder `[d_out, n_out]`."""
    return Tables(W_dec @ mlp.W_in.reshape(mlp.W_in.shape[0], -1), W_enc.T @ mlp.W_out.T)


def active(inputs: SparseCodes, outputs: SparseCodes) -> Active:
    """The active features of codes on both sides."""
    return Active(inputs.indices, outputs.indices, inputs.values > 0, outputs.values > 0)


def jacobian(shared: Tables, slopes: jax.Array, here: Active) -> jax.Array:
    """`[rows, k_out, k_in]` J between the active features; 0 in empty slots.

    Args:
        shared: P and Q.
        slopes: `[rows, branches, d_mlp]` g.
        here: the active features.
    """
    return _by_blocks(lambda rows: _jacobian(shared, *rows)[0], (slopes, here))


@jax.custom_vjp
def jacobian_l1(shared: Tables, slopes: jax.Array, here: Active, weight: jax.Array) -> jax.Array:
    """The weighted sum over rows of `sum |J|`, a scalar.

    Args:
        shared, slopes, here: as in `jacobian`.
        weight: `[rows]`; it has no gradient.
    """
    sums = _by_blocks(lambda rows: jnp.sum(jnp.abs(_jacobian(shared, *rows)[0]), axis=(1, 2)), (slopes, here))
    return jnp.sum(weight * sums)


def _jacobian(shared: Tables, slopes: jax.Array, here: Active) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """J of some rows; their P `[rows, k, branches, d_mlp]`; P bent by the slopes, and Q, `[rows, k, d_mlp]`."""
    P = shared.P[here.inputs].reshape(*here.inputs.shape, *slopes.shape[1:])
    Q = shared.Q[here.outputs]
    bent = jnp.sum(P * slopes[:, None], axis=2)
    J = jnp.einsum("bom,bim->boi", Q, bent)
    return jnp.where(here.output_on[:, :, None] & here.input_on[:, None, :], J, 0), P, bent, Q


def _forward(shared, slopes, here, weight):
    """The value, and its gradients in the tables and the slopes."""

    def add(total, rows):
        slopes, here, weight = rows
        J, P, bent, Q = _jacobian(shared, slopes, here)
        signs = jnp.sign(J) * weight[:, None, None]
        to_bent = jnp.einsum("boi,bom->bim", signs, Q)
        to_Q = jnp.einsum("boi,bim->bom", signs, bent)
        to_P = to_bent[:, :, None] * slopes[:, None]
        value, by_P, by_Q = total
        by_P = by_P.at[here.inputs.reshape(-1)].add(to_P.reshape(-1, by_P.shape[1]))
        by_Q = by_Q.at[here.outputs.reshape(-1)].add(to_Q.reshape(-1, by_Q.shape[1]))
        value = value + jnp.sum(jnp.sum(jnp.abs(J), axis=(1, 2)) * weight)
        return (value, by_P, by_Q), _over_slots(to_bent, P)

    zero = (jnp.zeros((), slopes.dtype), *(jnp.zeros_like(table) for table in shared))
    (value, by_P, by_Q), by_slopes = lax.scan(add, zero, _blocks((slopes, here, weight)))
    return value, (Tables(by_P, by_Q), by_slopes.reshape(slopes.shape))


def _over_slots(to_bent: jax.Array, P: jax.Array) -> jax.Array:
    """`[rows, branches, d_mlp]` the sum over slots of `to_bent [rows, k, d_mlp] x P [rows, k, branches, d_mlp]`.

    Slot by slot: XLA's own reduction over an axis that is not the last walks memory in strides on a CPU.
    """

    def add(slot, total):
        row = lambda a: lax.dynamic_index_in_dim(a, slot, axis=1, keepdims=False)  # noqa: E731
        return total + row(to_bent)[:, None] * row(P)

    return lax.fori_loop(0, P.shape[1], add, jnp.zeros((P.shape[0], *P.shape[2:]), P.dtype))


def _backward(saved, g):
    by_tables, by_slopes = jax.tree.map(lambda grad: g * grad, saved)
    return by_tables, by_slopes, None, None


jacobian_l1.defvjp(_forward, _backward)


def _blocks(rows):
    """The rows cut into blocks of at most ROWS_AT_ONCE: `[blocks, rows, ...]`."""
    total = jax.tree.leaves(rows)[0].shape[0]
    block = next(size for size in range(min(ROWS_AT_ONCE, total), 0, -1) if total % size == 0)
    return jax.tree.map(lambda a: a.reshape(total // block, block, *a.shape[1:]), rows)


def _by_blocks(function, rows):
    """`function` of the rows, block by block."""
    made = lax.map(function, _blocks(rows))
    return made.reshape(-1, *made.shape[2:])
