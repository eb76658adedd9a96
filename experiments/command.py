"""What every experiment's command line shares: parsing, errors as one line, interrupts."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro

from sparse_jax.errors import InputError

# Bad input; the same code that the parser uses for a wrong flag.
EXIT_BAD_INPUT = 2
# Ended by Ctrl-C (or SIGTERM) after saving, as shells expect of an interrupted program.
EXIT_INTERRUPTED = 130


def main(flags: type, run: Callable[[Any], int | None]) -> None:
    """Parse the flags, run the experiment, exit.

    Args:
        flags: a frozen dataclass; its docstring is the help text. It has a field `debug`.
        run: the experiment; returns the exit code (None: 0). An InputError is printed as one line, without a
            traceback unless `--debug` was given.
    """
    parsed = tyro.cli(flags, config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes))
    try:
        code = run(parsed)
    except InputError as error:
        if parsed.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:  # outside training, where a StopRequest takes it
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code or 0)


class StopRequest:
    """Ctrl-C and SIGTERM as a request: `stop()` turns true, and work ends at the next safe place.

    A second Ctrl-C ends the program at once, as usual.
    """

    def __init__(self):
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping after this step, then saving (Ctrl-C again to stop at once)", file=sys.stderr)
