"""Replies that are paid for, in a file of JSON lines: each is on the disk before it is used, none is asked for twice.

A line is {"key", "kind", "reply"}; the key is a hash of the address and the whole request, so that a reply is found
again only for exactly the same question to the same model. A process that is killed in the middle of a line leaves a
part of one, which the next one cuts off.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sparse_jax.errors import InputError


def key_of(address: str, body: dict[str, Any]) -> str:
    """What a reply is kept under: SHA-256 of the address and the body of the request."""
    content = json.dumps([address, body], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def read_lines(path: Path) -> tuple[dict[str, dict], int]:
    """(key -> line, bytes up to the end of the last whole line); empty where there is no file.

    A damaged line is passed over: its question is asked again.

    Raises:
        InputError: no line is a reply: this is another kind of file.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    found = {}
    for line in content[:whole].splitlines():
        try:
            entry = json.loads(line)
            found[entry["key"]] = {"kind": entry["kind"], "reply": entry["reply"]}
        except (ValueError, KeyError, TypeError):
            continue
    if whole and not found:
        raise InputError(f"{path} holds no replies of a language model: move the file away")
    return found, whole


class Cache:
    """The replies of one file. Threads may share it; a second process is refused.

    Use as a context manager. Without a path replies are kept in memory only; with `read_only` nothing is written.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False):
        """Raises InputError for a file of another kind, or one that another process has open."""
        self._lock, self._underway, self._file = threading.Lock(), {}, None
        self._lines: dict[str, dict] = {}
        if path is not None and (path.exists() or not read_only):
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("ab", buffering=0)
                _lock(self._file, path)
            try:
                self._lines, whole = read_lines(path)
                if self._file is not None:
                    self._file.truncate(whole)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be added any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def get(self, key: str) -> dict | None:
        """The reply under a key."""
        line = self._lines.get(key)
        return line and line["reply"]

    def get_or_ask(self, key: str, kind: str, ask: Callable[[], dict]) -> dict:
        """The reply under a key, asked for and written to the disk where it is not there.

        Two threads with the same question ask it once; if that fails, both see the failure.
        """
        with self._lock:
            if key in self._lines:
                return self._lines[key]["reply"]
            mine = key not in self._underway
            future = self._underway.setdefault(key, Future())
        if not mine:
            return future.result()
        try:
            reply = ask()
            self._add(key, kind, reply)
            future.set_result(reply)
            return reply
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._underway[key]

    def _add(self, key: str, kind: str, reply: dict) -> None:
        line = json.dumps({"key": key, "kind": kind, "reply": reply}, ensure_ascii=True) + "\n"
        with self._lock:
            if self._file is not None:
                _append(self._file, line.encode())
            self._lines[key] = {"kind": kind, "reply": reply}


def _append(file: Any, line: bytes) -> None:
    """The whole line, on the disk; where that fails (a full disk), nothing of it, so that the next line stays whole."""
    end = os.fstat(file.fileno()).st_size
    try:
        left = memoryview(line)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def _lock(file: Any, path: Path) -> None:
    """Keep other processes out for as long as the file is open; where the system has no such locks, trust the user."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(f"{path} is in use by another run: wait for it, or give another --out") from error
