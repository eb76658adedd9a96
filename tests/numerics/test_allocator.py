"""The allocator setting answers whether it took, and can be asked again; it stays for the process, so in a child."""

import platform
import subprocess
import sys

import pytest

ASK = "from sparse_jax.numerics.allocator import keep_freed_memory as keep; print(keep(), keep())"


def test_it_answers_with_a_bool():
    answer = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout.split()
    glibc = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
    assert answer == [str(glibc), str(glibc)]


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_it_does_nothing(monkeypatch, system):
    from sparse_jax.numerics import allocator

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert allocator.keep_freed_memory() is False
