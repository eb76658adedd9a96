"""The best values of a row's own few atoms: least squares, or non-negative least squares. Source: Lawson & Hanson 1974
(Solving Least Squares Problems, chapter 23, algorithm NNLS).

    minimise over v   ||x - sum over slots i of v_i w_(j_i)||^2        for each row of x; optionally v >= 0

Non-negative, the solution is where   w . r = 0 for atoms inside (v > 0),   w . r <= 0 for the others,   r = x - v W:

    all atoms outside; repeat:   the atom outside with the largest w . r / ||w|| > 0 enters; if there is none, done
                                 s = least squares on the atoms inside
                                 while some s < 0:   v moves towards s as far as v >= 0, what became 0 leaves,  s anew
                                 v = s

Every round lowers the objective, so no set comes twice. Batched: rows take a step together, each has an atom enter or
leave of its own (`sweep.py`), and those that are done wait.

An atom that lies in the span of those inside never enters: a repeated atom shares nothing with its double, and has
value 0; so has a zero atom. "In the span" is what the Gram matrix cannot tell from it: a squared distance of 64 times
the dtype's smallest step from 1, that is 1e-7 of the atom's norm in float64 and 0.003 in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding.best_atom import inverse_norms
from sparse_jax.coding.sweep import Table, codes_of, may_enter, polished, swept, table_of
from sparse_jax.errors import InputError

# An atom enters if its product with what is left is above this, in units of the dtype's smallest step from 1 times what
# the product is a difference of.
_ROUNDING = 16
# Atoms that enter or leave, at most, over the number of slots.
_STEPS_PER_SLOT = 4


def least_squares_on_support(
    x: jax.Array,
    W: jax.Array,
    indices: jax.Array,
    mask: jax.Array,
    *,
    non_negative: bool = True,
    iterations: int | None = None,
) -> jax.Array:
    """The values of given atoms that leave the least of each row.

    Differentiable in x and W, for sets of active atoms that stay the same.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`, of any norm.
        indices: `[rows, k]` int32, each row's atoms; the same one may stand in several slots.
        mask: `[rows, k]` bool, which slots are in use.
        non_negative: whether values must be at least 0.
        iterations: how many atoms of a row may enter or leave with non_negative, static; 4 k by default. A row that
            needs more has admissible values that are not the best.

    Returns:
        `[rows, k]` values; 0 in slots that are not in use. Where atoms depend on each other there are many solutions:
        one with as few of them as can be.

    Raises:
        InputError: shapes that do not belong together, or fewer than 0 iterations.
    """
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        raise InputError(f"x of shape {x.shape} and W of shape {W.shape}: give x [rows, d] and W [n_features, d]")
    if indices.ndim != 2 or indices.shape[0] != x.shape[0] or mask.shape != indices.shape:
        raise InputError(
            f"indices of shape {indices.shape}, mask of shape {mask.shape} for {x.shape[0]} rows: give [rows, k] both"
        )
    if iterations is not None and iterations < 0:
        raise InputError(f"iterations {iterations}: give 0 or more")
    inverse = jnp.where(mask, inverse_norms(W)[indices], 0)
    atoms = W[indices] * inverse[:, :, None]
    fixed = lax.stop_gradient(atoms)
    table = table_of(jnp.einsum("bid,bjd->bij", fixed, fixed), jnp.einsum("bmd,bd->bm", fixed, lax.stop_gradient(x)))
    if non_negative:
        most = _STEPS_PER_SLOT * indices.shape[1] if iterations is None else iterations
        table, admissible, solved = non_negative_set(table, jnp.zeros_like(inverse), most)
        values = jnp.where(solved[:, None], jnp.maximum(polished(x, atoms, table), 0), admissible)
    else:
        values = polished(x, atoms, all_inside(table))
    return values * inverse


def non_negative_set(table: Table, codes: jax.Array, most: int) -> tuple[Table, jax.Array, jax.Array]:
    """The atoms that are inside in the non-negative solution.

    Args:
        table: of any set.
        codes: `[rows, m]`, admissible: at least 0, and 0 outside.
        most: how many atoms of a row may enter or leave.

    Returns:
        (table, codes `[rows, m]`, whether they are the solution `[rows]`).
    """
    scale = jnp.max(jnp.abs(table.products), axis=-1)
    rounding = _ROUNDING * float(jnp.finfo(codes.dtype).eps)

    def step(state):
        table, codes, solved, spent = state
        wanted = codes_of(table)
        negative = table.inside & (wanted < 0)
        back = jnp.any(negative, axis=-1)
        share = jnp.where(negative, codes / jnp.where(negative, codes - wanted, 1), jnp.inf)
        leaving = jnp.argmin(share, axis=-1).astype(jnp.int32)
        reached = codes + jnp.min(share, axis=-1, keepdims=True, initial=1) * (wanted - codes)
        at_leaving = jnp.arange(codes.shape[1], dtype=jnp.int32) == leaving[:, None]
        reached = jnp.where(at_leaving | ~table.inside, 0, jnp.maximum(reached, 0))
        codes = jnp.where(back[:, None], reached, wanted)

        product = jnp.where(may_enter(table), table.products, -jnp.inf)
        entering = jnp.argmax(product, axis=-1).astype(jnp.int32)
        found = jnp.max(product, axis=-1) > rounding * (scale + jnp.sum(codes, axis=-1))
        moves = ~solved & (back | found)
        return swept(table, jnp.where(back, leaving, entering), moves), codes, ~moves, spent + 1

    def going(state):
        return jnp.any(~state[2]) & (state[3] < most)

    begun = table, codes, jnp.zeros(codes.shape[0], bool), jnp.zeros((), jnp.int32)
    table, codes, solved, _ = lax.while_loop(going, step, begun)
    return table, codes, solved


def all_inside(table: Table) -> Table:
    """Every atom enters that is not in the span of others; the one that is furthest from it first."""

    def step(_, table):
        distance = jnp.where(may_enter(table), jnp.diagonal(table.matrix, axis1=1, axis2=2), 0)
        atom = jnp.argmax(distance, axis=-1).astype(jnp.int32)
        return swept(table, atom, jnp.max(distance, axis=-1) > 0)

    return lax.fori_loop(0, table.products.shape[1], step, table)
