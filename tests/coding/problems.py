"""Lasso problems that the tests of all solvers share."""

import numpy as np


def unit(W):
    return W / np.linalg.norm(W, axis=1, keepdims=True)


def coherent(rows=12, d=10, n=40, seed=0):
    """x and W whose atoms share a direction, as those of trained dictionaries do; W's atoms have several norms."""
    generator = np.random.default_rng(seed)
    W = unit(generator.normal(size=(n, d)) + 0.7) * generator.uniform(0.5, 2, size=(n, 1))
    return generator.normal(size=(rows, d)) + 0.3, W


def by_coordinates(x, W, penalty, signed, sweeps=20_000):
    """The solution by plain coordinate descent in float64, one row after the other: slow, and nothing to get wrong."""
    penalty = np.broadcast_to(penalty, (len(x), len(W)))
    codes = np.zeros((len(x), len(W)))
    lengths = (W**2).sum(1)
    for row, (target, lam) in enumerate(zip(x, penalty)):
        c, left = codes[row], target.copy()
        for _ in range(sweeps):
            largest = 0.0
            for j in np.flatnonzero(lengths):
                u = W[j] @ left + lengths[j] * c[j]
                made = np.sign(u) * max(abs(u) - lam[j] / 2, 0) if signed else max(u - lam[j] / 2, 0)
                made /= lengths[j]
                left -= (made - c[j]) * W[j]
                largest, c[j] = max(largest, abs(made - c[j])), made
            if largest < 1e-13:
                break
    return codes


def objective(x, W, penalty, codes):
    x, W, codes = (np.asarray(a, np.float64) for a in (x, W, codes))
    return ((x - codes @ W) ** 2).sum(1) + (np.broadcast_to(penalty, codes.shape) * np.abs(codes)).sum(1)
