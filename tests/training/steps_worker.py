"""One process of several that take fifty steps: `python -m tests.training.steps_worker COORDINATOR COUNT ID MESH OUT`.

Each kind of dictionary, and connectors; process 0 writes what they end with, and codes of a TopK, to OUT.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from sparse_jax.numerics.whole import to_host
from sparse_jax.training import processes
from sparse_jax.training.mesh import batch_sharding, place, put
from sparse_jax.training.processes import Processes
from sparse_jax.training.watchdog import together
from tests.connectors.fifty_steps import CONNECTORS, connected
from tests.training.fifty_steps import KINDS, D, batch, mesh_of, normaliser, start, trained


def results(shape: str | None, kinds: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Parameters and losses of each kind after its steps, by name; without a shape on one device of one process."""
    made = {}
    for kind in kinds:
        state, metrics, _ = trained(kind, shape)
        made |= {f"{kind}/{name}": value for name, value in state.params.items()}
        made[f"{kind}/loss"] = np.array([row["loss"] for row in metrics])
    for name, connector in CONNECTORS.items():
        fitted = connected(connector, shape)
        for i, each in enumerate(fitted.trained):
            made |= {f"{name} {i}/{key}": np.array(value) for key, value in each.params.items()}
        made[f"{name}/loss"] = np.array([row["reconstruction"] for row in fitted.history])
    return made | {"codes": topk_codes(shape)}


def topk_codes(shape: str | None) -> np.ndarray:
    """Codes of a batch with the parameters of a seed."""
    dictionary, mesh = KINDS["topk"].sized(D), shape and mesh_of(shape)
    state, x = start(dictionary), normaliser().apply(batch(0))
    encode = jax.jit(dictionary.encode)
    if not mesh:
        return np.array(encode(state.params, x))
    with jax.set_mesh(mesh):
        return to_host(encode(place(mesh, state).params, put(x, batch_sharding(mesh))))


if __name__ == "__main__":
    address, of, process, shape, out, *kinds = sys.argv[1:]
    flags = Processes(True, address, int(of), int(process), 90.0)
    with together(flags):
        made = results(shape, tuple(kinds))
        if processes.is_first():
            np.savez(Path(out), **made)
