"""One process of a run that counts: `python -m tests.training.process_worker COORDINATOR COUNT ID TIMEOUT SCENARIO`.

Each step adds up numbers that lie over the devices of all processes.
"""

import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparse_jax.errors import InputError
from sparse_jax.numerics.whole import to_host
from sparse_jax.training import processes
from sparse_jax.training.mesh import MeshShape, make_mesh
from sparse_jax.training.processes import Processes
from sparse_jax.training.shared_stop import SharedStop
from sparse_jax.training.watchdog import together


def say(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def count(flags: Processes, scenario: str) -> None:
    here = flags.process_id
    processes.agree({"batch": 64 * (1 + (scenario == "disagree") * here)}, flags.timeout)
    mesh = make_mesh(MeshShape(data=jax.device_count()))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    numbers = np.arange(12, dtype=np.float32)
    x = jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])
    np.testing.assert_array_equal(to_host(x), numbers)
    step = jax.jit(lambda x: (x.sum(), x + 1))
    steps = 0
    with SharedStop(0) as stop:
        while not stop():
            total, x = step(x)
            assert float(total) == numbers.sum() + 12 * steps
            steps += 1
            if steps == 1:
                say("counting")
                print("said aloud", flush=True)
            if steps == 5 and scenario == "input" and here == 1:
                raise InputError("five is too many")
            if steps == 5 and scenario == "bug" and here == 0:
                raise TypeError("five is no number")
            time.sleep(0.02)
    made = processes.first_alone(lambda: time.sleep(1) or "made by the first")
    say("stopped after", steps, "made", made)


if __name__ == "__main__":
    address, of, process, timeout, scenario = sys.argv[1:]
    flags = Processes(True, address, int(of), int(process), float(timeout))
    try:
        with together(flags):
            count(flags, scenario)
    except InputError as error:  # they were never joined
        say("error:", error)
        sys.exit(2)
