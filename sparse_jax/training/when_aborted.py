"""Last words of a process that JAX ends.

Its coordination client calls `abort` from a thread of its own where it has lost the others. A handler of Python's
signal module would be called by the main thread, and so too late; this one is called by the thread that aborts.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def when_aborted(why: Callable[[], str], code: int) -> Iterator[None]:
    """While the block lasts: where the process is aborted it says `why()` on standard error and exits with `code`."""

    def handler(number: int) -> None:
        os.write(2, f"{why()}\n".encode())
        os._exit(code)

    kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)  # alive until the handler is another
    _libc_signal()(signal.SIGABRT, ctypes.cast(kept, ctypes.c_void_p))
    try:
        yield
    finally:
        _libc_signal()(signal.SIGABRT, None)  # SIG_DFL


def _libc_signal() -> Any:
    function = ctypes.CDLL(None).signal
    function.argtypes, function.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return function
