"""What lies beside a checkpoint's arrays: what it is of, what wrote it, and on which devices.

format      of what is stored; another is refused
step        steps taken
config      the run's flags, as they were given
identity    model and text: another is refused
versions    of the libraries: others are said, since they may round otherwise
mesh        axes and their sizes; may be another
processes   how many; may be another
metric      what the best checkpoint is chosen by, where it is
"""

import importlib.metadata
import json
from typing import Any

import jax
from jax.sharding import NamedSharding

import sparse_jax
from sparse_jax.errors import InputError
from sparse_jax.training.checkpoint_tree import shapes

FORMAT = 1
LIBRARIES = ("jax", "jaxlib", "orbax-checkpoint", "numpy")


def describe(
    step: int,
    stored: dict[str, Any],
    config: dict | None = None,
    identity: dict | None = None,
    metric: float | None = None,
) -> dict[str, Any]:
    """The metadata of what is stored of a state, as JSON values."""
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(stored) if isinstance(leaf.sharding, NamedSharding)]
    return {
        "format": FORMAT,
        "step": step,
        "shapes": shapes(stored),
        "config": plain(config),
        "identity": plain(identity),
        "versions": versions(),
        "mesh": {str(axis): int(size) for axis, size in meshes[0].shape.items()} if meshes else None,
        "processes": jax.process_count(),
        "metric": metric,
    }


def versions() -> dict[str, str]:
    """Of what decides the bits."""
    return {"sparse_jax": sparse_jax.__version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def plain(given: dict | None) -> dict | None:
    """Through JSON, so that what is read again is equal to it."""
    return json.loads(json.dumps(given, default=str))


def reason_unreadable(saved: Any, step: int) -> str | None:
    """Why metadata that was read cannot be that of a whole checkpoint; None if it can."""
    if not isinstance(saved, dict) or not {"format", "step", "shapes"} <= set(saved):
        return "its metadata are missing or damaged"
    if saved.get("step") != step:
        return f"its metadata are those of step {saved.get('step')}"
    return None


def check_same(saved: dict, identity: dict | None) -> None:
    """Raises InputError for a checkpoint of another format, model or text (`identity` None: any)."""
    name = f"checkpoint {saved['step']}"
    if saved["format"] != FORMAT:
        raise InputError(
            f"{name} has format {saved['format']}, this version of sparse_jax reads {FORMAT}: continue it with the "
            f"version that wrote it ({saved.get('versions', {}).get('sparse_jax')}), or begin anew in another folder"
        )
    if saved.get("identity") is None or identity is None:
        return
    there, here = _flat(saved["identity"]), _flat(plain(identity))
    names = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if names:
        changes = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here" for key in names)
        raise InputError(
            f"{name} was made of another model or text ({changes}): give the same, or begin anew in another folder"
        )


def other_versions(saved: dict) -> str | None:
    """In which libraries this program differs from the one that wrote, in words; None if in none."""
    there, here = saved.get("versions") or {}, versions()
    names = [name for name in here if there.get(name) != here[name]]
    return ", ".join(f"{name} {there.get(name)} there, {here[name]} here" for name in names) or None


def _flat(given: dict, before: str = "") -> dict[str, Any]:
    """One level of names: `site.weights_sha256`."""
    found = {}
    for key, value in given.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _short(value: Any) -> str:
    return value[:16] + "..." if isinstance(value, str) and len(value) > 40 else repr(value)
