"""Fifty steps of small connectors: on one device, on a mesh, in one process or in several."""

import functools

import numpy as np

from sparse_jax.connectors.fit import FitOptions, Fitted, Member, fit
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.mlp import MLP
from sparse_jax.training.mesh import MeshShape, make_mesh
from tests.connectors.small_pairs import pair_of, sparse_inputs

CONNECTORS = {"linear": Linear(), "mlp": MLP(n_features=24)}
OPTIONS = FitOptions(tokens=1600, batch=32, learning_rate=0.01, log_every=10)


@functools.cache
def pair():
    rng = np.random.default_rng(0)
    x = sparse_inputs(rng, 1600, 32)
    W = np.where(rng.random((32, 16)) < 0.1, 1, 0) * rng.normal(size=(32, 16))
    return pair_of(x, np.maximum(x @ W, 0) + 0.01 * x[:, :16])


def connected(connector, shape: str | None = None, **options) -> Fitted:
    """Two members trained, on a mesh where a shape is given."""
    members = [Member({"alpha": 0.05}), Member({"alpha": 0.2})]
    mesh = make_mesh(MeshShape.parse(shape)) if shape else None
    return fit(connector, pair(), OPTIONS, members, mesh=mesh, **options)
