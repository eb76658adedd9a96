"""Steps of every kind of dictionary on few rows: on one device, on a mesh, in one process or in several."""

import functools

import jax.numpy as jnp
import numpy as np

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, BatchTopK, Fista, Gated, JumpReLU, MatchingPursuit, Matryoshka, MultiTopK, TopK
from sparse_jax.numerics.whole import to_host
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for
from sparse_jax.training.mesh import MeshShape, batch_sharding, make_mesh, place, put

D, N, ROWS, STEPS = 16, 64, 64, 50
WEIGHT = np.ones(ROWS, np.float32)
WEIGHT[5:9] = 0
# A dead window that is short enough for AuxK to begin, and fewer dead features than that for its selection to matter.
DEAD_WINDOW = 100
KINDS = {
    "l1": L1(n_features=N, l1=0.5),
    "topk": TopK(n_features=N, k=4, aux_k=1),
    "batch-topk": BatchTopK(n_features=N, k=4, aux_k=1),
    "jump-relu": JumpReLU(n_features=N),
    "fista": Fista(n_features=N, solver="fista", training_tolerance=1e-6),
    "matryoshka": Matryoshka(n_features=N, k=4, aux_k=1),
    "multi-topk": MultiTopK(n_features=N, k=4, aux_k=1),
    "gated": Gated(n_features=N),
    "matching-pursuit": MatchingPursuit(n_features=N, k=4),
    "working-sets": Fista(n_features=N, training_tolerance=1e-6),
}


def mesh_of(text):
    return make_mesh(MeshShape.parse(text))


def normaliser():
    return Normaliser(jnp.full(D, 3.0), jnp.array(2.0))


@functools.cache
def planted():
    return np.random.default_rng(1).normal(size=(40, D))


def batch(i):
    """Sums of few of 40 directions."""
    rng = np.random.default_rng(i)
    codes = np.where(rng.random((ROWS, 40)) < 0.1, np.abs(rng.normal(size=(ROWS, 40))), 0)
    return (3 + 2 * codes @ planted()).astype(np.float32)


def start(dictionary):
    return init_state(dictionary, adam(1e-3).transform, normaliser(), 0, settings_for(dictionary, adam(1e-3)))


def trained(kind, shape=None, steps=STEPS):
    """(state, losses, step) after `steps` steps, on a mesh or on one device."""
    dictionary, mesh = KINDS[kind].sized(D), shape and mesh_of(shape)
    step = make_step(dictionary, adam(1e-3), Schedule(), STEPS, DEAD_WINDOW, mesh=mesh)
    state, losses = start(dictionary), []
    state = place(mesh, state) if mesh else state
    for i in range(steps):
        rows = batch(i), WEIGHT
        state, metrics = step(state, *(put(each, batch_sharding(mesh)) for each in rows) if mesh else rows)
        losses.append(metrics)
    return to_host(state), to_host(losses), step
