"""What the tests of all pursuits share. Sums are made in NumPy: nothing to compile."""

import jax.numpy as jnp
import numpy as np

from sparse_jax.numerics.sparse_codes import dense

ROWS, N, D = 30, 40, 16


def problem(seed, rows=ROWS, n=N, d=D, norms=True):
    """x and random atoms, of norm 1 or of many norms."""
    generator = np.random.default_rng(seed)
    W = generator.normal(size=(n, d))
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    if norms:
        W *= np.exp(generator.normal(size=(n, 1)))
    return jnp.array(generator.normal(size=(rows, d))), jnp.array(W)


def active(codes, row):
    """The features of one row."""
    return np.asarray(codes.indices[row])[np.asarray(codes.values[row]) != 0]


def decoded(codes, W):
    """`[rows, d]`."""
    return np.einsum("bk,bkd->bd", np.asarray(codes.values), np.asarray(W)[np.asarray(codes.indices)])


def left_of(x, codes, W):
    """`[rows]`: the squared norm of what the codes leave."""
    return np.sum(np.square(np.asarray(x) - decoded(codes, W)), axis=1)


def check_orthonormal_atoms(pursue) -> None:
    """Of atoms that do not meet, the k largest products are chosen, and are the codes; no more than there are."""
    x, _ = problem(1)
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    products = np.asarray(x) @ Q.T
    for signed, size in ((True, np.abs(products)), (False, np.maximum(products, 0))):
        least = np.sort(size, axis=1)[:, -4][:, None]
        expected = np.where((size >= least) & (size > 0), products, 0)
        codes = dense(pursue(x, jnp.array(Q), 4, signed=signed), D)
        np.testing.assert_allclose(codes, expected, atol=1e-12)
