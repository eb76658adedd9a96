"""Small pairs whose targets are known functions of the inputs, and codes in every form."""

import numpy as np

from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.connectors.sparse_product import two_way
from sparse_jax.numerics.sparse_codes import SparseCodes, dense


def random_codes(rng, rows, n, slots, empty=0.2) -> SparseCodes:
    """NumPy codes; some slots are empty and point anywhere."""
    values = rng.random((rows, slots)).astype(np.float32) + np.float32(0.1)
    values[rng.random(values.shape) < empty] = 0
    return SparseCodes(values, np.argsort(rng.random((rows, n)), axis=1)[:, :slots].astype(np.int32))


def forms(codes: SparseCodes, n: int) -> dict:
    """The codes dense, sparse, and by row and feature."""
    return {"dense": dense(codes, n), "sparse": codes, "two-way": two_way(codes, n)}


def site(name, x, slots=None) -> SiteCodes:
    """Dense `[tokens, n]` as codes with as many slots as the fullest row needs."""
    slots = slots or max(1, int((x != 0).sum(1).max()))
    indices = np.argsort(x == 0, axis=1, kind="stable")[:, :slots].astype(np.int32)
    return SiteCodes(name, x.shape[1], np.take_along_axis(x, indices, 1).astype(np.float32), indices)


def pair_of(x, y) -> Pair:
    """A pair of dense inputs and targets, ten tokens a document."""
    n = np.arange(len(x))
    tokens = Tokens(np.zeros(len(x), np.int32), (n // 10).astype(np.int32), n // 10, (n % 10).astype(np.int32))
    return Pair(site("in", x), site("out", y), tokens)


def sparse_inputs(rng, tokens, n, share=0.15) -> np.ndarray:
    """`[tokens, n]` nonnegative, few active; each feature in units of its own."""
    x = np.where(rng.random((tokens, n)) < share, rng.random((tokens, n)) + 0.5, 0)
    return (x * np.exp(rng.normal(size=n))).astype(np.float32)
