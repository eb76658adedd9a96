"""The run folder: what an experiment leaves behind, and who may write into it."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

import sparse_jax
from experiments.scale_flags import NAMES as SCALE_FLAGS
from sparse_jax.errors import InputError

# Keeps other writers out of a run folder, from the first write on.
from sparse_jax.training.checkpoint_lock import hold as hold

# Names that an experiment writes; `--overwrite` removes these and nothing else.
OWNED = ("config.json", "metrics.jsonl", "metrics.json", "statistics.npz", "report.html", "checkpoints", "dictionaries")
# Flags that say how a run is carried out, not what it computes: they may differ on resume.
CARRYING_OUT = (
    "resume", "overwrite", "debug", "out", "reuse_memory", "checkpoint_every", "keep_checkpoints", "keep_best",
    "log_every", *SCALE_FLAGS,
)  # fmt: skip


def prepare(out: Path, *, overwrite: bool, resume: bool | None = None) -> dict | None:
    """Check that the run folder may be used; makes and removes nothing.

    `resume` is None where the experiment cannot be resumed. Returns the earlier run's config when resuming (see
    `check_same`), else None.

    Raises:
        InputError: the folder is in use and neither flag was given; both were; there is nothing to resume; the folder
            cannot be written.
    """
    if resume and overwrite:
        raise InputError("--resume continues a run and --overwrite removes it: give one of them")
    used = [name for name in OWNED if (out / name).exists()]
    earlier = None
    if resume:
        earlier = read_config(out)
    elif used and not overwrite:
        ways = "--overwrite or another --out" if resume is None else "--resume, --overwrite or another --out"
        raise InputError(f"{out} already holds a run ({', '.join(used)}): give {ways}")
    elif out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    check_writable(out)
    return earlier


def check_writable(out: Path) -> None:
    """Raises InputError if the folder could not be written; makes nothing, so that a refused run leaves no trace."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror or error}") from error


def check_apart(out: Path, *read: Path | None) -> None:
    """Raises InputError if what is read lies in the folder that is written: `--overwrite` would remove it."""
    for path in read:
        if path is not None and out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise InputError(f"--out {out} holds what is read, {path}: give another --out")


def begin(flags: Any, resolved: dict | None = None, also: tuple[str, ...] = ()) -> None:
    """Make the folder `flags.out`, an earlier run's files removed with `flags.overwrite`, and write its config.json.

    Args:
        flags: the experiment's.
        resolved: what they came to: model, text, dictionary.
        also: files and folders that this experiment writes beside OWNED.
    """
    if flags.overwrite:
        clear(flags.out, also)
    flags.out.mkdir(parents=True, exist_ok=True)
    content = {"flags": jsonable(flags), "environment": environment()}
    if resolved is not None:
        content["resolved"] = resolved
    write_json(flags.out / "config.json", content)


def clear(out: Path, also: tuple[str, ...] = ()) -> None:
    """Remove an earlier run's files (and nothing else) from the folder."""
    for name in (*OWNED, *also):
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_config(out: Path) -> dict:
    """`config.json` of an earlier run.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        return json.loads((out / "config.json").read_text(encoding="utf8"))
    except FileNotFoundError:
        raise InputError(f"{out} holds no run (no config.json); give the run folder") from None
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{out / 'config.json'} cannot be read: {error}") from error


def check_same(before: dict, now: dict, out: Path) -> None:
    """Raises InputError naming every flag in which a resumed run would differ from the one in the folder."""
    names = [name for name in {**before, **now} if name not in CARRYING_OUT and before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in names)
        raise InputError(f"the run in {out} had other flags ({changes}); give the same, or another --out")


def jsonable(flags: Any) -> dict:
    """A dataclass of flags as plain JSON values; a dictionary's kind is kept."""
    plain = dataclasses.asdict(flags)
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if kind := getattr(value, "kind", None):
            plain[field.name] = {"kind": kind, **plain[field.name]}
    # Through JSON, so that flags are equal to what is read again: it turns tuples into lists, and paths here into text.
    return json.loads(json.dumps(plain, default=str))


def environment() -> dict:
    """Versions and device, for `config.json`."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "safetensors")
    return {
        "sparse_jax": sparse_jax.__version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "command": " ".join(sys.argv[1:]),
    }


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
    os.replace(temporary, path)
