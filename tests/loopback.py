"""Processes of one run on this machine: started on 127.0.0.1, never left behind."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_address() -> str:
    """An address that nothing listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


class Group:
    """Processes that run the same module; what they print is in files."""

    def __init__(self, folder: Path, commands: Sequence[Sequence[str]], devices: int):
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONWARNINGS": "ignore"}
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"output_{i}.txt" for i in range(len(commands))]
        self.processes = []
        for path, command in zip(self.outputs, commands):
            with path.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=file, stderr=file
                    )
                )

    def said(self, i: int) -> str:
        """What process `i` has printed so far."""
        return self.outputs[i].read_text(errors="replace")

    def wait_for(self, words: str, i: int, seconds: float = 600) -> None:
        """Come back when process `i` has printed this."""
        until = time.monotonic() + seconds
        while words not in self.said(i):
            assert self.processes[i].poll() is None, self.said(i)
            assert time.monotonic() < until, f"no {words!r} of process {i}: {self.said(i)}"
            time.sleep(0.05)

    def codes(self, seconds: float = 600) -> list[int]:
        """Exit codes, when all have ended."""
        until = time.monotonic() + seconds
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]


@contextlib.contextmanager
def group(folder: Path, commands: Sequence[Sequence[str]], devices: int = 1) -> Iterator[Group]:
    """Start a module with arguments in each process; all are killed at the end of the block."""
    started = Group(folder, commands, devices)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.wait()
