"""FISTA and ISTA for many rows at once. Source: Beck & Teboulle 2009 (FISTA, section 4; monotone: their 2009 paper on
total variation, section V); O'Donoghue & Candes 2015 (restart by the gradient, eq. 12); Daubechies et al. 2004 (ISTA).

    z   = shrink(y - g / L, lambda / L),    g = 2 (y W - x) W^T,    L >= 2 lambda_max(W W^T)
    t'  = (1 + sqrt(1 + 4 t^2)) / 2
    y'  = z + (t - 1) / t' (z - c),    c' = z                 (ISTA: y' = z)

Restart, row by row: where (y - z) . (z - c) > 0 the momentum points uphill, and t starts again at 1. Monotone: a z with
a larger objective than c is not taken (c' = c) and the row starts again from c.

Two products a step: y W is a combination of z W and c W, which are at hand, so the objective costs nothing more. With
the Gram matrix W W^T it is one product, cheaper where n_features < 2 d.

Every function takes rows independently of each other: lay rows out over devices, or atoms (W by its first axis), and
jit does the rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sparse_jax.coding.lasso import (
    Measure,
    Solution,
    broken_conditions,
    check_problem,
    gap_within,
    largest_scale,
    primal,
    reachable,
    shrink,
    spectral_bound,
    violation_scale,
)
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul

# Iterations between two looks at the duality gap, and rows that go on together once others have finished.
CHECK_EVERY = 10
ROWS_TOGETHER = 128
# Products that make the bound on a small problem's largest eigenvalue: 5 % above it after 4, on trained atoms.
_COLLATZ = 4


class _Atoms(NamedTuple):
    """The dictionary, as a step needs it: W, its Gram matrix (or None, where two products are cheaper), and 1 / L."""

    W: jax.Array
    gram: jax.Array | None
    inverse: jax.Array


class _Given(NamedTuple):
    """What is given of each row: x, its products with the atoms (or None), its penalty."""

    x: jax.Array
    correlations: jax.Array | None
    penalty: jax.Array


class _Row(NamedTuple):
    """Where a row stands: c, what it decodes to, the point y to step from, and the momentum's t.

    What codes decode to is not kept up where the Gram matrix is used and no objectives are compared.
    """

    c: jax.Array
    decoded: jax.Array
    y: jax.Array
    y_decoded: jax.Array
    t: jax.Array


class _How(NamedTuple):
    """Static choices, see `fista`."""

    signed: bool
    momentum: bool
    restart: bool
    monotone: bool
    compute_dtype: DTypeLike | None


def fista(
    x: jax.Array,
    W: jax.Array,
    penalty: jax.Array | float,
    iterations: int,
    *,
    start: jax.Array | None = None,
    signed: bool = False,
    momentum: bool = True,
    restart: bool = True,
    monotone: bool = False,
    lipschitz: jax.Array | None = None,
    compute_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Codes after a fixed number of iterations: a scan, differentiable in x, W, penalty and start.

    Args:
        x: `[rows, d]`.
        W: `[n_features, d]`.
        penalty: lambda, see lasso.py.
        iterations: how many, static.
        start: `[rows, n_features]` codes to begin with (an encoder's, say); zeros by default.
        signed: whether codes may be negative.
        momentum: False is ISTA.
        restart: per row, by the gradient.
        monotone: the objective never rises.
        lipschitz: `2 spectral_bound(W)`, where it is known already.
        compute_dtype: of the inputs of the products.

    Raises:
        InputError: shapes that do not belong together, no iterations.
    """
    penalty = check_problem(x, W, penalty)
    if iterations < 0:
        raise InputError(f"iterations {iterations}: give 0 or more")
    how = _How(signed, momentum, restart, monotone, compute_dtype)
    atoms = _atoms(W, lipschitz)
    given = _given(x, atoms, penalty)
    row, _ = lax.scan(
        lambda row, _: (_step(how, atoms, given, row), None), _start(x, W, start), None, length=iterations
    )
    return row.c


def ista(x: jax.Array, W: jax.Array, penalty: jax.Array | float, iterations: int, **options) -> jax.Array:
    """`fista` without momentum: slower, and the objective never rises."""
    return fista(x, W, penalty, iterations, momentum=False, restart=False, **options)


