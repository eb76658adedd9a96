"""The files of a checkpoint: their sizes are written with it, so that a damaged one is known before it is read.

Orbax reads a damaged checkpoint for as long as a whole one before it fails, and reads that it abandons go on in the
background and complain when they end.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

SIZES = "sizes.json"
# Part of the name of a folder that is not yet a checkpoint.
UNFINISHED = ".orbax-checkpoint-tmp"
# After the name of a checkpoint that was passed over.
DAMAGED = ".damaged"


def write_sizes(folder: Path) -> None:
    """Into each checkpoint in the folder that is about to be finished, the sizes of its files of arrays."""
    for unfinished in folder.glob(f"*{UNFINISHED}*"):
        sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in _files(unfinished)}
        with (unfinished / SIZES).open("w", encoding="utf8") as file:
            json.dump(sizes, file)
            file.flush()
            os.fsync(file.fileno())


def damaged_file(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words; None where nothing is, or no sizes were written."""
    path = checkpoint / SIZES
    if not path.exists():
        return None
    try:
        sizes = json.loads(path.read_text(encoding="utf8"))
        for name, size in sizes.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes of {size:,}"
    except (ValueError, AttributeError, OSError):
        return f"{SIZES} is damaged"
    return None


def set_aside(folder: Path, steps: Sequence[int]) -> None:
    """Rename checkpoints, so that they neither count as checkpoints nor are lost; earlier ones of that name go."""
    for step in steps:
        target = folder / f"{step}{DAMAGED}"
        shutil.rmtree(target, ignore_errors=True)
        (folder / str(step)).rename(target)


def _files(folder: Path) -> list[Path]:
    # What lies at the top is changed as the folder gets its name, and is JSON that is checked by being read.
    return sorted(path for path in folder.glob("*/**/*") if path.is_file())
