"""Checkpoints of the whole training state with Orbax: written whole or not at all, the newest whole one restored."""

from pathlib import Path
from typing import Any

import jax

from sparse_jax.errors import InputError
from sparse_jax.training.ensemble import States, members_of, with_members
from sparse_jax.training.state import TrainState, steps_taken


class Checkpoints:
    """The `checkpoints/` folder of a run. Use as a context manager.

    Orbax writes into a temporary folder and renames it, so that a killed write leaves no checkpoint behind.
    Saving is synchronous: the step consumes (donates) the very buffers that would be saved in the background.
    """

    def __init__(self, folder: Path, keep: int = 2):
        # Orbax takes over a second to import; a `--help` must not wait for it.
        from orbax.checkpoint import v1 as ocp

        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState | tuple[States, ...]) -> None:
        """Write a checkpoint under the state's step, unless that step's is there.

        Args:
            state: of a run, or those of an ensemble's groups; what is written of an ensemble is the same whichever way
                it is stepped.
        """
        step = steps_taken(state)
        if self.latest() != step:
            self._checkpointer.save(step, _stored(state), force=True)

    def restore(self, like: Any) -> Any:
        """The newest checkpoint, with `like`'s structure, shapes, dtypes and shardings.

        Raises:
            InputError: there is none, or it does not fit the run's flags.
        """
        step = self.latest()
        if step is None:
            raise InputError("there is no checkpoint to resume from")
        wanted = _stored(like)
        try:
            # Before any array is read: reads that are abandoned go on in the background.
            reason = _difference(self._checkpointer.metadata(step).metadata, wanted)
            restored = None if reason else self._checkpointer.load(step, _abstract(wanted))
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
        if reason:
            raise InputError(f"checkpoint {step} does not fit this run: {reason}")
        if isinstance(like, TrainState):
            return _usable(restored, like)
        members = members_of(like)
        return with_members(like, [_usable(restored["members"][_number(i)], of) for i, of in enumerate(members)])


def _number(i: int) -> str:
    """A name that sorts as its number does."""
    return f"{i:04d}"


def _stored(state: TrainState | tuple[States, ...]) -> dict[str, Any]:
    if isinstance(state, TrainState):
        return _storable(state)
    return {"members": {_number(i): _storable(member) for i, member in enumerate(members_of(state))}}


def _difference(saved: Any, wanted: Any) -> str | None:
    """The first array that is not of one shape in both trees, in words; None if there is none."""
    there, here = (
        {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (saved, wanted)
    )
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            return f"{name} has shape {there.get(name, '(absent)')} there, {here.get(name, '(absent)')} here"
    return None


def _storable(state: TrainState) -> dict[str, Any]:
    """A tree of plain arrays: typed keys become their data, and dataclasses dicts."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return {
        **fields,
        "key": jax.random.key_data(state.key),
        "normaliser": {"centre": state.normaliser.centre, "scale": state.normaliser.scale},
        "opt_state": dict(enumerate_leaves(state.opt_state)),
        "control": state.control._asdict(),
        "settings": state.settings._asdict(),
    }


def enumerate_leaves(tree: Any) -> list[tuple[str, jax.Array]]:
    """Leaves of any pytree with names that sort in order, so that optimiser states need no type on disk."""
    return [(_number(i), leaf) for i, leaf in enumerate(jax.tree.leaves(tree))]


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def _usable(stored: dict[str, Any], like: TrainState) -> TrainState:
    leaves = [stored["opt_state"][name] for name, _ in enumerate_leaves(like.opt_state)]
    return TrainState(
        **{
            **stored,
            "key": jax.random.wrap_key_data(stored["key"]),
            "normaliser": type(like.normaliser)(**stored["normaliser"]),
            "control": type(like.control)(**stored["control"]),
            "settings": type(like.settings)(**stored["settings"]),
            "opt_state": jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves),
        }
    )