def fista_until(
    x: jax.Array,
    W: jax.Array,
    penalty: jax.Array | float,
    tolerance: jax.Array | float = 1e-4,
    *,
    measure: Measure = "gap",
    max_iterations: int = 10_000,
    start: jax.Array | None = None,
    signed: bool = False,
    restart: bool = True,
    monotone: bool = False,
    lipschitz: jax.Array | None = None,
    compute_dtype: DTypeLike | None = None,
) -> Solution:
    """Codes that are within `tolerance` of the solution by `measure`, or took `max_iterations`.

    Rows that are done cost nothing: as soon as some are, the others go on in groups of `ROWS_TOGETHER`. Where rows are
    laid out over devices, give each device its own call (`shard_map`), since groups are gathered from all rows.

    Args:
        x, W, penalty, start, signed, restart, monotone, lipschitz, compute_dtype: as `fista` takes them.
        tolerance: a number, or one a row; below what the dtype can tell, that is taken.
        measure: "gap", the relative duality gap, or "kkt", the violation of the conditions over lambda.
        max_iterations: of a row, in multiples of `CHECK_EVERY`.
    """
    penalty = check_problem(x, W, penalty)
    tolerance = jnp.broadcast_to(reachable(tolerance, x.dtype, measure), x.shape[:1])
    how = _How(signed, True, restart, monotone, compute_dtype)
    atoms = _atoms(W, lipschitz)
    given = _given(x, atoms, penalty)
    group = min(ROWS_TOGETHER, x.shape[0])

    def waiting(gap, violation, spent):
        return ((gap if measure == "gap" else violation) > tolerance) & (spent < max_iterations)

    def go_on(state):
        row, gap, violation, spent = state
        # Those that have waited longest, and at the end finished ones, to fill the group: they only get better.
        needed, chosen = lax.top_k(jnp.where(waiting(gap, violation, spent), max_iterations - spent + 1, 0), group)
        here = jax.tree.map(lambda a: a[chosen], row)
        given_here = _chosen(given, chosen)
        here = lax.fori_loop(0, CHECK_EVERY, lambda _, row: _step(how, atoms, given_here, row), here)
        row = jax.tree.map(lambda a, b: a.at[chosen].set(b), row, here)
        gap_here, violation_here = _distances(atoms, given_here, here.c, signed)
        return (
            row,
            gap.at[chosen].set(gap_here),
            violation.at[chosen].set(violation_here),
            spent.at[chosen].add(jnp.where(needed > 0, CHECK_EVERY, 0)),
        )

    row = _start(x, W, start)
    state = row, *_distances(atoms, given, row.c, signed), jnp.zeros(x.shape[0], jnp.int32)
    row, gap, violation, spent = lax.while_loop(lambda state: jnp.any(waiting(*state[1:])), go_on, state)
    return Solution(row.c, gap, violation, spent)


def _chosen(given: _Given, rows: jax.Array) -> _Given:
    per_row = given.penalty.ndim == 2 and given.penalty.shape[0] > 1
    return _Given(
        given.x[rows],
        None if given.correlations is None else given.correlations[rows],
        given.penalty[rows] if per_row else given.penalty,
    )


def fista_by_gram(
    gram: jax.Array,
    b: jax.Array,
    penalty: jax.Array,
    start: jax.Array,
    iterations: jax.Array | int,
    signed: bool = False,
) -> jax.Array:
    """Codes of many small problems, each with its own atoms: FISTA with restart.

    Args:
        gram: `[rows, m, m]`, products of each row's atoms.
        b: `[rows, m]`, products of its atoms with x.
        penalty: lambda, broadcasts against `[rows, m]`.
        start: `[rows, m]` codes to begin with.
        iterations: how many; may be traced.
        signed: whether codes may be negative.

    Returns:
        `[rows, m]`.

    The step: for any v > 0 the largest eigenvalue of a matrix of entries >= 0 is at most max_i (M v)_i / v_i (Collatz
    and Wielandt), and that of |gram| is no less than that of gram. Some products make v, and the bound, good.
    """
    size = jnp.abs(gram)
    v = jnp.sum(size, axis=-1)
    for _ in range(_COLLATZ):
        v = v / jnp.maximum(jnp.max(v, axis=-1, keepdims=True), jnp.finfo(v.dtype).tiny)
        v, before = jnp.einsum("bij,bj->bi", size, v), v
    # An atom of length 0 has v 0 and takes no part.
    bound = jnp.max(jnp.where(before > 0, v / jnp.where(before > 0, before, 1), 0), axis=-1, keepdims=True)
    inverse = 1 / jnp.where(bound > 0, bound, 1)

    def step(_, state):
        c, y, t = state
        z = shrink(y - inverse * (jnp.einsum("bij,bj->bi", gram, y) - b), penalty * (inverse / 2), signed)
        again = jnp.sum((y - z) * (z - c), axis=-1, keepdims=True) > 0
        t = jnp.where(again, 1, t)
        following = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        beta = jnp.where(again, 0, (t - 1) / following)
        return z, z + beta * (z - c), following

    first = start, start, jnp.ones((start.shape[0], 1), start.dtype)
    c, _, _ = lax.fori_loop(0, iterations, step, first)
    return c


