"""Text as a stream of named documents: the embedded texts, text files, JSON lines, datasets of the Hugging Face hub."""

import difflib
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_jax.errors import InputError
from sparse_jax.lm import embedded

# What stands between two documents of a text file.
DOCUMENT_END = "<|endoftext|>"

_HUB = "hub:"
_TEXT_ENDINGS = (".txt", ".txt.gz")
_JSON_ENDINGS = (".jsonl", ".jsonl.gz")
_FORMS = "a path to .txt, .txt.gz, .jsonl or .jsonl.gz, or hub:owner/name[:config]"


@dataclass(frozen=True)
class Document:
    """One document.

    name: `austen/Emma`, `state-of-the-union/241`, `file.txt#3`, `owner/name#3`. The number counts from 1: documents in
        a text file, lines in JSON lines, examples in a hub dataset, blank ones included.
    text: stripped of white space at both ends; never blank.
    """

    name: str
    text: str


def documents(source: str | Path, *, split: str = "train", text_field: str = "text") -> Iterator[Document]:
    """The documents of a text, read as they are asked for; blank ones are left out.

    source: one of
        - `austen`, `state-of-the-union`, or `embedded` for both: they come with the package;
        - a path to `.txt` or `.txt.gz`: UTF-8, documents separated by `<|endoftext|>`;
        - a path to `.jsonl` or `.jsonl.gz`: one JSON object a line;
        - `hub:owner/name` or `hub:owner/name:config`: a dataset of the Hugging Face hub, streamed, so that no more of
          it is fetched than is read.
    split: the split of a hub dataset; other sources have only `train`.
    text_field: the name of the text in JSON lines and in hub datasets; other sources do not use it.

    Raises InputError at once for an unknown name, a missing file or a directory, a wrong ending, a split that there
    cannot be, an unreachable hub; while reading for a damaged gzip file, text that is not UTF-8, a line that is not a
    JSON object with a text in `text_field`; and at the end if every document was blank.
    """
    source = str(source)
    if source.startswith(_HUB):
        return _documents_of(source, _hub_dataset_name(source), _hub_texts(source, split, text_field))
    if split != "train":
        raise InputError(
            f"split {split!r} of {source!r}: only hub datasets have splits; leave it out or give hub:owner/name"
        )
    if source == embedded.EVERYTHING:
        return itertools.chain.from_iterable(_embedded(name) for name in embedded.TEXTS)
    if source in embedded.TEXTS:
        return _embedded(source)
    path = _file(source)
    texts = _text_file(path) if _has_ending(path, _TEXT_ENDINGS) else _json_lines(path, text_field)
    return _documents_of(source, path.name, texts)


def fingerprint(source: str | Path) -> str:
    """What the text is, for caches and records: the SHA-256 of a file's bytes (of all files for `embedded`), in hex.

    For a hub dataset it is `source` as it was given, since the data are not read: it does not see a change on the hub.

    Raises InputError for an unknown name, a missing file, a directory, a wrong ending.
    """
    source = str(source)
    if source.startswith(_HUB):
        _hub_dataset_name(source)
        return source
    names = list(embedded.TEXTS) if source == embedded.EVERYTHING else [source]
    digest = hashlib.sha256()
    for name in names:
        with (embedded.TEXTS[name].path if name in embedded.TEXTS else _file(name)).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _documents_of(source: str, name: str, texts: Iterable[tuple[int, str]]) -> Iterator[Document]:
    """Named documents from (place, text) pairs; an error if there is none that is not blank."""
    blank = True
    for place, text in texts:
        if text := text.strip():
            blank = False
            yield Document(f"{name}#{place}", text)
    if blank:
        raise InputError(f"the text {source!r} is empty: it has no document that is not blank; give another text")


def _embedded(name: str) -> Iterator[Document]:
    text = embedded.TEXTS[name]
    for document_name, (_, content) in zip(text.names, _text_file(text.path), strict=True):
        yield Document(document_name, content.strip())


def _file(source: str) -> Path:
    """The path of a text file that exists, or an error that says what may be given."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"the text {source!r} is a directory; give {_FORMS}")
    if not path.exists() and not path.suffix:
        names = [*embedded.TEXTS, embedded.EVERYTHING]
        near = difflib.get_close_matches(source.lower().replace("_", "-"), names, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown text {source!r}: {guess}give one of {', '.join(names)}, {_FORMS}")
    if not _has_ending(path, _TEXT_ENDINGS + _JSON_ENDINGS):
        raise InputError(f"the text {source!r} has the ending {path.suffix!r}; give {_FORMS}")
    if not path.exists():
        raise InputError(f"the text file {source!r} does not exist; check the path, or give {_FORMS}")
    return path


def _has_ending(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, gzipped or not, each ending in one newline sign, without a byte-order mark."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8").replace("\r\n", "\n")
                yield text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text file {str(path)!r} is not UTF-8: line {number} has the byte 0x{error.object[error.start]:02x} "
            f"at place {error.start + 1}; convert it (for instance with iconv -t utf-8)"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"the gzip file {str(path)!r} is cut short or damaged after line {number} ({error}); fetch or make it again"
        ) from error
    except OSError as error:
        raise InputError(f"the text file {str(path)!r} cannot be read: {error.strerror or error}") from error


def _text_file(path: Path) -> Iterator[tuple[int, str]]:
    # Line by line, so that a file of any size is held in memory one document at a time.
    place, parts = 1, []
    for line in _lines(path):
        *ended, rest = line.split(DOCUMENT_END)
        for part in ended:
            yield place, "".join([*parts, part])
            place, parts = place + 1, []
        parts.append(rest)
    yield place, "".join(parts)


def _json_lines(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}); each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise InputError(f"{where} is a JSON {type(record).__name__}; each line must be one JSON object")
        yield number, _text_of(record, text_field, where)


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text in a record; a null is a blank text."""
    if text_field not in record:
        raise InputError(
            f"{where} has no field {text_field!r}; it has {', '.join(map(repr, record)) or 'none'}: name one of them"
        )
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"the field {text_field!r} in {where} is of type {type(text).__name__}; it must be a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the field {text_field!r} in {where} holds half a surrogate pair at place {error.start + 1}; "
            "no tokenizer takes it, write the text as UTF-8"
        ) from error
    return text


def _hub_dataset_name(source: str) -> str:
    name = source.removeprefix(_HUB).partition(":")[0]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(
            f"the text {source!r} does not name a dataset of the hub; give hub:owner/name or hub:owner/name:config"
        )
    return name


def _hub_texts(source: str, split: str, text_field: str) -> Iterator[tuple[int, str]]:
    name, config = _hub_dataset_name(source), source.removeprefix(_HUB).partition(":")[2]
    # Slow to import, and only this source needs it.
    import datasets

    # The hub, the network and the dataset's files fail in many ways, each with an exception of its own.
    try:
        examples = iter(datasets.load_dataset(name, config or None, split=split, streaming=True))
    except Exception as error:
        raise _unreadable(source, split, error) from error
    return _hub_rows(examples, source, split, text_field)


def _hub_rows(examples: Iterator[dict], source: str, split: str, text_field: str) -> Iterator[tuple[int, str]]:
    for number in itertools.count(1):
        try:
            example = next(examples)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(source, split, error) from error
        yield number, _text_of(example, text_field, f"example {number} of {source!r}")


def _unreadable(source: str, split: str, error: Exception) -> InputError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return InputError(
        f"the split {split!r} of {source!r} cannot be read: {reason.rstrip('.')}; check the name, the configuration "
        "and the network, or give a file or an embedded text"
    )
