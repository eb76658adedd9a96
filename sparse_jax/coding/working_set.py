"""The lasso solved on each row's own few atoms, and only checked on all: exact, and fast where codes are sparse.

Source: working sets as in Johnson & Guestrin 2015 (Blitz) and Massias et al. 2018 (Celer); coordinate descent on each
set as in Friedman et al. 2010 ("covariance updates"). Batched here: every row has a set of as many slots.

    round, for some rows:   S     = the active features of a row, and those that break its conditions most
                            c_S   = FISTA on  ||x - c_S W_S||^2 + lambda ||c_S||_1,  by the Gram matrix of S
                            r     = x - c_S W_S;   all correlations r W^T;   the duality gap, which bounds the error

A row is done when its gap is below the tolerance, and costs nothing from then on. A row whose set is full of active
features goes on with more slots; what does not fit the largest set is left to FISTA. A round takes one product with W,
an iteration of FISTA two; and a few rounds do where FISTA on all atoms takes hundreds of iterations: the atoms of a
trained dictionary are coherent, and the largest eigenvalue of all of them is many times that of a few.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding.fista import fista_by_gram, fista_until
from sparse_jax.coding.lasso import (
    Measure,
    Solution,
    check_problem,
    gap_within,
    largest_scale,
    primal,
    reachable,
    violation_scale,
)
from sparse_jax.numerics import matmul
from sparse_jax.numerics.sparse_codes import SparseCodes, dense
from sparse_jax.numerics.topk import spread_top_k

# Rows in a round of the smallest sets, whose Gram matrices stay in the caches; fewer of larger ones.
ROWS_TOGETHER, FEWEST_TOGETHER = 128, 16
# Slots of a set, at first and for the rows that fill it.
SLOTS = (32, 64, 128, 256)
# Iterations on a set in a round, and rounds that a row may take.
ITERATIONS = 32
MOST_ROUNDS = 60
# After so many rounds twice as many iterations are taken in each, after as many more three times, and so on.
_MORE_AFTER = 4
# The Gram matrix of all atoms is made where it has at most so many times the numbers that all rows' sets have together.
_GRAM_SHARE = 6


class _Problem(NamedTuple):
    """x `[rows, d]`, W `[n, d]`, its Gram matrix `[n, n]` or None, penalty that broadcasts against `[rows, n]`.

    `scale` `[rows]`: what violations are measured against.
    """

    x: jax.Array
    W: jax.Array
    gram: jax.Array | None
    penalty: jax.Array
    scale: jax.Array


class _Sets(NamedTuple):
    """Where every row stands.

    Attributes:
        values: `[rows, slots]` codes; their 0 is an empty slot.
        indices: `[rows, slots]` int32, their features.
        correlations: `[rows, n]` what is left of x times the atoms.
        gap, violation: `[rows]` as in `Solution`; infinite before the first round.
        full: `[rows]` bool: every slot holds an active feature.
        rounds: `[rows]` int32.
    """

    values: jax.Array
    indices: jax.Array
    correlations: jax.Array
    gap: jax.Array
    violation: jax.Array
    full: jax.Array
    rounds: jax.Array


class _How(NamedTuple):
    """Static choices, see `lasso`."""

    signed: bool
    started: bool
    measure: Measure
    iterations: int
    most_rounds: int


def lasso(
    x: jax.Array,
    W: jax.Array,
    penalty: jax.Array | float,
    tolerance: float = 1e-4,
    *,
    measure: Measure = "gap",
    start: jax.Array | None = None,
    signed: bool = False,
    gram: jax.Array | None = None,
    slots: tuple[int, ...] = SLOTS,
    iterations: int = ITERATIONS,
    most_rounds: int = MOST_ROUNDS,
) -> Solution:
    """Codes that are within `tolerance` of the solution, by `measure`.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`.
        penalty: lambda, see lasso.py.
        tolerance: for every row; below what the dtype can tell, that is taken.
        measure: "gap", the relative duality gap, or "kkt", the violation of the conditions over lambda.
        start: `[rows, n_features]` codes to begin with: what is active there is in the first sets.
        signed: whether codes may be negative.
        gram: `W W^T`, where it is known already.
        slots: of the sets, growing; static.
        iterations: of FISTA on a set in a round.
        most_rounds: after so many a row is left to FISTA on all atoms.

    Raises:
        InputError: shapes that do not belong together, or a measure that is not known.
    """
    penalty = check_problem(x, W, penalty)
    tolerance = reachable(tolerance, x.dtype, measure)
    how = _How(signed, start is not None, measure, iterations, most_rounds)
    rows, n = x.shape[0], W.shape[0]
    slots = tuple(sorted({min(m, n) for m in slots}))
    if gram is None and n * n <= _GRAM_SHARE * rows * slots[0] ** 2:
        gram = matmul(W, W.T)
    problem = _Problem(x, W, gram, penalty, violation_scale(x, W, penalty))
    sets = _empty_sets(problem, slots[0]) if start is None else _started_sets(problem, start, slots[0], signed)
    for m, before in zip(slots, (0, *slots)):
        widen = [(0, 0), (0, m - sets.values.shape[1])]
        sets = sets._replace(values=jnp.pad(sets.values, widen), indices=jnp.pad(sets.indices, widen))
        # What is wider than before is free for new features; rows that come from narrower sets are full of active ones.
        new = m - before if before else max(m // 2, 1)
        group = min(max(ROWS_TOGETHER * slots[0] // m, FEWEST_TOGETHER), rows)
        sets = _rounds(how, problem, sets, tolerance, new, group)
        sets = sets._replace(full=jnp.zeros_like(sets.full))
    codes = dense(SparseCodes(sets.values, sets.indices), n)
    solution = Solution(codes, sets.gap, sets.violation, sets.rounds)
    unsolved = _unsolved(how, sets, tolerance)
    return lax.cond(
        jnp.any(unsolved), partial(_by_fista, how, problem, tolerance), lambda _, solution: solution, unsolved, solution
    )


def _by_fista(how: _How, problem: _Problem, tolerance: jax.Array, which: jax.Array, solution: Solution) -> Solution:
    """The rows that did not fit the largest sets, or took too many rounds, solved on all atoms."""
    limits = jnp.where(which, tolerance, jnp.inf)
    rest = fista_until(
        problem.x,
        problem.W,
        problem.penalty,
        limits,
        measure=how.measure,
        start=solution.codes,
        signed=how.signed,
    )
    return rest._replace(iterations=solution.iterations + rest.iterations)


def _empty_sets(problem: _Problem, slots: int) -> _Sets:
    """Before the first round, which chooses features."""
    rows, n = problem.x.shape[0], problem.W.shape[0]
    dtype = problem.x.dtype
    far = jnp.full(rows, jnp.inf, dtype)
    return _Sets(
        jnp.zeros((rows, slots), dtype),
        jnp.zeros((rows, slots), jnp.int32),
        jnp.zeros((rows, n), dtype),
        far,
        far,
        jnp.zeros(rows, bool),
        jnp.zeros(rows, jnp.int32),
    )


def _started_sets(problem: _Problem, start: jax.Array, slots: int, signed: bool) -> _Sets:
    """What is active at the start, and then the atoms that are most like what it leaves of x."""
    correlations = matmul(problem.x - matmul(start, problem.W), problem.W.T)
    score = jnp.where(start != 0, jnp.inf, _score(correlations, problem.penalty, signed))
    indices = spread_top_k(score, slots)
    values = jnp.take_along_axis(start, indices, 1)
    return _empty_sets(problem, slots)._replace(values=values, indices=indices)


def _score(correlations: jax.Array, penalty: jax.Array, signed: bool) -> jax.Array:
    """`[rows, n]`: the more above 0, the more the objective falls where a feature becomes active."""
    return (jnp.abs(correlations) if signed else correlations) - penalty / 2


def _unsolved(how: _How, sets: _Sets, tolerance: jax.Array) -> jax.Array:
    return (sets.gap if how.measure == "gap" else sets.violation) > tolerance


def _rounds(how: _How, problem: _Problem, sets: _Sets, tolerance: jax.Array, new: int, group: int) -> _Sets:
    """Rounds on groups of rows until none is unsolved that has a free slot and rounds left."""

    def waiting(sets):
        return _unsolved(how, sets, tolerance) & ~sets.full & (sets.rounds < how.most_rounds)

    def one(sets):
        # Those that have had the fewest rounds; at the end solved ones fill the group: they only get better.
        _, rows = lax.top_k(jnp.where(waiting(sets), how.most_rounds - sets.rounds, 0), group)
        here = _round(how, _chosen(problem, rows), jax.tree.map(lambda a: a[rows], sets), new)
        return jax.tree.map(lambda a, b: a.at[rows].set(b), sets, here)

    return lax.while_loop(lambda sets: jnp.any(waiting(sets)), one, sets)


def _chosen(problem: _Problem, rows: jax.Array) -> _Problem:
    per_row = problem.penalty.ndim == 2 and problem.penalty.shape[0] > 1
    penalty = problem.penalty[rows] if per_row else problem.penalty
    return problem._replace(x=problem.x[rows], penalty=penalty, scale=problem.scale[rows])


def _round(how: _How, problem: _Problem, sets: _Sets, new: int) -> _Sets:
    """One round of all these rows: free slots get new features, the sets are solved."""
    values, indices = _features(how, problem, sets, new)
    atoms = problem.W[indices]
    penalty = _penalty_at(problem.penalty, indices)
    among = jnp.einsum("bmd,bd->bm", atoms, problem.x)
    gram = _gram_of(problem, indices, atoms)
    # Rows that come back again and again have sets that are hard to solve, rather than wrong ones.
    iterations = how.iterations * (1 + jnp.max(sets.rounds) // _MORE_AFTER)
    values = fista_by_gram(gram, among, penalty, values, iterations, how.signed)
    left = problem.x - jnp.einsum("bm,bmd->bd", values, atoms)
    correlations = matmul(left, problem.W.T)
    gap = gap_within(
        problem.x,
        left,
        largest_scale(correlations, problem.penalty, how.signed),
        primal(left, penalty, values),
    )
    active = values != 0
    # A set that holds every feature cannot be too small.
    full = jnp.all(active, axis=-1) & (values.shape[1] < problem.W.shape[0])
    outside = jnp.max(_score(correlations, problem.penalty, how.signed), axis=-1)
    within = jnp.abs(2 * jnp.take_along_axis(correlations, indices, 1) - penalty * jnp.sign(values))
    violation = jnp.maximum(jnp.max(jnp.where(active, within, 0), axis=-1), 2 * outside) / problem.scale
    return _Sets(values, indices, correlations, gap, violation, full, sets.rounds + 1)


def _features(how: _How, problem: _Problem, sets: _Sets, new: int) -> tuple[jax.Array, jax.Array]:
    """(values, indices) of the sets to be solved: in a row's first round other features than later."""
    fresh = sets.rounds == 0

    def first():
        if how.started:
            return sets.values, sets.indices
        score = _score(matmul(problem.x, problem.W.T), problem.penalty, how.signed)
        return sets.values, spread_top_k(score, sets.values.shape[1])

    def later():
        return _with_new_features(sets, _score(sets.correlations, problem.penalty, how.signed), new)

    def either():
        return tuple(jnp.where(fresh[:, None], a, b) for a, b in zip(first(), later()))

    return lax.switch(jnp.where(jnp.all(fresh), 0, jnp.where(jnp.any(fresh), 2, 1)), (first, later, either))


def _with_new_features(sets: _Sets, score: jax.Array, new: int) -> tuple[jax.Array, jax.Array]:
    """(values, indices): the active features, then the `new` with the best scores, then the rest of the set."""
    rows = sets.values.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    score = score.at[row, sets.indices].set(-jnp.inf)
    best = spread_top_k(score, min(new, score.shape[1]))
    active = sets.values != 0
    count = jnp.sum(active, axis=1, keepdims=True, dtype=jnp.int32)
    # Where each slot goes: active ones move up, the others behind the new ones or out of the set.
    up = jnp.cumsum(active, axis=1, dtype=jnp.int32) - 1
    behind = count + best.shape[1] + jnp.cumsum(~active, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(active, up, behind)
    values = jnp.zeros_like(sets.values).at[row, place].set(sets.values, mode="drop")
    indices = jnp.zeros_like(sets.indices).at[row, place].set(sets.indices, mode="drop")
    entering = count + jnp.arange(best.shape[1], dtype=jnp.int32)
    return values, indices.at[row, entering].set(best, mode="drop")


def _penalty_at(penalty: jax.Array, indices: jax.Array) -> jax.Array:
    """`[rows, slots]`, or what broadcasts to it: the penalties of the features in the slots."""
    if penalty.ndim == 0 or penalty.shape[-1] == 1:
        return penalty
    if penalty.ndim == 1 or penalty.shape[0] == 1:
        return penalty.reshape(-1)[indices]
    return jnp.take_along_axis(penalty, indices, 1)


def _gram_of(problem: _Problem, indices: jax.Array, atoms: jax.Array) -> jax.Array:
    """`[rows, slots, slots]`: products of the atoms in each row's slots."""
    if problem.gram is not None:
        # Fused with what makes the indices, or with what follows, the gather takes four times as long on a CPU.
        rows, columns = lax.optimization_barrier((indices[:, :, None], indices[:, None, :]))
        return lax.optimization_barrier(problem.gram.at[rows, columns].get(mode="promise_in_bounds"))
    if jax.default_backend() == "cpu":  # one product after the other: a batched one took 1.5 times as long
        return lax.map(lambda w: matmul(w, w.T), atoms)
    return jnp.einsum("bid,bjd->bij", atoms, atoms)
