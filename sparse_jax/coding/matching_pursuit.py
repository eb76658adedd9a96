"""Matching pursuit for many rows at once. Source: Mallat & Zhang 1993.

    r = x;   k times:   j = argmax_i |r . w_i| / ||w_i||        (signed False: r . w_i)
                        v = r . w_j / ||w_j||^2
                        c_j = c_j + v,    r = r - v w_j

What is left is orthogonal to the last atom only, so that an atom may be chosen again: its values add up, and a row has
at most k active features. ||r|| never rises. With signed False a step that finds no positive correlation does nothing;
as values are only ever added, codes are not negative.

On atoms of norm 1, and signed False, this is the encoder of `dictionaries/matching_pursuit.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding.best_atom import best_atom, check_pursuit, inverse_norms
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes, decode


def matching_pursuit(
    x: jax.Array, W: jax.Array, k: int, *, signed: bool = False, start: SparseCodes | None = None
) -> SparseCodes:
    """Codes after k greedy steps.

    Differentiable in x, W and the values of start, the choices taken as given.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`, of any norm; a zero atom is never chosen.
        k: how many steps, static.
        signed: whether values may be negative.
        start: codes to begin with, `[rows, slots]`; none by default.

    Returns:
        Slots in the order of first choice, `[rows, k]`, behind those of `start` if it is given: `[rows, slots + k]`.

    Raises:
        InputError: shapes that do not belong together, or k below 1.
    """
    check_pursuit(x, W, k)
    rows, n = x.shape[0], W.shape[0]
    # The index n, which no atom has, is a slot that is free.
    values, indices = jnp.zeros((rows, k), x.dtype), jnp.full((rows, k), n, jnp.int32)
    left, used = x, 0
    if start is not None:
        if start.values.ndim != 2 or start.values.shape[0] != rows or start.indices.shape != start.values.shape:
            raise InputError(
                f"start with values {start.values.shape} and indices {start.indices.shape} for {rows} rows: give "
                "[rows, slots] both"
            )
        left, used = x - decode(start, W), start.values.shape[1]
        values = jnp.concatenate([start.values, values], axis=1)
        indices = jnp.concatenate([jnp.where(start.values != 0, start.indices, n), indices], axis=1)
    norms = inverse_norms(W)

    def step(state, slot):
        left, values, indices = state
        chosen, _ = best_atom(*lax.stop_gradient((left, W, norms)), signed)
        atom, inverse = W[chosen], norms[chosen]
        # Again, as a value that can be differentiated; the same clip undoes a step that found nothing.
        value = jnp.sum(left * atom, axis=-1) * inverse * inverse
        value = value if signed else jnp.maximum(value, 0)
        same = indices == chosen[:, None]
        place = jnp.where(jnp.any(same, axis=1), jnp.argmax(same, axis=1).astype(jnp.int32), slot)
        row = jnp.arange(rows, dtype=jnp.int32)
        indices = indices.at[row, place].set(jnp.where(value != 0, chosen, indices[row, place]))
        return (left - value[:, None] * atom, values.at[row, place].add(value), indices), None

    slots = jnp.arange(used, used + k, dtype=jnp.int32)
    (_, values, indices), _ = lax.scan(step, (left, values, indices), slots)
    return SparseCodes(values, jnp.where(indices < n, indices, 0))
