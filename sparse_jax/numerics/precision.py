"""Which compute dtype is fast on this machine."""

import jax


def fast_dtype() -> str:
    """ "bfloat16" where matrix units take it (TPU, GPU, x86 CPUs with AMX), "float32" elsewhere."""
    if jax.default_backend() != "cpu":
        return "bfloat16"
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            return "bfloat16" if "amx_bf16" in file.read() else "float32"
    except OSError:
        return "float32"
