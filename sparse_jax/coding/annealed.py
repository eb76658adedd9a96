"""Dictionary learning for many atoms: from a large penalty to a small one, over devices. Beside `learn.py`, whose
learners and refreshed atoms it uses.

    lambda_t = last (first / last)^(1 - min(t / (share T), 1))        t < T: geometric over the first share of the steps

With a large penalty a row is explained by its few strongest features, whatever the others do: far from the solution
few codes are wrong. What the shrinkage then costs (codes that are too small, weak features left out) is made good as
the penalty falls. It is continuation, as homotopy methods and FISTA's warm starts along a path have it (Hale et al.
2008), in the outer problem; at a fixed small penalty a random start gives dense codes, which teach atoms little.

Rows of a batch are laid out over the devices of a mesh, each solves its own; atoms and the learner's state are the same
on all, and products over rows are summed by the compiler. Many steps are one call: a scan.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_jax.coding.learn import Learned, Learner, refresh
from sparse_jax.coding.working_set import lasso
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul, unit_rows

# Steps in one call, between which the program can be interrupted.
_STEPS_TOGETHER = 50


def penalties(first: float, last: float, share: float, steps: int) -> jax.Array:
    """`[steps]` lambda of each step, see the header.

    Raises:
        InputError: a penalty that is not positive, or a share outside 0 to 1.
    """
    if not (first > 0 and last > 0):
        raise InputError(f"penalties from {first} to {last}: give positive numbers")
    if not 0 <= share <= 1:
        raise InputError(f"share {share} of the steps for the penalty to fall in: give 0 to 1")
    left = jnp.maximum(1 - jnp.arange(steps, dtype=jnp.float32) / max(share * steps, 1), 0)
    return last * (first / last) ** left


def learn_annealed(
    x: jax.Array,
    W: jax.Array,
    penalty: jax.Array,
    learner: Learner,
    *,
    batch: int = 256,
    key: jax.Array,
    refresh_every: int = 0,
    tolerance: float = 1e-3,
    mesh: Mesh | None = None,
) -> Learned:
    """As `learn_dictionary`, with a penalty for every step.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]` atoms to begin with.
        penalty: `[steps]`, see `penalties`.
        learner: how atoms move.
        batch: rows in a step, drawn without replacement within a pass over the rows.
        key: decides the order of rows and what dead atoms become.
        refresh_every: atoms that were silent for so many steps are replaced; 0: never.
        tolerance: relative duality gap of the codes, which are not negative.
        mesh: devices over whose one axis the rows of a batch are laid out; None: one device.

    Raises:
        InputError: a batch that is larger than the data, or that the devices cannot share evenly.
    """
    if not 0 < batch <= x.shape[0]:
        raise InputError(f"batch {batch} of {x.shape[0]} rows: give a number from 1 to that of the rows")
    if mesh is not None and batch % mesh.size:
        raise InputError(f"batch {batch} on {mesh.size} devices: give a multiple of their number")
    steps = penalty.shape[0]
    W = unit_rows(W)
    carry = W, learner.init(W), jnp.zeros(W.shape[0], jnp.int32)
    if mesh is not None:
        x, *carry = jax.device_put((x, *carry), NamedSharding(mesh, P()))
        carry = tuple(carry)
    values, counts = [jnp.zeros(0, x.dtype)], [jnp.zeros(0, x.dtype)]
    for start in range(0, steps, _STEPS_TOGETHER):
        numbers = jnp.arange(start, min(start + _STEPS_TOGETHER, steps), dtype=jnp.int32)
        given = numbers, penalty[start : start + _STEPS_TOGETHER]
        carry, (value, l0) = _steps(learner, batch, refresh_every, tolerance, mesh, key, x, carry, given)
        values.append(value)
        counts.append(l0)
    return Learned(carry[0], jnp.concatenate(values), jnp.concatenate(counts))


def solver(mesh: Mesh | None, tolerance: float) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """(rows, W, penalty) -> codes; on a mesh every device solves its own rows."""

    def solve(rows, W, penalty):
        return lasso(rows, W, penalty, tolerance).codes

    if mesh is None:
        return solve
    over_rows = P(mesh.axis_names[0])
    # Rows take different numbers of rounds, so that loops end at different times on different devices.
    return jax.shard_map(solve, mesh=mesh, in_specs=(over_rows, P(), P()), out_specs=over_rows, check_vma=False)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _steps(
    learner: Learner,
    batch: int,
    refresh_every: int,
    tolerance: float,
    mesh: Mesh | None,
    key: jax.Array,
    x: jax.Array,
    carry: tuple[jax.Array, Any, jax.Array],
    given: tuple[jax.Array, jax.Array],
):
    """Steps of given (number, penalty): (carry, (objective, L0) `[steps]`).

    The carry: atoms, the learner's state, steps that each was silent for.
    """
    solve, per_pass = solver(mesh, tolerance), x.shape[0] // batch
    weight = jnp.ones(batch, x.dtype)

    def step(carry, given):
        (W, state, silent), (i, lam) = carry, given
        order = jax.random.permutation(jax.random.fold_in(key, i // per_pass), x.shape[0])
        rows = x[lax.dynamic_slice_in_dim(order, (i % per_pass) * batch, batch)]
        codes = solve(rows, W, lam)
        left = rows - matmul(codes, W)
        value = jnp.mean(jnp.sum(left * left, axis=-1) + lam * jnp.sum(codes, axis=-1))
        active = codes != 0
        silent = jnp.where(jnp.any(active, axis=0), 0, silent + 1)
        state, W = learner.update(state, W, rows, codes, weight)
        if refresh_every:
            dead = silent >= refresh_every
            again = jax.random.fold_in(jax.random.fold_in(key, i), 1)
            W, state = lax.cond(
                jnp.any(dead),
                lambda W, state: (refresh(W, dead, rows, codes, weight, again), learner.reset(state, dead)),
                lambda W, state: (W, state),
                W,
                state,
            )
            silent = jnp.where(dead, 0, silent)
        return (W, state, silent), (value, jnp.mean(jnp.sum(active, axis=-1, dtype=x.dtype)))

    return lax.scan(step, carry, given)
