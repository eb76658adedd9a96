"""Orthogonal matching pursuit for many rows at once. Source: Pati et al. 1993; Rubinstein et al. 2008 (values by
Gram matrices that are brought up to date, rather than made anew); non-negative: Bruckstein et al. 2008.

    r = x;   k times:   j = argmax_i |r . w_i| / ||w_i||        (signed False: r . w_i)
                        c = least squares of x on all atoms chosen so far        (signed False: non-negative)
                        r = x - c W

What is left is orthogonal to every chosen atom, so none is chosen twice, and k steps choose k atoms. scikit-learn's
`orthogonal_mp` is the same for atoms of norm 1. The values are kept by a table that an atom enters in k^2 operations
(`sweep.py`), where Rubinstein et al. extend a Cholesky factor; the non-negative ones by Lawson and Hanson's method,
begun where the step before ended. Arrays have room for k atoms from the start: one compilation.

Non-negative values leave products w . r that are negative for atoms at 0: none of those is chosen again either.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding.best_atom import best_atom, check_pursuit, inverse_norms
from sparse_jax.coding.least_squares_on_support import non_negative_set
from sparse_jax.coding.sweep import Table, appended, codes_of, may_enter, polished, swept, table_of
from sparse_jax.numerics.sparse_codes import SparseCodes

# A row has nothing left for the atoms when the best correlation is below this, in units of the dtype's smallest step
# from 1 times the row's norm: it is the rounding of the subtraction.
_NOTHING = 64
# Atoms that enter or leave in one step at most, over k: most often it is one.
_MOVES_PER_SLOT = 4


class _State(NamedTuple):
    """Of each row.

    Attributes:
        indices: `[rows, k]` int32, chosen atoms; n_features for an empty slot.
        atoms: `[rows, k, d]`, of norm 1; 0 for an empty slot.
        table: of these atoms.
        codes: `[rows, k]`, for atoms of norm 1.
        left: `[rows, d]`.
        solved: `[rows]` bool: the codes are the best for these atoms.
    """

    indices: jax.Array
    atoms: jax.Array
    table: Table
    codes: jax.Array
    left: jax.Array
    solved: jax.Array


def orthogonal_matching_pursuit(
    x: jax.Array, W: jax.Array, k: int, *, signed: bool = True, tolerance: jax.Array | float = 0.0
) -> SparseCodes:
    """Codes of at most k atoms, the best values for those that were chosen.

    Differentiable in x and W, the choices taken as given. Memory: k times that of x.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`, of any norm; a zero atom is never chosen.
        k: how many steps, static. A row whose residual is 0 to rounding, or with no atom left that has a part in it,
            chooses no more.
        signed: whether codes may be negative. If not, an atom may be chosen and lose its value to later ones.
        tolerance: a row is done as soon as ||r||^2 is at most this; a number, or `[rows]`.

    Returns:
        Slots in the order of choice, `[rows, k]`.

    Raises:
        InputError: shapes that do not belong together, or k below 1.
    """
    check_pursuit(x, W, k)
    norms = inverse_norms(W)
    fixed = lax.stop_gradient((x, W, norms))
    floor = _NOTHING * float(jnp.finfo(x.dtype).eps) * jnp.sqrt(jnp.sum(fixed[0] * fixed[0], axis=-1))
    enough = jnp.broadcast_to(jnp.asarray(tolerance, x.dtype), x.shape[:1])

    def step(state, slot):
        return _step(*fixed, signed, floor, enough, state, slot), None

    state, _ = lax.scan(step, _start(fixed[0], W.shape[0], k), jnp.arange(k, dtype=jnp.int32))
    used = state.indices < W.shape[0]
    indices = jnp.where(used, state.indices, 0)
    inverse = jnp.where(used, norms[indices], 0)
    codes = polished(x, W[indices] * inverse[:, :, None], state.table)
    if not signed:
        codes = jnp.where(state.solved[:, None], jnp.maximum(codes, 0), state.codes)
    return SparseCodes(codes * inverse, indices)


def _start(x: jax.Array, n_features: int, k: int) -> _State:
    rows, d = x.shape
    nothing = jnp.zeros((rows, k), x.dtype)
    table = table_of(jnp.zeros((rows, k, k), x.dtype), nothing)
    indices, solved = jnp.full((rows, k), n_features, jnp.int32), jnp.ones(rows, bool)
    return _State(indices, jnp.zeros((rows, k, d), x.dtype), table, nothing, x, solved)


def _step(x, W, norms, signed: bool, floor, enough, state: _State, slot) -> _State:
    """One more atom for every row that is not done."""
    chosen, correlation = best_atom(state.left, W, norms, signed)
    # What is left of a row that is done stays as it is, and so does what is said here.
    going = (jnp.abs(correlation) > floor) & (jnp.sum(state.left * state.left, axis=-1) > enough)
    atom = jnp.where(going[:, None], W[chosen] * norms[chosen][:, None], 0)
    gram = jnp.einsum("bmd,bd->bm", state.atoms, atom)
    table = appended(state.table, slot, gram, correlation, going)
    # An atom in the span of those at hand has a correlation of 0 but for rounding, and it was the largest: row done.
    going = going & jnp.take(may_enter(table), slot, axis=1)
    indices = state.indices.at[:, slot].set(jnp.where(going, chosen, W.shape[0]))
    atoms = state.atoms.at[:, slot].set(jnp.where(going[:, None], atom, 0))
    if signed:
        table = swept(table, jnp.broadcast_to(slot, going.shape), going)
        codes, solved = codes_of(table), state.solved
    else:
        table, codes, solved = non_negative_set(table, state.codes, _MOVES_PER_SLOT * indices.shape[1])
    left = x - jnp.einsum("bm,bmd->bd", codes, atoms)
    return _State(indices, atoms, table, codes, left, solved)