def _atoms(W: jax.Array, lipschitz: jax.Array | None) -> _Atoms:
    lipschitz = 2 * spectral_bound(W) if lipschitz is None else lipschitz
    gram = matmul(W, W.T) if W.shape[0] < 2 * W.shape[1] else None
    return _Atoms(W, gram, 1 / jnp.where(lipschitz > 0, lipschitz, 1))


def _given(x: jax.Array, atoms: _Atoms, penalty: jax.Array) -> _Given:
    return _Given(x, None if atoms.gram is None else matmul(x, atoms.W.T), penalty)


def _start(x: jax.Array, W: jax.Array, start: jax.Array | None) -> _Row:
    """Rows that begin at `start`, or at 0."""
    t = jnp.ones(x.shape[0], x.dtype)
    if start is None:
        zeros, nothing = jnp.zeros((x.shape[0], W.shape[0]), x.dtype), jnp.zeros_like(x)
        return _Row(zeros, nothing, zeros, nothing, t)
    decoded = matmul(start, W)
    return _Row(start, decoded, start, decoded, t)


def _distances(atoms: _Atoms, given: _Given, codes: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(relative duality gap, relative violation), `[rows]` each."""
    left = given.x - matmul(codes, atoms.W)
    correlations = matmul(left, atoms.W.T)
    limit = largest_scale(correlations, given.penalty, signed)
    gap = gap_within(given.x, left, limit, primal(left, given.penalty, codes))
    broken = broken_conditions(correlations, given.penalty, codes, signed)
    return gap, broken / violation_scale(given.x, atoms.W, given.penalty)


def _step(how: _How, atoms: _Atoms, given: _Given, row: _Row) -> _Row:
    """One iteration."""
    z = shrink(row.y - atoms.inverse * _gradient(how, atoms, given, row), given.penalty * atoms.inverse, how.signed)
    keeps_up = atoms.gram is None or how.monotone
    decoded = matmul(z, atoms.W, how.compute_dtype) if keeps_up else row.decoded
    if not how.momentum:
        return _Row(z, decoded, z, decoded, row.t)
    again = jnp.zeros(row.t.shape, bool)
    if how.restart:
        again = jnp.sum((row.y - z) * (z - row.c), axis=-1) > 0
    if how.monotone:
        before, after = (primal(given.x - d, given.penalty, c) for d, c in ((row.decoded, row.c), (decoded, z)))
        refused = after > before
        z, decoded = jnp.where(refused[:, None], row.c, z), jnp.where(refused[:, None], row.decoded, decoded)
        again = again | refused
    t = jnp.where(again, 1, row.t)
    following = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
    beta = jnp.where(again, 0, (t - 1) / following)[:, None]
    return _Row(z, decoded, z + beta * (z - row.c), decoded + beta * (decoded - row.decoded), following)


def _gradient(how: _How, atoms: _Atoms, given: _Given, row: _Row) -> jax.Array:
    """Of ||x - y W||^2 in y."""
    if atoms.gram is not None:
        return 2 * (matmul(row.y, atoms.gram, how.compute_dtype) - given.correlations)
    return 2 * matmul(row.y_decoded - given.x, atoms.W.T, how.compute_dtype)
