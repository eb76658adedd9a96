"""A mesh of devices for training, and how batches and a dictionary's state lie over it.

    data        rows of a batch; everything else is the same on all of them
    features    columns of W_enc, rows of W_dec, what else counts features, and the optimiser's moments of those
    ensemble    members of a group that are stacked along a leading axis (see ensemble.py)

The partitioner of `jit` (GSPMD) does the rest: see `make_step(..., mesh=...)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_jax.dictionaries.protocol import Params
from sparse_jax.errors import InputError
from sparse_jax.numerics.axes import AXES, DATA, ENSEMBLE, FEATURES
from sparse_jax.training.state import TrainState

# Of every member on every device: the loop asks for these, in each process.
WHOLE = ("step", "rows_seen")


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis.

    Attributes:
        data: parts of a batch.
        features: parts of a dictionary.
        ensemble: parts of a group of members.
    """

    data: int = 1
    features: int = 1
    ensemble: int = 1

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise InputError(f"mesh axis {axis}={getattr(self, axis)}: give at least 1 device along each axis")

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """The shape that "data=8,features=4" says; axes that are left out have 1.

        Raises:
            InputError: an axis that is not known, or named twice; a number below 1, or none.
        """
        found: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            axis, equals, count = (piece.strip() for piece in part.partition("="))
            if axis not in AXES or not equals:
                raise InputError(f"mesh {text!r}: {part!r} is not among {', '.join(f'{name}=N' for name in AXES)}")
            if axis in found:
                raise InputError(f"mesh {text!r}: {axis} stands there twice; give it once")
            if not count.isdecimal():
                raise InputError(f"mesh {text!r}: {axis}={count!r} is not a number of devices; give 1 or more")
            found[axis] = int(count)
        return cls(**found)

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.features * self.ensemble

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or f"{DATA}=1"


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of these devices (None: all there are, of all processes).

    Raises:
        InputError: there are more or fewer devices than the shape asks for.
    """
    devices = jax.devices() if devices is None else list(devices)
    if shape.size != len(devices):
        raise InputError(
            f"mesh {shape} asks for {shape.size} devices and there are {len(devices)}: give a mesh whose axes multiply "
            "to that (on a CPU JAX_NUM_CPU_DEVICES makes several out of one)"
        )
    return Mesh(arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(shape: MeshShape, devices: Sequence[jax.Device]) -> np.ndarray:
    """`[data, features, ensemble]` the devices, neighbours of a TPU's torus along an axis where that is possible.

    `jax.make_mesh` refuses a mesh that divides a torus' axis between two of its own, but for v5e: data=8,features=8 on
    the 4 x 4 x 4 chips of a v5p slice.
    """
    sizes = tuple(getattr(shape, axis) for axis in AXES)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def shape_of(mesh: Mesh) -> MeshShape:
    """The shape of a mesh that `make_mesh` made."""
    return MeshShape(**{axis: mesh.shape[axis] for axis in AXES})


def check_fits(shape: MeshShape, *, batch: int, n_features: int, members: int = 1) -> None:
    """Raises InputError unless the mesh divides a step's batch, the features and the members of each group."""
    for axis, what, count in (
        (DATA, "tokens of a batch", batch),
        (FEATURES, "features", n_features),
        (ENSEMBLE, "members of a group", members),
    ):
        if count % getattr(shape, axis):
            raise InputError(
                f"mesh {shape}: {axis}={getattr(shape, axis)} does not divide the {count} {what}; "
                f"give a multiple of it, or another mesh"
            )


def state_shardings(mesh: Mesh, state: Any, members: bool = False) -> Any:
    """A pytree of `NamedSharding` like `state`: a `TrainState`, or a pytree of such (arrays or their shapes).

    Args:
        mesh: with the axes of `make_mesh`.
        state: what is to be laid out.
        members: its leaves have a leading axis of members, which lies over the axis "ensemble".

    What counts features is divided: W_enc by columns, W_dec by rows, biases, thresholds and ages, and what of the
    optimiser's state is named and shaped like one of these. The rest is the same on all devices.
    """
    return jax.tree.map(
        lambda one: _of_one(mesh, one, (ENSEMBLE,) if members else ()),
        state,
        is_leaf=lambda node: isinstance(node, TrainState),
    )


def parameter_specs(params: Params, n_features: int, leading: tuple = ()) -> dict[str, PartitionSpec]:
    """How each parameter of a dictionary lies; `leading` stands before it, for axes that all parameters have."""
    before = len(leading)
    return {name: _spec(name, value.shape[before:], n_features, leading) for name, value in params.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the axis "data": for x `[rows, d]` and weight `[rows]` alike."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def place(mesh: Mesh, state: Any, members: bool = False) -> Any:
    """The state laid out over the mesh by `state_shardings`; the one given stays valid.

    With several processes each of them gives the same state.
    """
    return jax.tree.map(put, state, state_shardings(mesh, state, members))


def _of_one(mesh: Mesh, state: TrainState, leading: tuple) -> TrainState:
    n_features = state.age.shape[-1]
    specs = parameter_specs(state.params, n_features, leading)
    shapes = {name: value.shape for name, value in state.params.items()}

    def sharding(path, leaf) -> NamedSharding:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        spec = PartitionSpec(*leading)
        if names[0] in WHOLE:
            spec = PartitionSpec()
        elif names[0] == "age":
            spec = PartitionSpec(*leading, FEATURES)
        elif names[0] in ("params", "opt_state"):
            # The optimiser's moments stand under the names of their parameters, with their shapes.
            name = next((name for name in reversed(names) if name in specs), None)
            if name is not None and leaf.shape == shapes[name]:
                spec = specs[name]
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def _spec(name: str, shape: tuple[int, ...], n_features: int, leading: tuple) -> PartitionSpec:
    if name == "W_dec":
        return PartitionSpec(*leading, FEATURES, *[None] * (len(shape) - 1))
    if name != "b_dec" and shape and shape[-1] == n_features:  # W_enc, biases, thresholds (of each layer: LISTA's)
        return PartitionSpec(*leading, *[None] * (len(shape) - 1), FEATURES)
    return PartitionSpec(*leading)


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """A copy of an array, the same in every process, laid out so."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(leaf)
        # The words of a key are one axis more, which is not divided.
        return jax.random.wrap_key_data(put(data, sharding), impl=jax.random.key_impl(leaf))
    if sharding.is_fully_addressable:
        # Copied by hand: what is whole on every device would share the first one's memory, whatever `may_alias` says.
        return jax.device_put(jnp.array(leaf), sharding)
    values = np.array(leaf)
    # No talk between processes: each takes its own parts of what it has.
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index].copy())
