"""What the tests of all pursuits share. Sums are made in NumPy: nothing to compile."""

import jax.numpy as jnp
import numpy as np

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
