"""Least squares on a changing set of a row's own few atoms, one atom in or out at a time. Source: the sweep operator
(Goodnight 1979, "A tutorial on the SWEEP operator").

With G the Gram matrix of unit atoms u_1 .. u_m, b their products with x, and P the atoms inside, a table holds

                inside                      outside                              products
    inside     -G_PP^-1                     G_PP^-1 G_PQ                         c_P = G_PP^-1 b_P: the solution on P
    outside     (its transpose)             G_QQ - G_QP G_PP^-1 G_PQ             u . r,   r = x - sum over P of c_p u_p

Its diagonal is, outside, the squared distance of an atom from the span of those inside: what is 0 there must not enter.
An atom p enters or leaves (sigma = 1 or -1) by one step of Gauss and Jordan, with a the column p and a_pp its entry:

    M_ij = M_ij - a_i a_j / a_pp,    M_ip = sigma a_i / a_pp,    M_pp = -1 / a_pp          the same for the products

A change costs m^2, where a new factorisation costs m^3, and is the same operation for all rows: no calls to LAPACK.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

# A unit atom whose squared distance from the span of those inside is below this, in units of the dtype's smallest step
# from 1, lies in that span as far as a Gram matrix can tell.
_WITHIN = 64


class Table(NamedTuple):
    """See above.

    Attributes:
        matrix: `[rows, m, m]`.
        products: `[rows, m]`: codes of the atoms inside, and what is left of x times those outside.
        inside: `[rows, m]` bool.
    """

    matrix: jax.Array
    products: jax.Array
    inside: jax.Array


def table_of(gram: jax.Array, b: jax.Array) -> Table:
    """With no atom inside.

    Args:
        gram: `[rows, m, m]`, products of each row's atoms, whose norms are 1, or 0 for an empty slot.
        b: `[rows, m]`, products of its atoms with x.
    """
    return Table(gram, b, jnp.zeros(b.shape, bool))


def codes_of(table: Table) -> jax.Array:
    """`[rows, m]`: the least squares of x on the atoms inside; 0 outside."""
    return jnp.where(table.inside, table.products, 0)


def may_enter(table: Table) -> jax.Array:
    """`[rows, m]` bool: atoms outside that are not in the span of those inside."""
    return ~table.inside & (_distances(table) > within(table.matrix.dtype))


def within(dtype: DTypeLike) -> float:
    """The squared distance from a span below which a unit atom counts as part of it."""
    return _WITHIN * float(jnp.finfo(dtype).eps)


def swept(table: Table, atom: jax.Array, which: jax.Array) -> Table:
    """One atom of each row enters, or leaves where it is inside.

    Args:
        table: of any set; an atom that enters is one that `may_enter`.
        atom: `[rows]` int32.
        which: `[rows]` bool; the other rows stay as they are.
    """
    matrix, products, inside = table
    column = jnp.take_along_axis(matrix, atom[:, None, None], axis=2)[:, :, 0]
    at_atom = jnp.arange(column.shape[1], dtype=jnp.int32) == atom[:, None]
    pivot = jnp.sum(jnp.where(at_atom, column, 0), axis=1, keepdims=True)
    pivot = jnp.where(which[:, None] & (pivot != 0), pivot, 1)
    sigma = jnp.where(jnp.any(at_atom & inside, axis=1, keepdims=True), -1, 1).astype(matrix.dtype)

    others = jnp.where(at_atom, 0, column)
    scaled = others / pivot
    # The row and the column of the atom are written anew: what stood there is not to be subtracted from.
    edge = jnp.where(at_atom, -1 / pivot, sigma * scaled)
    made = matrix - others[:, :, None] * scaled[:, None, :]
    made = jnp.where(at_atom[:, :, None], edge[:, None, :], made)
    made = jnp.where(at_atom[:, None, :], edge[:, :, None], made)
    product = jnp.sum(jnp.where(at_atom, products, 0), axis=1, keepdims=True)
    made_products = jnp.where(at_atom, sigma * product / pivot, products - scaled * product)
    return Table(
        jnp.where(which[:, None, None], made, matrix),
        jnp.where(which[:, None], made_products, products),
        inside ^ (at_atom & which[:, None]),
    )


def appended(table: Table, slot: jax.Array, gram: jax.Array, product: jax.Array, which: jax.Array) -> Table:
    """A new atom in a slot that was empty, outside; the slot stays empty in the other rows.

    Args:
        table: of any set.
        slot: `[]` int32.
        gram: `[rows, m]`, products of the new atom with the others; 0 for empty slots.
        product: `[rows]`, what is left of x times the new atom.
        which: `[rows]` bool.
    """
    gram = jnp.where(which[:, None], gram, 0)
    g = jnp.where(table.inside, gram, 0)
    projected = jnp.einsum("bi,bij->bj", g, table.matrix)
    row = jnp.where(table.inside, -projected, gram - projected)
    row = row.at[:, slot].set(jnp.where(which, 1, 0).astype(row.dtype) - jnp.sum(g * row, axis=1))
    matrix = table.matrix.at[:, slot, :].set(row).at[:, :, slot].set(row)
    return Table(matrix, table.products.at[:, slot].set(jnp.where(which, product, 0)), table.inside)


def polished(x: jax.Array, atoms: jax.Array, table: Table) -> jax.Array:
    """The codes of the atoms inside, without the error that squaring the atoms brought.

    Two steps of Newton's method with the table's inverse, on what is left of x itself (the corrected semi-normal
    equations). The last one is differentiated, the set and the inverse are not: for a set that stays the same this is
    the derivative of the least squares in x and in the atoms.

    Args:
        x: `[rows, d]`.
        atoms: `[rows, m, d]`, those of the table.
        table: see above.

    Returns:
        `[rows, m]`.
    """
    both = table.inside[:, :, None] & table.inside[:, None, :]
    inverse = lax.stop_gradient(jnp.where(both, -table.matrix, 0))
    codes = codes_of(table)
    for _ in range(2):
        codes = lax.stop_gradient(codes)
        left = x - jnp.einsum("bm,bmd->bd", codes, atoms)
        codes = codes + jnp.einsum("bij,bj->bi", inverse, jnp.einsum("bmd,bd->bm", atoms, left))
    return codes


def _distances(table: Table) -> jax.Array:
    """`[rows, m]`: the diagonal."""
    return jnp.diagonal(table.matrix, axis1=1, axis2=2)
