"""The optimiser's moments in the host's memory between steps: on devices there is room for them in turn with codes.

Adam's two moments are as large again as twice the parameters. Offloaded they lie in "pinned_host" memory, of which each
device's host holds that device's part; a step fetches them once the gradient is there and sends back the new ones. The
numbers are the same; the price is 4 times the bytes of the parameters over the host's bus in every step.

It needs a backend with such a memory (TPU, GPU; JAX's CPU backend has it in name, and nothing is gained there), and a
mesh, which may be of one device.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from sparse_jax.errors import InputError
from sparse_jax.training.state import TrainState

HOST = "pinned_host"


def check_host_memory(mesh: Mesh | None) -> None:
    """Raises InputError unless there is a mesh, whose devices reach their host's memory."""
    if mesh is None:
        raise InputError("--offload needs a mesh: give --mesh data=1 for one device")
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise InputError(
            f"--offload: {device.device_kind} devices of the {device.platform} backend reach {', '.join(kinds)} and no "
            f"{HOST} memory; leave it out, and give more devices along features, or a smaller batch"
        )


def made_on_host(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """While in force, what is made is made by the host's CPU: a state that no single device has room for."""
    if mesh is None or jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def moments_on_host(shardings: Any, state: Any) -> Any:
    """The shardings of a state (`state_shardings`; or of several), arrays of the learner's state on the host."""

    def one(over: TrainState, of: TrainState) -> TrainState:
        # A count of steps is no array: it is not worth a transfer.
        moved = jax.tree.map(
            lambda sharding, leaf: sharding.with_memory_kind(HOST) if _is_array(leaf, of) else sharding,
            over.opt_state,
            of.opt_state,
        )
        return dataclasses.replace(over, opt_state=moved)

    return jax.tree.map(one, shardings, state, is_leaf=lambda node: isinstance(node, TrainState))


def with_moments_fetched(function: Callable) -> Callable:
    """A function of a state, x and weight that finds the learner's state on the device.

    Its answer lies where it is sent (`out_shardings`).
    """

    def fetched(state: Any, x: jax.Array, weight: jax.Array) -> tuple[Any, Any]:
        return function(jax.tree.map(_fetched, state, is_leaf=lambda node: isinstance(node, TrainState)), x, weight)

    return fetched


def _fetched(state: TrainState) -> TrainState:
    opt_state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if _is_array(leaf, state) else leaf, state.opt_state
    )
    return dataclasses.replace(state, opt_state=opt_state)


def _is_array(leaf: Any, state: TrainState) -> bool:
    """More than a number for each member."""
    return len(leaf.shape) > len(state.step.shape)
