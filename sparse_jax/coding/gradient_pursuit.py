"""Gradient pursuit for many rows at once. Source: Blumensath & Davies 2008 ("Gradient pursuits", section III).

    r = x;   k times:   j = argmax_i |r . w_i| / ||w_i||         j joins the active set A        (signed False: r . w_i)
                        g_i = r . u_i  for i in A,  u_i = w_i / ||w_i||
                        v   = sum over A of g_i u_i,    a = r . v / ||v||^2
                        c_A = c_A + a g,    r = r - a v

One step along the gradient, as far as is best, in place of the least squares of orthogonal matching pursuit: values
between those and matching pursuit's. The first atom alone is its matching pursuit step, and ||r|| never rises.

With signed False (not in the paper) atoms that are at 0 and would become negative stand aside, and the step ends where
a code becomes 0, if that is before its best length; so codes are not negative, and ||r|| never rises.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding.best_atom import best_atom, check_pursuit, inverse_norms
from sparse_jax.numerics.sparse_codes import SparseCodes


class _State(NamedTuple):
    """Of each row.

    Attributes:
        left: `[rows, d]`.
        indices: `[rows, k]` int32, the active set; n_features for an empty slot.
        atoms: `[rows, k, d]`, of norm 1; 0 for an empty slot.
        codes: `[rows, k]`, for atoms of norm 1.
    """

    left: jax.Array
    indices: jax.Array
    atoms: jax.Array
    codes: jax.Array


def gradient_pursuit(x: jax.Array, W: jax.Array, k: int, *, signed: bool = False) -> SparseCodes:
    """Codes after k choices, each with one gradient step on all atoms chosen so far.

    Differentiable in x and W, the choices taken as given. Memory: k times that of x.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`, of any norm; a zero atom is never chosen.
        k: how many steps, static. One that chooses an active atom again, or finds none, only moves the values.
        signed: whether codes may be negative.

    Returns:
        Slots in the order of choice, `[rows, k]`.

    Raises:
        InputError: shapes that do not belong together, or k below 1.
    """
    check_pursuit(x, W, k)
    (rows, d), n = x.shape, W.shape[0]
    norms = inverse_norms(W)

    def step(state, slot):
        chosen, correlation = best_atom(*lax.stop_gradient((state.left, W, norms)), signed)
        found = jnp.abs(correlation) > 0 if signed else correlation > 0
        new = found & ~jnp.any(state.indices == chosen[:, None], axis=1)
        indices = state.indices.at[:, slot].set(jnp.where(new, chosen, n))
        atom = jnp.where(new[:, None], W[chosen] * norms[chosen][:, None], 0)
        atoms = state.atoms.at[:, slot].set(atom)
        codes, left = _moved(state._replace(indices=indices, atoms=atoms), signed)
        return _State(left, indices, atoms, codes), None

    state = _State(
        x, jnp.full((rows, k), n, jnp.int32), jnp.zeros((rows, k, d), x.dtype), jnp.zeros((rows, k), x.dtype)
    )
    state, _ = lax.scan(step, state, jnp.arange(k, dtype=jnp.int32))
    used = state.indices < n
    indices = jnp.where(used, state.indices, 0)
    return SparseCodes(jnp.where(used, state.codes * norms[indices], 0), indices)


def _moved(state: _State, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(codes, what they leave) after one step along the gradient."""
    codes = state.codes
    along = jnp.einsum("bmd,bd->bm", state.atoms, state.left)
    if not signed:
        along = jnp.where((codes > 0) | (along > 0), along, 0)
    v = jnp.einsum("bm,bmd->bd", along, state.atoms)
    bend = jnp.sum(v * v, axis=-1)
    length = jnp.where(bend > 0, jnp.sum(state.left * v, axis=-1) / jnp.where(bend > 0, bend, 1), 0)
    if signed:
        return codes + length[:, None] * along, state.left - length[:, None] * v
    falling = along < 0
    room = jnp.where(falling, codes / jnp.where(falling, -along, 1), jnp.inf)
    first = jnp.min(room, axis=-1)
    length = jnp.minimum(length, first)
    # Exactly 0, where the step ends because of it.
    ends = falling & (room <= length[:, None])
    made = jnp.where(ends, 0, jnp.maximum(codes + length[:, None] * along, 0))
    return made, state.left - length[:, None] * v
