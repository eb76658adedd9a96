"""The activation store: what a model's activations on a text are, on disk, each row with its tokens and documents.

    STORE/manifest.json     what decides the contents: model, tokenizer, text, sites, how rows were made (written first)
    STORE/shards/00012/     whole shards only (see shards.py), `shard_rows` rows of text each, in the text's order
    STORE/end.json          how many rows there are, written when the text has been read to its end

Nothing is ever changed in place: shards and manifest are written once. Rows stand in the order of the text; the order
that training sees them in is made when they are read (stored_blocks.py), the same for every seed as without a store.
"""

import json
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from sparse_jax.activations.row_encoding import Entry, as_float32
from sparse_jax.activations.shards import Shard, damage, open_shard, read_card, shard_folder
from sparse_jax.errors import InputError
from sparse_jax.lm.order import row_indices, windowed_row_indices
from sparse_jax.lm.rows import RowBatch, checked_indices
from sparse_jax.numerics.sparse_codes import SparseCodes

FORMAT, VERSION = "sparse_jax activation store", 1
MANIFEST, END = "manifest.json", "end.json"
# Shards that are mapped at once: each of their files takes a file descriptor, of which a process has about a thousand.
_OPEN_FILES = 512


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        identity: what decides the activations (model, weights, tokenizer, text, ...), as the experiment knows it.
        entries: what is stored of which site.
        context: tokens in a row.
        fill_id: the token that stands in empty places.
        vocab_size: of the model.
        shard_rows: rows in each shard but the last.
        n_rows: rows of the whole text, where that is known before it is read; else None, and end.json says it.
        window_rows: the text is read in windows of so many rows, and permuted within them; None: as a whole.
    """

    identity: dict
    entries: tuple[Entry, ...]
    context: int
    fill_id: int
    vocab_size: int
    shard_rows: int
    n_rows: int | None
    window_rows: int | None

    def to_json(self) -> dict:
        """As it stands in the file."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "entries"}
        return {"format": FORMAT, "version": VERSION, **plain, "entries": [each.to_json() for each in self.entries]}

    @property
    def token_dtype(self) -> np.dtype:
        """Of token ids in the files."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

    @property
    def bytes_per_row(self) -> int:
        """Space that a row of text takes: arrays of the entries, tokens, targets, documents, mask."""
        fixed = self.token_dtype.itemsize + 4 + 4 + 1
        return self.context * (fixed + sum(entry.bytes_per_token for entry in self.entries))

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays of a shard: name -> (shape for one row, dtype)."""
        found = {
            "tokens": self.token_dtype, "targets": np.dtype(np.int32), "mask": np.dtype(bool),
            "document": np.dtype(np.int32),
        }  # fmt: skip
        made = {name: ((self.context,), dtype) for name, dtype in found.items()}
        for entry in self.entries:
            for name, (shape, dtype) in entry.arrays.items():
                made[array_name(entry, name)] = ((self.context, *shape), dtype)
        return made


