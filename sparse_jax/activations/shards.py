"""One shard of a store: a folder of arrays, whole or not there, with a checksum for every row of text.

    00012/shard.json      first row, rows, names of documents, sizes and checksums
    00012/tokens.npy      [rows, context] and so on, one file an array

It is written beside its place and renamed into it, so that a folder with this name is a whole shard. Files are mapped,
not read; a row is checked against its checksum when it is read for the first time.
"""

import json
import os
import shutil
import socket
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sparse_jax.errors import InputError

_CARD = "shard.json"
# Stands in the names of what is being written, before the machine and the process that do it.
_REMAINS = ".tmp-"


def shard_folder(store: Path, index: int) -> Path:
    """Where a shard stands."""
    return store / "shards" / f"{index:05d}"


def write_shard(folder: Path, first_row: int, arrays: dict[str, np.ndarray], facts: dict) -> None:
    """Write a shard, whole or not at all.

    Args:
        folder: its place; what stands there is replaced.
        first_row: number of its first row in the text.
        arrays: name -> `[rows, ...]`.
        facts: JSON-able, kept in shard.json.

    Raises:
        OSError: it could not be written (a full disk); nothing is left of it.
    """
    # Two processes that write one shard by mistake write the same, and do not meet.
    temporary = folder.with_name(f"{folder.name}{_REMAINS}{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = {}
        for name, values in arrays.items():
            values = np.ascontiguousarray(values)
            with (temporary / f"{name}.npy").open("wb") as file:
                write_array(file, values)
                _settle(file)
            files[name] = {
                "bytes": (temporary / f"{name}.npy").stat().st_size,
                "crc32": [_checksum(row) for row in values],
            }
        rows = len(next(iter(arrays.values())))
        card = {"first_row": first_row, "rows": rows, **facts, "files": files}
        with (temporary / _CARD).open("w", encoding="utf8") as file:
            json.dump(card, file)
            _settle(file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_array(file: BinaryIO, values: np.ndarray) -> None:
    """What `np.save` writes of a contiguous array; but an error says what is wrong, where NumPy's forgets the number.

    Raises:
        OSError: the disk is full, and so on.
    """
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
    file.write(memoryview(values).cast("B"))


def remove_remains(store: Path) -> None:
    """Remove what processes of this machine that run no more have left half-written."""
    for path in (store / "shards").glob(f"*{_REMAINS}*"):
        machine, _, process = path.name.partition(_REMAINS)[2].rpartition("-")
        if machine == socket.gethostname() and process.isdigit() and not _runs(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _settle(file) -> None:
    """On the disk before the rename that makes it count."""
    file.flush()
    os.fsync(file.fileno())


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(memoryview(np.ascontiguousarray(row)).cast("B") if row.ndim else row.tobytes())


@dataclass
class Shard:
    """A whole shard, opened.

    Attributes:
        folder: where it stands.
        first_row, rows: which rows of the text it holds.
        card: its shard.json.
        arrays: name -> `[rows, ...]`, mapped from disk.
    """

    folder: Path
    first_row: int
    rows: int
    card: dict
    arrays: dict[str, np.ndarray]
    _checked: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def row(self, name: str, number: int) -> np.ndarray:
        """One row of an array, mapped; checked when it is asked for the first time.

        Raises:
            InputError: it is not what was written.
        """
        values = self.arrays[name][number]
        checked = self._checked.setdefault(name, np.zeros(self.rows, bool))
        if not checked[number]:
            if _checksum(values) != self.card["files"][name]["crc32"][number]:
                raise InputError(
                    f"shard {self.folder} is damaged: row {self.first_row + number} of {name}.npy is not what was "
                    "written; remove that folder and harvest again with --resume"
                )
            checked[number] = True
        return values


def read_card(folder: Path) -> dict:
    """`shard.json`, with the sizes of the files compared.

    Raises:
        InputError: the shard is damaged; says what.
    """
    again = "remove that folder and harvest again with --resume"
    try:
        card = json.loads((folder / _CARD).read_text(encoding="utf8"))
        files = {name: int(found["bytes"]) for name, found in card["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"shard {folder} is damaged: its {_CARD} cannot be read ({error}); {again}") from error
    for name, size in files.items():
        path = folder / f"{name}.npy"
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes of {size:,}"
            raise InputError(f"shard {folder} is damaged: {path.name} {what}; {again}")
    return card


def open_shard(folder: Path) -> Shard:
    """A shard whose files have the right sizes, mapped.

    Raises:
        InputError: it is damaged.
    """
    card = read_card(folder)
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in card["files"]}
    except (OSError, ValueError) as error:
        raise InputError(f"shard {folder} is damaged: {error}; remove it and harvest again with --resume") from error
    for name, values in arrays.items():
        if len(values) != card["rows"]:
            raise InputError(f"shard {folder} is damaged: {name}.npy has {len(values)} rows of {card['rows']}")
    return Shard(folder, int(card["first_row"]), int(card["rows"]), card, arrays)


def damage(folder: Path) -> str | None:
    """What is wrong with a shard, every byte of its arrays read; None: nothing."""
    try:
        shard = open_shard(folder)
        for name in shard.arrays:
            for number in range(shard.rows):
                shard.row(name, number)
    except InputError as error:
        return str(error)
    return None
