"""The table of a changing set of atoms: equal to the blocks it is made of, whatever entered, left or was appended."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.coding.sweep import appended, codes_of, may_enter, polished, swept, table_of

ROWS, M, D = 6, 5, 7
sweep, append = jax.jit(swept), jax.jit(appended)


def problem():
    """x and atoms of norm 1, the last slot of which is empty at first."""
    generator = np.random.default_rng(0)
    atoms = generator.normal(size=(ROWS, M, D))
    return generator.normal(size=(ROWS, D)), atoms / np.linalg.norm(atoms, axis=-1, keepdims=True)


def blocks(x, atoms, inside):
    """(matrix, products) of one row, from their definitions."""
    G, b, p, q = atoms @ atoms.T, atoms @ x, inside, ~inside
    inverse = np.linalg.inv(G[np.ix_(p, p)])
    matrix, products = np.zeros_like(G), np.zeros_like(b)
    matrix[np.ix_(p, p)] = -inverse
    matrix[np.ix_(p, q)] = inverse @ G[np.ix_(p, q)]
    matrix[np.ix_(q, p)] = matrix[np.ix_(p, q)].T
    matrix[np.ix_(q, q)] = G[np.ix_(q, q)] - G[np.ix_(q, p)] @ inverse @ G[np.ix_(p, q)]
    products[p] = inverse @ b[p]
    products[q] = b[q] - G[np.ix_(q, p)] @ products[p]
    return matrix, products


def all_rows(atom):
    return jnp.full(ROWS, atom, jnp.int32), jnp.ones(ROWS, bool)


def equal(table, x, atoms):
    for row in range(ROWS):
        matrix, products = blocks(x[row], atoms[row], np.asarray(table.inside[row]))
        np.testing.assert_allclose(table.matrix[row], matrix, atol=1e-11)
        np.testing.assert_allclose(table.products[row], products, atol=1e-11)


def test_atoms_enter_leave_and_are_appended(x64):
    x, atoms = problem()
    first = atoms.copy()
    first[:, -1] = 0
    table = table_of(jnp.array(first @ first.transpose(0, 2, 1)), jnp.array(np.einsum("bmd,bd->bm", first, x)))
    equal(table, x, first)
    for atom in (0, 2, 3):
        table = sweep(table, *all_rows(atom))
        equal(table, x, first)
    table = sweep(table, *all_rows(2))  # leaves
    np.testing.assert_array_equal(table.inside, [[True, False, False, True, False]] * ROWS)
    equal(table, x, first)
    # Half of the rows get an atom in the last slot.
    which = np.arange(ROWS) % 2 == 0
    left = x - np.einsum("bm,bmd->bd", codes_of(table), first)
    gram, product = np.einsum("bmd,bd->bm", first, atoms[:, -1]), np.einsum("bd,bd->b", left, atoms[:, -1])
    table = append(table, jnp.int32(M - 1), jnp.array(gram), jnp.array(product), jnp.array(which))
    atoms[~which, -1] = 0
    equal(table, x, atoms)
    np.testing.assert_array_equal(may_enter(table)[:, -1], which)
    table = sweep(table, all_rows(M - 1)[0], jnp.array(which))
    equal(table, x, atoms)
    np.testing.assert_array_equal(table.inside[:, -1], which)


def test_rows_that_are_not_asked_for_stay(x64):
    x, atoms = problem()
    table = table_of(jnp.array(atoms @ atoms.transpose(0, 2, 1)), jnp.array(np.einsum("bmd,bd->bm", atoms, x)))
    atom, which = jnp.arange(ROWS, dtype=jnp.int32) % M, jnp.arange(ROWS) < 2
    made = sweep(table, atom, which)
    equal(made, x, atoms)
    np.testing.assert_array_equal(np.argwhere(made.inside), [[0, 0], [1, 1]])
    for before, after in zip(table, made):
        np.testing.assert_array_equal(before[2:], after[2:])


def test_polishing_takes_the_error_away(x64):
    x, atoms = problem()
    table = table_of(jnp.array(atoms @ atoms.transpose(0, 2, 1)), jnp.array(np.einsum("bmd,bd->bm", atoms, x)))
    for atom in (1, 4):
        table = sweep(table, *all_rows(atom))
    wrong = table._replace(products=table.products + 1e-3, matrix=table.matrix * (1 + 1e-6))
    codes = jax.jit(polished)(jnp.array(x), jnp.array(atoms), wrong)
    np.testing.assert_allclose(codes, codes_of(table), atol=1e-12)
    assert not np.any(codes[:, [0, 2, 3]])