def array_name(entry: Entry, array: str) -> str:
    """What an array of an entry is called in a shard."""
    return f"{entry.name}.{array}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it, whole or not at all; nothing is written where the same stands already.

    Raises:
        InputError: another one stands there: says in what it differs.
    """
    if (folder / MANIFEST).exists():
        check_same(read_manifest(folder), manifest, folder)
        return
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    _write(folder / MANIFEST, manifest.to_json())


def check_same(found: Manifest, due: Manifest, folder: Path) -> None:
    """Raises InputError with all in which two manifests differ."""
    found, due = found.to_json(), json.loads(json.dumps(due.to_json()))
    one, other = found.pop("identity"), due.pop("identity")
    names = sorted({*one, *other})
    differ = [f"{name}: {one.get(name)!r} there, {other.get(name)!r} now" for name in names
              if one.get(name) != other.get(name)]  # fmt: skip
    differ += [f"{name}: {found[name]!r} there, {due[name]!r} now" for name in found if found[name] != due[name]]
    if differ:
        raise InputError(f"the store in {folder} is another one ({'; '.join(differ)}): give another --out")


def write_end(folder: Path, n_rows: int) -> None:
    """Say how many rows the text has."""
    _write(folder / END, {"n_rows": n_rows})


def _write(path: Path, content: dict) -> None:
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
    os.replace(temporary, path)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        if found.pop("format") != FORMAT:
            raise InputError(f"{path} is no manifest of an activation store")
        if (version := found.pop("version")) != VERSION:
            raise InputError(f"{path} is of version {version} of the format; this sparse_jax reads {VERSION}")
        return Manifest(**{**found, "entries": tuple(map(Entry.from_json, found["entries"]))})
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} holds no activation store (no {MANIFEST}); make one with python -m experiments.harvest --out"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); harvest again into another folder") from error


def known_rows(folder: Path, manifest: Manifest) -> int | None:
    """Rows of the whole text; None while its end has not been reached.

    Raises:
        InputError: end.json is damaged.
    """
    path = folder / END
    if not path.exists():
        return manifest.n_rows
    try:
        return int(json.loads(path.read_text(encoding="utf8"))["n_rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it and harvest again with --resume") from error


@dataclass
class ActivationStore:
    """A store to read from; make it with `open_store`. Rows are indexed as `lm.rows.Rows` are.

    Attributes:
        folder: where it is.
        manifest: what it holds.
        n_rows: rows that can be read: all, or those of the whole shards at the start of an unfinished store.
    """

    folder: Path
    manifest: Manifest
    n_rows: int
    _shards: OrderedDict[int, Shard] = field(default_factory=OrderedDict, repr=False)

    @property
    def context(self) -> int:
        return self.manifest.context

    @property
    def fill_id(self) -> int:
        return self.manifest.fill_id

    @property
    def n_tokens(self) -> int:
        """Positions of all rows together."""
        return self.n_rows * self.context

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.manifest.shard_rows)

    @property
    def documents(self) -> dict[int, str]:
        """Names of the documents, by the numbers that `RowBatch.document` has. Reads the card of every shard."""
        found: dict[int, str] = {}
        for index in range(self.n_shards):
            found |= {int(number): name for number, name in self.shard(index).card["documents"].items()}
        return found

    def __len__(self) -> int:
        return self.n_rows

    def entry(self, name: str) -> Entry:
        """What is stored under a name: a site, or `codes.SITE`.

        Raises:
            InputError: nothing is.
        """
        names = [entry.name for entry in self.manifest.entries]
        if name not in names:
            raise InputError(f"the store in {self.folder} has nothing of {name}; it has {', '.join(names)}")
        return self.manifest.entries[names.index(name)]

    def ordered(self, seed: int, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """The rows at places start .. start + count - 1 of the order that a seed gives: that of the text itself."""
        if self.manifest.window_rows is None:
            return row_indices(self.n_rows, seed, start, count)
        return windowed_row_indices(self.n_rows, self.manifest.window_rows, seed, start, count)

    def shard(self, index: int) -> Shard:
        """A shard, mapped.

        Raises:
            InputError: it is missing or damaged.
        """
        if index in self._shards:
            self._shards.move_to_end(index)
            return self._shards[index]
        shard = open_shard(shard_folder(self.folder, index))
        wrong = [
            name
            for name, (shape, dtype) in self.manifest.arrays().items()
            if name not in shard.arrays or (shard.arrays[name].shape[1:], shard.arrays[name].dtype) != (shape, dtype)
        ]
        if wrong or shard.first_row != index * self.manifest.shard_rows:
            what = ", ".join(f"{name}.npy" for name in wrong) or "its place"
            raise InputError(f"shard {shard.folder} is damaged: {what} is not what the manifest says; harvest it again")
        self._shards[index] = shard
        while len(self._shards) * len(shard.arrays) > _OPEN_FILES and len(self._shards) > 1:
            self._shards.popitem(last=False)
        return shard

    def _read(self, name: str, numbers: np.ndarray, positions: list[np.ndarray] | None) -> np.ndarray:
        """An array's rows `[rows, context, ...]`; or of each row only some positions, one after the other."""
        shape, dtype = self.manifest.arrays()[name]
        if positions is None:
            out = np.empty((len(numbers), *shape), dtype)
        else:
            out = np.empty((sum(map(len, positions)), *shape[1:]), dtype)
        at = 0
        for i, number in enumerate(numbers):
            index, inside = divmod(int(number), self.manifest.shard_rows)
            row = self.shard(index).row(name, inside)
            if positions is None:
                out[i] = row
            else:
                out[at : at + len(positions[i])] = row[positions[i]]
                at += len(positions[i])
        return out

    def __getitem__(self, indices: int | slice | Int64[np.ndarray, "*batch"]) -> RowBatch:
        """Tokens, targets, mask and documents of rows, as `Rows` give them; -1 is an empty row.

        Raises:
            InputError: a shard is damaged.
        """
        index = checked_indices(indices, self.n_rows)
        flat, there = index.reshape(-1), index.reshape(-1)[:, None] >= 0
        found = {}
        for name, empty in (("tokens", self.fill_id), ("targets", -1), ("mask", False), ("document", -1)):
            values = self._read(name, np.maximum(flat, 0), None)
            values = np.where(there, values, np.asarray(empty, values.dtype))
            values = values.astype(np.int32) if name == "tokens" else values
            found[name] = values.reshape(*index.shape, self.context)
        return RowBatch(**found)

    def arrays(
        self, name: str, numbers: Int64[np.ndarray, " rows"], positions: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """What is stored under a name for some rows, as it is written: `[rows, context, ...]` (see `row_encoding`).

        Args:
            name: a site, or `codes.SITE`.
            numbers: which rows of the text.
            positions: of each row, which positions are wanted; the answer then has them one after the other.

        Raises:
            InputError: nothing is stored under the name; a shard is damaged.
        """
        entry = self.entry(name)
        numbers = checked_indices(numbers, self.n_rows)
        return {each: self._read(array_name(entry, each), numbers, positions) for each in entry.arrays}

    def activations(self, site: str, numbers: Int64[np.ndarray, " rows"]) -> np.ndarray:
        """`[rows, context, width]` float32 activations of some rows.

        Raises:
            InputError: the site is not stored; a shard is damaged.
        """
        return as_float32(self.entry(site), self.arrays(site, numbers))

    def codes(self, name: str, numbers: Int64[np.ndarray, " rows"]) -> SparseCodes:
        """`[rows, context, slots]` sparse codes of some rows, NumPy arrays.

        Raises:
            InputError: no codes are stored under the name; a shard is damaged.
        """
        entry = self.entry(name)
        if entry.dtype != "codes":
            raise InputError(f"{name} holds activations, not codes")
        found = self.arrays(name, numbers)
        return SparseCodes(found["values"], found["indices"].astype(np.int32))

    def damage(self) -> list[str]:
        """What is wrong with each damaged shard, all of the store read."""
        found = (damage(shard_folder(self.folder, index)) for index in range(self.n_shards))
        return [each for each in found if each]


def whole_shards(folder: Path, manifest: Manifest) -> tuple[set[int], list[str]]:
    """The shards that are there with files of the right sizes, and what is wrong with those that are not."""
    whole, wrong = set(), []
    for path in sorted((folder / "shards").glob("*")):
        if path.name.isdigit():
            try:
                read_card(path)
                whole.add(int(path.name))
            except InputError as error:
                wrong.append(str(error))
    return whole, wrong


def open_store(folder: str | Path, *, unfinished: bool = False) -> ActivationStore:
    """A store to read from.

    Args:
        folder: where it is.
        unfinished: take the whole shards at the start of a store that is not complete for a store of that text.

    Raises:
        InputError: there is none, it is damaged, or it is unfinished and that is not wanted.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    n_rows = known_rows(folder, manifest)
    whole, wrong = whole_shards(folder, manifest)
    if wrong:
        raise InputError(wrong[0])
    due = None if n_rows is None else -(-n_rows // manifest.shard_rows)
    first_missing = next(index for index in range(len(whole) + 1) if index not in whole)
    if due is not None and first_missing >= due:
        return ActivationStore(folder, manifest, n_rows)
    state = f"{len(whole)} of {'an unknown number of' if due is None else due} shards are there"
    if not unfinished:
        raise InputError(
            f"the store in {folder} is unfinished ({state}): continue it with python -m experiments.harvest --resume, "
            "or give --unfinished-store to use what is there"
        )
    if not first_missing:
        raise InputError(f"the store in {folder} has no shard at its start ({state})")
    rows = first_missing * manifest.shard_rows
    return ActivationStore(folder, manifest, rows if n_rows is None else min(rows, n_rows))
