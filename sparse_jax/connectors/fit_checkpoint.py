"""The state of a connector's training in one file, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparse_jax.errors import InputError


def write_checkpoint(path: Path, states: Any, step: int, identity: dict) -> None:
    """Write the states (any pytree of arrays) after `step` steps of the run that `identity` describes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {jax.tree_util.keystr(key): np.ascontiguousarray(leaf) for key, leaf in _leaves(states)}
    beside = path.with_name(path.name + ".tmp")
    save_file(arrays, beside, {"step": str(step), "run": json.dumps(identity, sort_keys=True)})
    os.replace(beside, path)


def read_checkpoint(path: Path, like: Any, identity: dict) -> tuple[Any, int]:
    """(states, steps taken) of a checkpoint, in the structure of `like`.

    Raises:
        InputError: it is damaged, or of another run: what differs is named.
    """
    try:
        with safe_open(path, "numpy") as file:
            said = file.metadata() or {}
            other = json.loads(said.get("run", "{}"))
            if differ := sorted(name for name in {*other, *identity} if other.get(name) != _plain(identity.get(name))):
                raise InputError(
                    f"checkpoint {path} is of another run: its {', '.join(differ)} differ; "
                    f"there {[other.get(name) for name in differ]}, here {[identity.get(name) for name in differ]}. "
                    "Give another file, or delete it"
                )
            leaves = [jnp.array(file.get_tensor(jax.tree_util.keystr(key))) for key, _ in _leaves(like)]
            return jax.tree.unflatten(jax.tree.structure(like), leaves), int(said["step"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from error


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _plain(value):
    return json.loads(json.dumps(value))
