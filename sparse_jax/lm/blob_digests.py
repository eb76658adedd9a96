"""Files of the hub's cache compared with their digests, once as long as they do not change.

The client that downloads them compares sizes only.
"""

import contextlib
import hashlib
import json
import os
import re
import uuid
from pathlib import Path

from sparse_jax.errors import InputError


def verify(path: Path, listed: str | None, what: str) -> None:
    """Compare a cached file with its digest, unless that has been done and it has not changed since.

    Args:
        path: in the snapshot folder.
        listed: the digest that the hub named, if it was asked; else it is the name of the blob that `path` links to.
        what: for the message.

    Raises:
        InputError: another digest, and the file is deleted; the file cannot be read.
    """
    try:
        blob = path.resolve()
        state = [blob.stat().st_size, blob.stat().st_mtime_ns]
        checked = _checked().get(str(blob))
        if isinstance(checked, list) and checked[1:] == state and listed in (None, checked[0]):
            return
        expected = listed or _blob_name(path)
        if expected is None:
            return
        found = _digest(blob, expected)
    except OSError as error:
        raise InputError(f"{what} cannot be read from the cache ({path}): {error.strerror}") from error
    if found != expected:
        raise InputError(
            f"{what} is damaged: its digest should be {expected} and is {found}; {_delete(path)}. If it happens again, "
            "the hub or mirror (HF_ENDPOINT) serves another file"
        )
    _remember(blob, [expected, *state])


def _digest(file: Path, like: str) -> str:
    """SHA-256 where `like` has 64 digits (files in large-file storage), else git's SHA-1 of a blob."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _blob_name(path: Path) -> str | None:
    """The digest that the cache names its blob by; None where files are copies, or named by something else.

    Only one step along the links: a blob may itself link to a store whose names are not digests of the bytes.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", name) else None


def _delete(path: Path) -> str:
    """Delete a file and all that it links to, so that it is fetched again; what was done, for a message."""
    chain = [path]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / os.readlink(chain[-1]))
    try:
        for link in chain:
            link.unlink(missing_ok=True)
    except OSError as error:
        return f"delete {link}, which could not be done here ({error.strerror})"
    return "it has been deleted, so run it again to fetch it anew"


def _checked_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_jax" / "verified_blobs.json"


def _checked() -> dict[str, list]:
    """Blobs whose digest was right: path -> [digest, size, modification time in ns]. Empty where it cannot be read."""
    try:
        content = json.loads(_checked_file().read_text(encoding="utf8"))
    except (OSError, RuntimeError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(blob: Path, entry: list) -> None:
    """Two processes at once may lose an entry, which costs one more reading of a file."""
    kept = {path: known for path, known in _checked().items() if os.path.exists(path)}
    # Without the entry the blob is read again next time, no more.
    with contextlib.suppress(OSError, RuntimeError):
        write_whole(_checked_file(), json.dumps(kept | {str(blob): entry}))


def write_whole(path: Path, text: str) -> None:
    """A file that others see either whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        new.write_text(text, encoding="utf8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
