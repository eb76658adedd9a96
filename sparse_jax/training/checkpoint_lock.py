"""One writer a folder: a lock that the operating system lets go of when its process ends, however it ends."""

import contextlib
import os
import socket
from pathlib import Path

import jax
import numpy as np

from sparse_jax.errors import InputError

NAME = "writer.lock"


class WriterLock:
    """Holds a folder for this process from here to `release`; also a context manager.

    The file `writer.lock` in the folder says who writes. What holds it is `flock`, not the file's being there, so that
    the file of a killed process locks nobody out. Where the file system (or the platform) has no such locks, nothing is
    held.

    Args:
        folder: made if it is not there.

    Raises:
        InputError: another process, or this one already, writes into the folder (said which).
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / NAME
        self._file = None
        while self._file is None:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _lock(file):
                holder = _written(file)
                os.close(file)
                raise InputError(f"{folder} is being written by {holder}: wait until it ends, or give another folder")
            # One who lets go removes the file: between opening and locking it may have become another.
            if _is_file_of(file, self._path):
                self._file = file
            else:
                os.close(file)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of the folder; twice does no harm."""
        if self._file is not None:
            file, self._file = self._file, None
            # The folder may have been removed, and made anew by another since.
            if _is_file_of(file, self._path):
                with contextlib.suppress(OSError):
                    self._path.unlink()
            os.close(file)

    def __enter__(self) -> "WriterLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Shared:
    """What the other processes of a run have of the first one's lock."""

    def release(self) -> None:
        pass

    def __enter__(self) -> "_Shared":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def hold(folder: Path) -> WriterLock | _Shared:
    """A folder's lock for a run of one process or of several, of which the first one holds it.

    Raises:
        InputError: in all processes of the run, where another one writes into the folder.
    """
    lock, refused = _Shared(), None
    if jax.process_index() == 0:
        try:
            lock = WriterLock(folder)
        except InputError as error:
            refused = error
    if not all_agree(refused is None):
        raise refused or InputError(f"{folder} is being written by another run: see what process 0 says")
    return lock


def all_agree(here: bool) -> bool:
    """Whether it is so in all processes of the run; each waits for the others."""
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(here))))


def _lock(file: int) -> bool:
    """Whether nobody else has the file; from here on it is ours, where there are locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True


def _written(file: int) -> str:
    return os.pread(file, 300, 0).decode(errors="replace").strip() or "another process"


def _is_file_of(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False
