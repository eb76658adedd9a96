"""A request to stop that all processes of a run see before the same step, whichever of them was asked.

JAX's preemption service listens for SIGTERM, tells the other processes, and finds the first step that none of them has
begun. A second SIGTERM, or one where no training is going on, is not listened to.
"""

import os
import signal
import sys

from jax.experimental import multihost_utils


class SharedStop:
    """SIGTERM or Ctrl-C, sent to any one process: called before each step, turns true in all processes before one.

    Work then ends there; each process has taken the same steps. A second Ctrl-C ends the process at once (and the
    others, see watchdog.py). Use as a context manager around the steps, in all processes.
    """

    def __init__(self, step: int):
        """Args: the step that comes first, the same in all processes."""
        self._next, self._asked = step, False

    def __call__(self) -> bool:
        self._next += 1
        return multihost_utils.reached_preemption_sync_point(self._next - 1)

    def __enter__(self) -> "SharedStop":
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nall processes stop after a step, then save (Ctrl-C again to stop at once)", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
