"""Functions of a training state and a batch, compiled for a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_jax.errors import InputError
from sparse_jax.numerics.axes import DATA
from sparse_jax.training.mesh import batch_sharding, state_shardings
from sparse_jax.training.offload import check_host_memory, moments_on_host, with_moments_fetched


class OnMesh:
    """`function(state, x, weight) -> (state, more)` over a mesh: compiled once, its state donated.

    The state comes back laid out as it went in (`state_shardings`), `more` whole on every device. A state or a batch
    that lies otherwise (after resampling, say) is brought into place first; what is in place already is not touched.

    Args:
        function: not yet compiled.
        mesh: as `make_mesh` makes it; in force while the function is traced.
        members: the state has a leading axis of members.
        offload: the learner's state stays in the host's memory between calls (offload.py).

    `traced` is how often it has been traced, and so compiled. (The `_cache_size` of a jitted function is 2 where one of
    its arguments is a key that it gives back: jax issue 39089, a slow look-up and no compilation.)

    Raises:
        InputError: there is no such memory; when called, a batch that the mesh does not divide.
    """

    def __init__(self, function: Callable, mesh: Mesh, members: bool = False, offload: bool = False):
        self.function, self.mesh, self.members, self.traced = function, mesh, members, 0
        self.offload = offload
        if offload:
            check_host_memory(mesh)
            self.function = with_moments_fetched(function)
        self._compiled: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, state: Any, x: jax.Array, weight: jax.Array) -> tuple[Any, Any]:
        compiled, shardings = self._for(state, x)
        rows = batch_sharding(self.mesh)
        state = jax.tree.map(_in_place, state, shardings)
        with jax.set_mesh(self.mesh):
            return compiled(state, _in_place(x, rows), _in_place(weight, rows))

    def _counted(self, *arguments: Any) -> tuple[Any, Any]:
        self.traced += 1
        return self.function(*arguments)

    def lower(self, state: Any, x: Any, weight: Any) -> jax.stages.Lowered:
        """What `jax.jit` calls so: arrays or their shapes will do."""
        compiled, _ = self._for(state, x)
        with jax.set_mesh(self.mesh):
            return compiled.lower(state, x, weight)

    def _for(self, state: Any, x: Any) -> tuple[Any, Any]:
        """The compiled function and the shardings for a state of this structure."""
        if x.shape[0] % self.mesh.shape[DATA]:
            raise InputError(
                f"a batch of {x.shape[0]} tokens over {DATA}={self.mesh.shape[DATA]}: give a batch that is a multiple"
            )
        structure = jax.tree.structure(state)
        if structure not in self._compiled:
            shardings, rows = state_shardings(self.mesh, state, self.members), batch_sharding(self.mesh)
            if self.offload:
                shardings = moments_on_host(shardings, state)
            compiled = jax.jit(
                self._counted,
                in_shardings=(shardings, rows, rows),
                # Without these the state would come back in a layout of the partitioner's, and be compiled for again.
                out_shardings=(shardings, NamedSharding(self.mesh, PartitionSpec())),
                donate_argnums=0,
            )
            self._compiled[structure] = compiled, shardings
        return self._compiled[structure]


def _in_place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    return jax.device_put(leaf, sharding)
