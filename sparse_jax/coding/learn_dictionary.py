"""Dictionary learning from rows in memory: solve a batch, move the atoms, and so on. Learners are in `learn.py`.

The penalty may fall while atoms are learned:

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_jax.coding.learn import Learner, refresh
from sparse_jax.coding.working_set import lasso
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul, unit_rows

# Steps in one call, between which the program can be interrupted.
_STEPS_TOGETHER = 50
# Relative duality gap of the codes, where no solver is given.
_TOLERANCE = 1e-3

# (x `[rows, d]`, W, penalty) -> codes `[rows, n_features]`
Solve = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Learned(NamedTuple):
    """What `learn_dictionary` returns.

    Attributes:
        W: `[n_features, d]`, rows of norm 1.
        objective: `[steps]` mean over the rows of each batch, before its update.
        l0: `[steps]` mean number of active features.
    """

    W: jax.Array
    objective: jax.Array
    l0: jax.Array


def falling_penalty(first: float, last: float, share: float, steps: int) -> jax.Array:
    """`[steps, 1]` lambda of each step, see the header.

    Raises:
        InputError: a penalty that is not positive, or a share outside 0 to 1.
    """
    if not (first > 0 and last > 0):
        raise InputError(f"penalties from {first} to {last}: give positive numbers")
    if not 0 <= share <= 1:
        raise InputError(f"share {share} of the steps for the penalty to fall in: give 0 to 1")
    left = jnp.maximum(1 - jnp.arange(steps, dtype=jnp.float32) / max(share * steps, 1), 0)
    return (last * (first / last) ** left)[:, None]


def to_a_gap(x: jax.Array, W: jax.Array, penalty: jax.Array) -> jax.Array:
    """`lasso`'s codes to a gap of 1e-3, not negative."""
    return lasso(x, W, penalty, _TOLERANCE).codes


def learn_dictionary(
    x: jax.Array,
    W: jax.Array,
    penalty: jax.Array | float,
    learner: Learner,
    steps: int,
    *,
    batch: int = 256,
    key: jax.Array,
    solve: Solve = to_a_gap,
    refresh_every: int = 0,
    mesh: Mesh | None = None,
) -> Learned:
    """Atoms learned from rows in memory.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]` atoms to begin with (rows of x, random ones, an autoencoder's decoder).
        penalty: lambda: a scalar, one a feature `[n_features]`, or those of every step, `[steps, 1]` (see
            `falling_penalty`) or `[steps, n_features]`.
        learner: how atoms move.
        steps: batches, drawn without replacement within a pass over the rows.
        batch: rows in one.
        key: decides the order of rows and what dead atoms become.
        solve: how codes are found; a function of the module's level, so that it compiles once.
        refresh_every: atoms that were silent for so many steps are replaced (see `learn.refresh`); 0: never.
        mesh: devices over whose one axis the rows of a batch are laid out; None: one device.

    Raises:
        InputError: a batch that is larger than the data, or that the devices cannot share evenly; penalties of
            another number of steps.
    """
    if not 0 < batch <= x.shape[0]:
        raise InputError(f"batch {batch} of {x.shape[0]} rows: give a number from 1 to that of the rows")
    if mesh is not None and batch % mesh.size:
        raise InputError(f"batch {batch} on {mesh.size} devices: give a multiple of their number")
    penalty = jnp.asarray(penalty, x.dtype)
    if penalty.ndim == 2 and penalty.shape[0] != steps:
        raise InputError(f"penalties of {penalty.shape[0]} steps for {steps}: give one for each, [steps, 1]")
    of_steps = penalty if penalty.ndim == 2 else jnp.broadcast_to(penalty, (steps, penalty.size))
    W = unit_rows(W)
    carry = W, learner.init(W), jnp.zeros(W.shape[0], jnp.int32), jnp.arange(x.shape[0], dtype=jnp.int32)
    if mesh is not None:
        x, *carry = jax.device_put((x, *carry), NamedSharding(mesh, P()))
        carry = tuple(carry)
    solve = solve if mesh is None else _over_rows(solve, mesh)
    values, counts = [jnp.zeros(0, x.dtype)], [jnp.zeros(0, x.dtype)]
    for start in range(0, steps, _STEPS_TOGETHER):
        numbers = jnp.arange(start, min(start + _STEPS_TOGETHER, steps), dtype=jnp.int32)
        given = numbers, of_steps[start : start + _STEPS_TOGETHER]
        carry, (value, l0) = _steps(learner, solve, batch, refresh_every, key, x, carry, given)
        values.append(value)
        counts.append(l0)
    return Learned(carry[0], jnp.concatenate(values), jnp.concatenate(counts))


def _over_rows(solve: Solve, mesh: Mesh) -> Solve:
    """Every device solves its own rows."""
    over_rows = P(mesh.axis_names[0])
    # Rows take different numbers of rounds, so that loops end at different times on different devices.
    return jax.shard_map(solve, mesh=mesh, in_specs=(over_rows, P(), P()), out_specs=over_rows, check_vma=False)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _steps(
    learner: Learner,
    solve: Solve,
    batch: int,
    refresh_every: int,
    key: jax.Array,
    x: jax.Array,
    carry: tuple[jax.Array, Any, jax.Array, jax.Array],
    given: tuple[jax.Array, jax.Array],
):
    """Steps of given (number, penalty): (carry, (objective, L0) `[steps]`).

    The carry: atoms, the learner's state, steps that each was silent for, the order of the rows in this pass.
    """
    per_pass, weight = x.shape[0] // batch, jnp.ones(batch, x.dtype)

    def shuffled(number, order):
        return jax.random.permutation(jax.random.fold_in(key, number), jnp.arange(len(order), dtype=order.dtype))

    def step(carry, given):
        (W, state, silent, order), (i, lam) = carry, given
        lam = lam[0] if lam.shape == (1,) else lam
        order = lax.cond(i % per_pass == 0, shuffled, lambda _, order: order, i // per_pass, order)
        rows = x[lax.dynamic_slice_in_dim(order, (i % per_pass) * batch, batch)]
        codes = solve(rows, W, lam)
        left = rows - matmul(codes, W)
        value = jnp.mean(jnp.sum(left * left, axis=-1) + jnp.sum(lam * jnp.abs(codes), axis=-1))
        active = codes != 0
        silent = jnp.where(jnp.any(active, axis=0), 0, silent + 1)
        state, W = learner.update(state, W, rows, codes, weight)
        if refresh_every:
            dead = silent >= refresh_every
            again = jax.random.fold_in(jax.random.fold_in(key, i), 1)
            # The batch's codes are those of the atoms before the update, which are near enough to say what is left.
            W, state = lax.cond(
                jnp.any(dead),
                lambda W, state: (refresh(W, dead, rows, codes, weight, again), learner.reset(state, dead)),
                lambda W, state: (W, state),
                W,
                state,
            )
            silent = jnp.where(dead, 0, silent)
        return (W, state, silent, order), (value, jnp.mean(jnp.sum(active, axis=-1, dtype=x.dtype)))

    return lax.scan(step, carry, given)
