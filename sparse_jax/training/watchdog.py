"""When one of several processes fails or dies, the others end too, soon, with a message that names it.

A thread of each process writes a sign of life into JAX's coordination service and reads those of the others. JAX has
heartbeats of its own and ends a process by itself a little later, with a message for those who know JAX; it is what
remains where this thread cannot run. The service lives in process 0: when that dies, JAX ends the others at once.
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from sparse_jax.errors import InputError
from sparse_jax.training import processes
from sparse_jax.training.processes import EXIT_BAD_INPUT, Processes
from sparse_jax.training.when_aborted import when_aborted

# Exit codes: another process is gone or failed; this one failed by Ctrl-C, by anything else.
EXIT_OTHER, EXIT_INTERRUPTED, EXIT_FAILED = 3, 130, 1

_ALIVE, _FAILED, _LEFT = "sparse_jax/alive", "sparse_jax/failed", "sparse_jax/left"
_DONE = "done"
# Shares of the timeout: between signs of life (at most a second), and without one before a process counts as gone. JAX
# finds out after 0.5 to 1.
_EVERY, _GONE = 0.1, 0.35


@contextlib.contextmanager
def together(flags: Processes, debug: bool = False) -> Iterator[None]:
    """Join the run's processes for the length of a `with` block; a run of one process is left as it is.

    With several: in all but the first what is printed is dropped; an error that leaves the block ends this process
    (`os._exit`, since JAX would wait for the others at the end), and all others with a message that says which process
    failed and how; a process that dies ends the others within `flags.timeout` seconds.

    Raises:
        InputError: the processes could not be joined.
    """
    processes.initialise(flags)
    if not processes.several():
        yield
        return
    watchdog = Watchdog(processes.client(), jax.process_index(), jax.process_count(), flags)
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if not processes.is_first():
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(when_aborted(watchdog.why_aborted, EXIT_OTHER))
        watchdog.start()
        try:
            yield
            processes.wait_for_all("the end")
        except BaseException as error:  # nothing may leave here: see above
            watchdog.fail(error, debug)
        watchdog.close()
    jax.distributed.shutdown()


class Watchdog:
    """The thread, and how this process says that it has failed."""

    def __init__(self, line: Any, process: int, count: int, flags: Processes):
        """Args: the line to the coordination service; which process this is; of how many; how long to wait."""
        self._line, self._process, self._count, self._timeout = line, process, count, flags.timeout
        self._every = min(1.0, _EVERY * flags.timeout)
        self._closed, self._leaving = threading.Event(), False
        # Process -> its last sign of life and when it was first seen here.
        self._seen: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """This process has done its work; no other is watched any more."""
        self._closed.set()
        self._thread.join()
        self._line.key_value_set(f"{_ALIVE}/{self._process}", _DONE, True)

    def fail(self, error: BaseException, debug: bool = False) -> None:
        """Tell the others what went wrong here, and end this process; does not return."""
        if _from_outside(error):
            # Most likely another process is gone: then the thread says which one, and ends this process.
            print(
                f"process {self._process}: an exchange with the other processes broke off; finding out which is gone",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(self._timeout)
        self._leaving = True
        known = isinstance(error, InputError | KeyboardInterrupt)
        if debug or not known:
            traceback.print_exception(error)
        said = "interrupted" if isinstance(error, KeyboardInterrupt) else _one_line(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._line.key_value_set(f"{_FAILED}/{self._process}", said, True)
            self._line.key_value_set(f"{_LEFT}/{self._process}", "", True)
        if isinstance(error, KeyboardInterrupt):
            code = EXIT_INTERRUPTED
        else:
            code = EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED
        if self._process == 0:
            self._wait_until_left()
        _end(code, f"error: {said}")

    def _wait_until_left(self) -> None:
        """What was said is kept in this process: it stays until the others have heard it, or are gone."""
        until = time.monotonic() + self._timeout
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while time.monotonic() < until and len(self._line.key_value_dir_get(_LEFT)) < self._count:
                time.sleep(self._every)

    def _watch(self) -> None:
        number = 0
        while not self._closed.wait(self._every):
            number += 1
            try:
                self._line.key_value_set(f"{_ALIVE}/{self._process}", str(number), True)
                alive, failed = self._read(_ALIVE), self._read(_FAILED)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone or cannot be reached: JAX ends this process
            now = time.monotonic()
            for process in range(self._count):
                sign = alive.get(process, "")
                if process not in self._seen or self._seen[process][0] != sign:
                    self._seen[process] = (sign, now)
            if not self._leaving:
                self._judge(failed, now)

    def _judge(self, failed: dict[int, str], now: float) -> None:
        """End this process where another has failed or is gone."""
        here = f"process {self._process} of {self._count} ends with it"
        for process, said in failed.items():
            if process != self._process:
                self._leave(f"error: process {process} failed, and {here}: {said}")
        for process, (sign, since) in self._seen.items():
            silent = now - since
            if process != self._process and sign != _DONE and silent > _GONE * self._timeout:
                self._leave(
                    f"error: process {process} is gone (no sign of life for {silent:.0f} s: it was killed, or its "
                    f"machine cannot be reached), and {here}; start all processes again with --resume"
                )

    def why_aborted(self) -> str:
        """What to say when JAX ends this process: it has lost process 0, or found out first that another is gone."""
        now, gone = time.monotonic(), 0
        silent = {process: now - since for process, (sign, since) in self._seen.items() if sign != _DONE}
        others = {process: value for process, value in silent.items() if process not in (0, self._process)}
        if others and max(others.values()) > 3 * self._every + silent.get(self._process, 0.0):
            gone = max(others, key=others.__getitem__)
        return (
            f"error: process {gone} is gone, and JAX has ended process {self._process} of {self._count} (it says "
            "why above); start all processes again with --resume"
        )

    def _leave(self, message: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._line.key_value_set(f"{_LEFT}/{self._process}", "", True)
        if self._process == 0:
            self._wait_for_verdicts()
        _end(EXIT_OTHER, message)

    def _wait_for_verdicts(self) -> None:
        """Process 0 goes last, so that the others can still find out by themselves what it has found out."""
        until = time.monotonic() + 0.2 * self._timeout
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while time.monotonic() < until and len(self._line.key_value_dir_get(_LEFT)) < self._count - 1:
                time.sleep(self._every / 4)

    def _read(self, folder: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self._line.key_value_dir_get(folder)}


def _from_outside(error: BaseException) -> bool:
    """Whether an error is one that the end of another process gives: a status of the runtime, under whatever type."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError | RuntimeError)
        and not isinstance(error, InputError)
        and re.match(r"[A-Z_]{4,}: ", str(error)) is not None
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:1000]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _end(code: int, message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    os._exit(code)
