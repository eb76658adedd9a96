"""What of a training state goes to disk: plain arrays in dicts, a digest of each, and the way back.

    a run           {"arrays": ..., "digests": [n_arrays] uint32}: fields by name, the typed key as its data, leaves of
                    the optimiser's state numbered; a digest of each array in the order of `jax.tree.leaves`
    an ensemble     {"groups": {"0000": the same}}, members along a leading axis, whichever way they are stepped

A digest is a sum modulo 2^32 over a mix of each value's bits and position. The order of a sum of integers does not
matter, so a digest is the same on every mesh; each device sums what it holds. Orbax notices files that are cut short or
gone, but not flipped bits in an array (tried with 0.12.8).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from sparse_jax.training.ensemble import States
from sparse_jax.training.state import TrainState

AnyState = TrainState | tuple[States, ...]


def snapshot(state: AnyState) -> dict[str, Any]:
    """What is written of a run's state, or of those of an ensemble's groups.

    On a CPU the arrays are copies: a NumPy view of a buffer is no copy there, and the next step consumes the buffers.
    Elsewhere Orbax copies to the host before it returns, and a second state on the device would be dear.
    """
    copied = jax.default_backend() == "cpu"
    return _each(lambda states: _snapshot_of(states, copied), state)


def abstract(state: AnyState) -> dict[str, Any]:
    """Shapes, dtypes and shardings of what `snapshot` makes of a state, without computing it."""
    return _each(_abstract_of, state)


def usable(stored: dict[str, Any], like: AnyState) -> AnyState:
    """The state in the form, and with the shardings, of `like`.

    All arrays are new ones that a compiled program made: those that Orbax returns cannot always be donated
    (https://github.com/jax-ml/jax/issues/18617), and then the next step holds two states.
    """
    states = [_usable_of(part["arrays"], of) for part, of in zip(_parts(stored), _groups(like), strict=True)]
    return states[0] if isinstance(like, TrainState) else tuple(states)


def damaged_array(stored: dict[str, Any]) -> str | None:
    """The name of the first array that is not what was saved; None if all are."""
    for part in _parts(stored):
        due = part["digests"]
        # The same on all devices: each process can look at it.
        found = jax.jit(_stacked_digests, out_shardings=due.sharding)(part["arrays"])
        found, due = np.asarray(found), np.asarray(due)
        for (path, _), a, b in zip(jax.tree_util.tree_leaves_with_path(part["arrays"]), found, due, strict=True):
            if a != b:
                return name_of(path)
    return None


def shapes(tree: Any) -> dict[str, list[int]]:
    """The shape of each array of a tree (or of its shapes) by its name."""
    return {name_of(path): list(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def difference(there: dict[str, list[int]], here: dict[str, list[int]]) -> str | None:
    """The first array that is not of one shape in both, in words; None if there is none."""
    for name in sorted({*there, *here}):
        saved, wanted = (tuple(each[name]) if name in each else "(absent)" for each in (there, here))
        if saved != wanted:
            return f"{name} has shape {saved} there, {wanted} here"
    return None


def name_of(path: Any) -> str:
    """`params/W_dec` of a path in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def digest(x: jax.Array) -> jax.Array:
    """A uint32 that another array of this shape and dtype has by a chance of 2^-32; the same on every mesh."""
    if jax.typeof(x).memory_space == jax.memory.Space.Host:  # the optimiser's, offloaded
        x = jax.device_put(x, jax.memory.Space.Device)
    words = _words(x)
    # The position in row-major order, without a reshape: that would gather what is sharded.
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        position += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    # The finaliser of MurmurHash3 (Appleby), a bijection of 32 bits: one changed value always changes the sum.
    mixed = words ^ (position * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(16)), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of the values as uint32; of 8 bytes a value, along a further axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _stacked_digests(arrays: Any) -> jax.Array:
    return jnp.stack([digest(leaf) for leaf in jax.tree.leaves(arrays)])


def _groups(state: AnyState) -> tuple[States, ...]:
    return (state,) if isinstance(state, TrainState) else state


def _each(make: Any, state: AnyState) -> dict[str, Any]:
    made = [make(states) for states in _groups(state)]
    return made[0] if isinstance(state, TrainState) else {"groups": {_number(i): each for i, each in enumerate(made)}}


def _parts(stored: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """The inverse of `_each`."""
    return [stored["groups"][name] for name in sorted(stored["groups"])] if "groups" in stored else [stored]


def _number(i: int) -> str:
    """A name that sorts as its number does."""
    return f"{i:04d}"


def _snapshot_of(states: States, copied: bool) -> dict[str, Any]:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, _abstract_of(states))
    if copied or isinstance(states, tuple):
        # Outputs whose shardings are given are new buffers.
        return jax.jit(_arrays_and_digests, out_shardings=shardings)(states)
    arrays = _storable(states)
    return {"arrays": arrays, "digests": jax.jit(_stacked_digests, out_shardings=shardings["digests"])(arrays)}


def _arrays_and_digests(states: States) -> dict[str, Any]:
    arrays = jax.tree.map(jnp.copy, _storable(states))
    return {"arrays": arrays, "digests": _stacked_digests(arrays)}


def _storable(states: States) -> dict[str, Any]:
    """One tree of plain arrays: members of a loop are stacked, typed keys become their data, and dataclasses dicts."""
    if isinstance(states, tuple):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_storable(each) for each in states])
    return {**_fields(states), "key": jax.random.key_data(states.key)}


