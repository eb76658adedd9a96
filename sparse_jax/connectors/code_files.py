"""Codes in files: one folder, mapped when it is read; whole or not there.

    FOLDER/manifest.json               sites, number of tokens, what decides the codes
    FOLDER/token, document, row, position, SITE.values, SITE.indices      plain arrays, one token after the other

While it is written the folder is called FOLDER.unfinished, and `progress.json` in it says how many batches and tokens
are whole: what an interrupted run has written beyond that is cut off, and the next one goes on from there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np

from sparse_jax.connectors.paired_codes import CodeStore, SiteCodes, Tokens, raw_site
from sparse_jax.dictionaries import Normalised
from sparse_jax.dictionaries.protocol import to_json
from sparse_jax.errors import InputError
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows

FORMAT, VERSION = "sparse_jax codes", 1
MANIFEST, PROGRESS = "manifest.json", "progress.json"
_TOKENS = {"token": np.int32, "document": np.int32, "row": np.int64, "position": np.int32}


@dataclass(frozen=True)
class SiteLayout:
    """How the codes of a site are kept: a raw site's numbers, or so many slots of so many features."""

    n_features: int
    slots: int
    raw: bool = False

    @property
    def index_dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.n_features <= 1 << 16 else np.int32)


@dataclass(frozen=True)
class CodeLayout:
    """Sites of a store, and with them its arrays."""

    sites: dict[str, SiteLayout]

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape for one token, dtype)."""
        made: dict = {name: ((), np.dtype(dtype)) for name, dtype in _TOKENS.items()}
        for name, site in self.sites.items():
            made[f"{name}.values"] = ((site.slots,), np.dtype(np.float32))
            if not site.raw:
                made[f"{name}.indices"] = ((site.slots,), site.index_dtype)
        return made

    @property
    def bytes_per_token(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in self.arrays().values())

    def to_json(self) -> dict:
        return {name: asdict(site) for name, site in self.sites.items()}

    @classmethod
    def from_json(cls, fields: dict) -> "CodeLayout":
        return cls({name: SiteLayout(**site) for name, site in fields.items()})

    def store(self, arrays: dict[str, np.ndarray], overflow: dict[str, int]) -> CodeStore:
        """A store of these arrays."""
        sites = {}
        for name, site in self.sites.items():
            values = arrays[f"{name}.values"]
            if site.raw:
                sites[name] = raw_site(name, values)
            else:
                sites[name] = SiteCodes(name, site.n_features, values, arrays[f"{name}.indices"], overflow[name])
        return CodeStore(sites, Tokens(*(arrays[name] for name in _TOKENS)))


def identity_of(lm: LanguageModel, text: Rows, numbers: np.ndarray, coders: Mapping[str, Normalised | None]) -> dict:
    """What decides codes, by checksums: all weights of the model, the rows' tokens, every dictionary."""
    cuts = () if text.cuts is None else tuple(text.cuts)
    plain = (text.context, text.skip_positions, text.masked_ids, text.bos_id, text.fill_id)
    return {
        "model": {"name": lm.name, "dtype": lm.dtype, "config": _digest(repr(lm.config)), "params": _digest(lm.params)},
        "text": _digest((text.stream, text.document_starts, *cuts, repr(plain))),
        "rows": _digest(numbers),
        "coders": {
            name: None if coder is None else {
                "dictionary": to_json(coder.dictionary), "params": _digest((coder.params, coder.normaliser))
            }
            for name, coder in coders.items()
        },
    }  # fmt: skip


