"""Small pairs of codes with random numbers, for tests."""

import numpy as np

from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens


def sparse_site(generator, name, tokens, n, slots):
    """Codes with different features in a row's slots, some slots empty; the last feature never fires."""
    indices = np.argsort(generator.random((tokens, n - 1)), axis=1)[:, :slots].astype(np.int32)
    values = generator.exponential(size=(tokens, slots)) * (generator.random((tokens, slots)) < 0.8)
    return SiteCodes(name, n, values.astype(np.float32), indices)


def tokens_of(generator, tokens, documents):
    """Tokens of so many documents of different lengths."""
    document = np.sort(generator.integers(documents, size=tokens)).astype(np.int32)
    return Tokens(document, document, np.arange(tokens, dtype=np.int64), document)


def random_pair(seed=0, tokens=300, n1=12, n2=9, slots=4, documents=30):
    """Inputs and targets that have nothing to do with each other."""
    generator = np.random.default_rng(seed)
    inputs = sparse_site(generator, "in.0", tokens, n1, slots)
    targets = sparse_site(generator, "out.0", tokens, n2, slots)
    return Pair(inputs, targets, tokens_of(generator, tokens, documents))


def linear_pair(seed=0, tokens=600, n1=20, n2=6, noise=0.1, documents=30):
    """(pair, weights `[n1, n2]`): each target is a sum of three inputs, noise and a constant."""
    generator = np.random.default_rng(seed)
    inputs = sparse_site(generator, "in.0", tokens, n1, 5)
    weights = np.zeros((n1, n2))
    for j in range(n2):
        weights[generator.permutation(n1 - 1)[:3], j] = generator.choice([-1, 1], 3) * generator.uniform(0.5, 2, 3)
    x = inputs.dense(slice(None)).astype(np.float64)
    y = x @ weights + noise * generator.normal(size=(tokens, n2)) + np.arange(n2)
    targets = SiteCodes("out.0", n2, y.astype(np.float32), np.broadcast_to(np.arange(n2, dtype=np.int32), y.shape))
    return Pair(inputs, targets, tokens_of(generator, tokens, documents)), weights


def dense_sides(pair):
    """(F1, F2) in float64."""
    return tuple(side.dense(slice(None)).astype(np.float64) for side in (pair.inputs, pair.targets))
