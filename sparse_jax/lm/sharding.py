"""How a model's parameters lie over a mesh of devices: a table from logical axes to mesh axes."""

from collections.abc import Iterable, Mapping

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_jax.errors import InputError
from sparse_jax.lm.weight_map import Axis

# A mesh axis, several (their product is divided over), or None: not divided.
MeshAxes = str | tuple[str, ...] | None

# Logical axis of a parameter -> mesh axis. Tensor parallelism over "model" alone: heads, neurons and vocabulary are
# divided, so each block needs two sums over the devices and no parameter is ever gathered (Shoeybi et al. 2019).
# {"d_model": "data"} on top divides what is left over "data" too (fully sharded; gathered layer by layer).
RULES: Mapping[str, MeshAxes] = {
    "layer": None,
    "vocab": "model",
    "positions": None,
    "d_model": None,
    "qkv": None,
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "d_mlp": "model",
}


def merged_rules(mesh: Mesh, rules: Mapping[str, MeshAxes] | None) -> dict[str, MeshAxes]:
    """`RULES` with those of the caller in their place.

    Raises:
        InputError: a logical axis that no parameter has, a mesh axis that the mesh lacks.
    """
    table = {**RULES, **(rules or {})}
    if unknown := sorted(set(table) - set(RULES)):
        raise InputError(f"sharding rules for {', '.join(unknown)}: the logical axes are {', '.join(RULES)}")
    for name, axes in table.items():
        if missing := [axis for axis in _as_tuple(axes) if axis not in mesh.shape]:
            raise InputError(
                f"the sharding rule of {name!r} names the mesh axis {missing[0]!r}; this mesh has "
                f"{', '.join(mesh.axis_names)}: make one with that axis or give other rules"
            )
    return table


def rules_over(mesh: Mesh, axis: str, axes: Iterable[Axis]) -> dict[str, MeshAxes]:
    """Rules for `RULES`' tensor parallelism over one axis of a mesh: what that does not divide stays whole.

    Args:
        mesh: the devices.
        axis: of the mesh, in place of "model".
        axes: logical axes with their sizes, as all parameters have them.
    """
    undivided = {name for name, size in axes if size % mesh.shape[axis]}
    return {name: axis if over and name not in undivided else None for name, over in RULES.items()}


def parameter_sharding(mesh: Mesh, table: Mapping[str, MeshAxes], axes: tuple[Axis, ...], name: str) -> NamedSharding:
    """The sharding of the parameter `name` with these logical axes.

    Raises:
        InputError: a mesh axis does not divide an axis of the parameter, or would divide two of them.
    """
    spec, used = [], set()
    for axis, size in axes:
        over = _as_tuple(table[axis])
        parts = int(np.prod([mesh.shape[mesh_axis] for mesh_axis in over], dtype=int))
        if size % parts:
            raise InputError(
                f"{name}: its axis {axis!r} of {size} cannot be divided over {parts} devices ({' x '.join(over)}); "
                f"give the rules {{{axis!r}: None}}, which keeps it whole, or another mesh"
            )
        if twice := used & set(over):
            raise InputError(f"{name}: the rules divide two of its axes over {', '.join(sorted(twice))}; change one")
        used |= set(over)
        spec.append(over if len(over) > 1 else (over[0] if over else None))
    return NamedSharding(mesh, PartitionSpec(*spec))


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
