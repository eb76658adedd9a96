"""What a device can do at its best, for plans (plan.py): a table of published figures, and this CPU measured.

Published figures are peaks: no program reaches all of them. `link` is what a device can send in a second along one axis
of a mesh that lies along one axis of the machine's torus with links that close the ring, both ways round:

    TPU     inter-chip bandwidth of a chip, one way, over the axes of its torus (v5e, v6e: two; v4, v5p: three).
            A slice too small to close its rings (v5e: fewer than 16 along an axis) has half of it.
    GPU     NVLink of a GPU, one way; among the eight of a node only. Between nodes it is the network's, often a tenth.

Sources, as read in 2026:

    v4      cloud.google.com/tpu/docs/v4 (275 TFLOP/s, 32 GiB, 1,200 GB/s); links: Jouppi et al. 2023
            (arXiv 2304.01433), table 4: 6 links of 50 GB/s
    v5e     cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 16 GB, 819 GB/s, links 400 GB/s both ways)
    v5p     cloud.google.com/tpu/docs/v5p (459 TFLOP/s, 95 GB, 2,765 GB/s, links 1,200 GB/s both ways)
    v6e     cloud.google.com/tpu/docs/v6e (918 TFLOP/s, 32 GB, 1,638 GB/s, links 800 GB/s both ways)
    A100    NVIDIA A100 80GB SXM datasheet (312 TFLOP/s bfloat16 and 156 TF32, dense; 80 GB; 2,039 GB/s; NVLink 600
            GB/s both ways)
    H100    NVIDIA H100 SXM datasheet (989 TFLOP/s bfloat16 and 495 TF32, dense; 80 GB; 3,350 GB/s; NVLink 900 GB/s
            both ways)

"GB" of memory is taken as 10^9 bytes where the source does not write GiB. float32 products: JAX's default precision
rounds their inputs to bfloat16 on a TPU and to TF32 on these GPUs.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.numerics.matmul import product


@dataclass(frozen=True)
class Chip:
    """A device.

    Attributes:
        name: in the table.
        flops: operations a second in products of bfloat16 inputs (a multiplication and an addition are two).
        flops_float32: the same of float32 inputs, at JAX's default precision.
        memory: bytes.
        bandwidth: bytes a second between memory and the units.
        link: bytes a second that it can send along one axis of a mesh.
        selects: entries a second that an exact top-k goes through; None: as fast as they are read.
        cpu: the CPU's forms of a step are taken: blocks of rows, gathers where they win.
    """

    name: str
    flops: float
    flops_float32: float
    memory: float
    bandwidth: float
    link: float
    selects: float | None = None
    cpu: bool = False

    def rate(self, compute_dtype: str) -> float:
        """Operations a second in products of this dtype."""
        return self.flops if compute_dtype == "bfloat16" else self.flops_float32

    def shared(self, devices: int) -> "Chip":
        """One of several devices that share this chip, as fake devices share a CPU."""
        divided = {
            name: getattr(self, name) / devices for name in ("flops", "flops_float32", "memory", "bandwidth", "link")
        }
        selects = None if self.selects is None else self.selects / devices
        return dataclasses.replace(self, **divided, selects=selects)


def _tpu(name: str, tera: float, memory: float, bandwidth: float, both_ways: float, axes: int) -> Chip:
    return Chip(name, 1e12 * tera, 1e12 * tera, memory, 1e9 * bandwidth, 1e9 * both_ways / 2 / axes)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 32 * 2**30, 1200, 600, 3),
        _tpu("v5e", 197, 16e9, 819, 400, 2),
        _tpu("v5p", 459, 95e9, 2765, 1200, 3),
        _tpu("v6e", 918, 32e9, 1638, 800, 2),
        Chip("a100", 312e12, 156e12, 80e9, 2039e9, 300e9),
        Chip("h100", 989e12, 495e12, 80e9, 3350e9, 450e9),
    )
}
# What is measured, not looked up.
THIS_CPU = "this-cpu"


def chip_of(name: str) -> Chip:
    """The chip of this name; `this-cpu` is measured, which takes some seconds.

    Raises:
        InputError: it is not in the table.
    """
    if name == THIS_CPU:
        return this_cpu()
    if name not in CHIPS:
        raise InputError(f"chip {name!r} is not in the table: give {', '.join(CHIPS)} or {THIS_CPU}")
    return CHIPS[name]


def this_cpu(rows: int = 512, width: int = 512, features: int = 4096, repeats: int = 5) -> Chip:
    """This machine's CPU: the best of some repeats of a product, a pass over memory and a top-k.

    Rates that a program reaches, not peaks; of a machine that does other work meanwhile, what that leaves.

    Args:
        rows, width, features: sizes of the product `[rows, width] @ [width, features]`; a block of rows of a step.
        repeats: of each measurement.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        left, right = (jnp.ones(shape, jnp.float32) for shape in ((rows, width), (width, features)))
        made = {}
        for dtype in (jnp.bfloat16, jnp.float32):
            multiply = jax.jit(lambda a, b: product(a, b, jnp.float32))
            operands = left.astype(dtype), right.astype(dtype)
            made[dtype] = 2 * rows * width * features / _least_seconds(multiply, operands, repeats)
        large = jnp.ones(1 << 25, jnp.float32)  # 134 MB, larger than the caches
        passed = 2 * large.nbytes / _least_seconds(jax.jit(lambda a: a + 1), (large,), repeats)
        values = jax.random.normal(jax.random.key(0), (rows, features), jnp.float32)
        selected = values.size / _least_seconds(jax.jit(lambda a: lax.top_k(a, 32)), (values,), repeats)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    # What fake devices send each other is copied in memory.
    return Chip(THIS_CPU, made[jnp.bfloat16], made[jnp.float32], memory, passed, passed, selected, cpu=True)


def _least_seconds(function: Callable, arguments: tuple, repeats: int) -> float:
    jax.block_until_ready(function(*arguments))
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - begun)
    return min(taken)