def _fields(state: TrainState) -> dict[str, Any]:
    return {
        **{name: getattr(state, name) for name in state.__dataclass_fields__},
        "normaliser": {"centre": state.normaliser.centre, "scale": state.normaliser.scale},
        # Optimiser states need no type on disk.
        "opt_state": {_number(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
        "control": state.control._asdict(),
        "settings": state.settings._asdict(),
    }


def _abstract_of(states: States) -> dict[str, Any]:
    arrays = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        jax.eval_shape(_storable, states),
        _shardings(states),
    )
    leaves = jax.tree.leaves(arrays)
    everywhere = _alike(leaves[0].sharding, PartitionSpec())
    return {"arrays": arrays, "digests": jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=everywhere)}


def _shardings(states: States) -> dict[str, Any]:
    """How each array of `_storable` is to lie: like the state's; members of a loop one behind the other."""
    first = states[0] if isinstance(states, tuple) else states
    own = jax.tree.map(lambda leaf: leaf.sharding, first)
    meshes = [each for each in jax.tree.leaves(own) if isinstance(each, NamedSharding)]

    def whole(sharding: Sharding) -> Sharding:
        # A leaf that was made beside a mesh (uncommitted) is the same on all its devices.
        if meshes and not isinstance(sharding, NamedSharding):
            sharding = _alike(meshes[0], PartitionSpec())
        if isinstance(states, tuple):
            return _alike(sharding, PartitionSpec(None, *getattr(sharding, "spec", ())))
        return sharding

    return _fields(jax.tree.map(whole, own))


def _alike(sharding: Sharding, spec: PartitionSpec) -> Sharding:
    """A sharding over the same devices, by `spec` where they are a mesh."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return sharding


def _usable_of(arrays: dict[str, Any], like: States) -> States:
    members = like if isinstance(like, tuple) else (like,)
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, each) for each in members]
    structure = jax.tree.structure(members[0].opt_state)
    types = tuple(type(getattr(members[0], name)) for name in ("normaliser", "control", "settings"))
    alone = not isinstance(like, tuple)
    made = jax.jit(_taken_apart, static_argnums=(1, 2, 3), out_shardings=shardings)
    states = made(arrays, structure, types, None if alone else len(members))
    return states[0] if alone else tuple(states)


def _taken_apart(arrays: dict[str, Any], structure: Any, types: tuple, count: int | None) -> list[TrainState]:
    """The states of a loop's members, or the one state there is (`count` None)."""
    if count is None:
        return [_state(jax.tree.map(jnp.copy, arrays), structure, types)]
    return [_state(jax.tree.map(lambda leaf, i=i: leaf[i], arrays), structure, types) for i in range(count)]


def _state(arrays: dict[str, Any], structure: Any, types: tuple) -> TrainState:
    normaliser, control, settings = types
    leaves = [arrays["opt_state"][_number(i)] for i in range(structure.num_leaves)]
    return TrainState(
        **{
            **arrays,
            "key": jax.random.wrap_key_data(arrays["key"]),
            "normaliser": normaliser(**arrays["normaliser"]),
            "control": control(**arrays["control"]),
            "settings": settings(**arrays["settings"]),
            "opt_state": jax.tree.unflatten(structure, leaves),
        }
    )
