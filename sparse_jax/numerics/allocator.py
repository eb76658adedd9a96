"""Keep freed memory in the process: page faults are a large hidden cost of array programs on a CPU."""

import ctypes
import sys

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory rather than give it back to the system; True if it took the setting.

    Large arrays otherwise come from fresh pages at every step, each of which the system must first clear. It helps
    every library in the process. Call it before the first large array. Elsewhere than on Linux with glibc it does
    nothing and answers False.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