def _digest(tree) -> str:
    """Of all arrays and strings in a tree, with their paths, shapes and dtypes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, str):
            digest.update(leaf.encode())
            continue
        values = np.ascontiguousarray(leaf)
        digest.update(f"{values.shape}{values.dtype}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.unfinished")


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        if found["format"] != FORMAT or found["version"] != VERSION:
            raise InputError(
                f"{path} is of {found['format']} {found['version']}; this sparse_jax reads {FORMAT} {VERSION}"
            )
        return found
    except FileNotFoundError:
        raise InputError(
            f"{path.parent} holds no codes (no {path.name}): give a folder that collect_codes wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove its folder and collect again") from error


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=1), encoding="utf8")
    os.replace(temporary, path)


def _check_same(found: dict, facts: dict, folder: Path) -> None:
    due = json.loads(json.dumps(facts))
    if wrong := [name for name in due if found.get(name) != due[name]]:
        raise InputError(f"{folder} holds codes of another {', '.join(wrong)}: give another folder, or remove it")


def finished(folder: Path, facts: dict) -> bool:
    """Whether codes of this identity are there whole.

    Raises:
        InputError: others are, or something else.
    """
    folder = Path(folder)
    if not folder.exists():
        return False
    _check_same(_read_json(folder / MANIFEST)["identity"], facts, folder)
    return True


@dataclass
class CodeFiles:
    """A folder that is being written; `begun` makes it.

    Attributes:
        folder: what it will be called.
        facts: what decides the codes.
        batches, tokens: that are whole.
        layout: None before the first batch.
        overflow: of each site.
    """

    folder: Path
    facts: dict
    batches: int = 0
    tokens: int = 0
    layout: CodeLayout | None = None
    overflow: dict[str, int] = field(default_factory=dict)

    @classmethod
    def begun(cls, folder: Path, facts: dict) -> "CodeFiles":
        """A new folder, or what an interrupted run has left of the same codes.

        Raises:
            InputError: it has left those of others.
        """
        place = _unfinished(folder)
        made = cls(folder, facts)
        if (place / PROGRESS).exists():
            found = _read_json(place / PROGRESS)
            _check_same(found["identity"], facts, place)
            made.batches, made.tokens, made.overflow = found["batches"], found["tokens"], found["overflow"]
            made.layout = CodeLayout.from_json(found["sites"])
            for name, size in made._sizes().items():
                os.truncate(place / name, size)
        else:
            place.mkdir(parents=True, exist_ok=True)
        return made

    def _sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        each = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in self.layout.arrays().items()}
        return {name: self.tokens * size for name, size in each.items()}

    def append(self, layout: CodeLayout, arrays: dict[str, np.ndarray], overflow: dict[str, int]) -> None:
        """Write the next batch; what is written before `progress.json` says so does not count."""
        place = _unfinished(self.folder)
        for name, (shape, dtype) in layout.arrays().items():
            values = np.ascontiguousarray(arrays[name])
            assert (values.shape[1:], values.dtype) == (shape, dtype), name
            # A file that no progress vouches for is begun anew.
            with (place / name).open("ab" if self.batches else "wb") as file:
                file.write(memoryview(values).cast("B") if values.size else b"")
        self.layout, self.batches, self.tokens = layout, self.batches + 1, self.tokens + len(arrays["token"])
        self.overflow = {name: self.overflow.get(name, 0) + lost for name, lost in overflow.items()}
        _write_json(place / PROGRESS, self._content())

    def _content(self) -> dict:
        return {
            "identity": self.facts, "sites": self.layout.to_json(), "batches": self.batches, "tokens": self.tokens,
            "overflow": self.overflow,
        }  # fmt: skip

    def finish(self) -> None:
        """All is written: give the folder its name."""
        place = _unfinished(self.folder)
        _write_json(place / MANIFEST, self._content())
        (place / PROGRESS).unlink()
        os.rename(place, self.folder)


def open_codes(folder: Path) -> CodeStore:
    """Codes that `collect_codes` wrote, mapped: they are read from the disk when they are used.

    Raises:
        InputError: there are none, or they are damaged or unfinished.
    """
    folder = Path(folder)
    if not folder.exists() and _unfinished(folder).exists():
        raise InputError(f"the codes in {folder} are unfinished: collect them again, which goes on where it broke off")
    found = _read_json(folder / MANIFEST)
    try:
        layout, tokens = CodeLayout.from_json(found["sites"]), int(found["tokens"])
        arrays = {}
        for name, (shape, dtype) in layout.arrays().items():
            size = tokens * int(np.prod(shape)) * dtype.itemsize
            if (have := (folder / name).stat().st_size) != size:
                raise InputError(f"{folder / name} has {have:,} bytes of {size:,}: remove the folder and collect again")
            whole = (tokens, *shape)
            arrays[name] = np.memmap(folder / name, dtype, "r", shape=whole) if size else np.zeros(whole, dtype)
        return layout.store(arrays, {name: int(lost) for name, lost in found["overflow"].items()})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"the codes in {folder} are damaged ({error}): remove the folder and collect again") from error
