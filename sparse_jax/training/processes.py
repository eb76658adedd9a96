"""Several processes as one run: how they find each other, what they must agree on, and which of them writes.

JAX's coordination service (in process 0) carries all that is said here: short texts under names, barriers, heartbeats.
Arrays go from device to device, in compiled programs. A process that fails or dies ends the others: see watchdog.py.
"""

import ipaddress
import itertools
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from sparse_jax.errors import InputError
from sparse_jax.training.when_aborted import when_aborted

T = TypeVar("T")
# Exit code for bad input.
EXIT_BAD_INPUT = 2
# Each exchange has a name of its own in the coordination service; processes make them in the same order.
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many.

    Attributes:
        distributed: whether the run has several processes.
        coordinator: "host:port" of process 0, whose service is bound to that address; None: JAX finds it (TPU, Slurm).
        processes: how many; None: JAX finds out.
        process_id: which one this is, from 0; None: JAX finds out.
        timeout: seconds in which all must have come, and in which the end of one is noticed by the others.

    Raises:
        InputError: values that do not fit each other.
    """

    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    timeout: float = 100.0

    def __post_init__(self):
        given = {"--coordinator": self.coordinator, "--processes": self.processes, "--process-id": self.process_id}
        present = [name for name, value in given.items() if value is not None]
        if present and not self.distributed:
            raise InputError(f"{', '.join(present)} without --distributed: give it too, or leave them out")
        if present and len(present) < len(given):
            missing = ", ".join(name for name in given if name not in present)
            raise InputError(
                f"{', '.join(present)} without {missing}: give all three, or none where JAX knows them (TPU, Slurm)"
            )
        if self.timeout < 5:
            raise InputError(f"--timeout {self.timeout:g}: give at least 5 seconds")
        if self.coordinator is not None:
            _check_address(self.coordinator)
        if self.processes is not None and self.processes < 1:
            raise InputError(f"--processes {self.processes}: give at least 1")
        if self.processes is not None and not 0 <= self.process_id < self.processes:
            raise InputError(
                f"--process-id {self.process_id} of --processes {self.processes}: give 0 to {self.processes - 1}, each "
                "to one process"
            )


def _check_address(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator {address}: give host:port, as 10.0.0.1:8476")
    try:
        unspecified = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:  # a name
        unspecified = False
    if unspecified:
        raise InputError(
            f"--coordinator {address}: it would be bound to every address of the machine; give the one that the "
            "other processes reach it at"
        )


def initialise(flags: Processes) -> None:
    """Join the run's processes; nothing for a run of one. Before anything else of JAX.

    Raises:
        InputError: they could not be joined: not all came in time, no cluster was found, the address is in use.
    """
    if not flags.distributed:
        return
    given: dict[str, Any] = {}
    if flags.coordinator is not None:
        if flags.process_id == 0:
            _check_free(flags.coordinator)
        given = {
            "coordinator_address": flags.coordinator,
            "coordinator_bind_address": flags.coordinator,
            "num_processes": flags.processes,
            "process_id": flags.process_id,
            "cluster_detection_method": "deactivate",
        }
    seconds = round(flags.timeout)
    try:
        # JAX aborts where not all have come in time.
        with when_aborted(lambda: f"error: {_not_joined(flags, 'they have not all come')}", EXIT_BAD_INPUT):
            jax.distributed.initialize(
                **given,
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=seconds,
                shutdown_timeout_seconds=seconds,
            )
    except (RuntimeError, ValueError) as error:  # JAX's own errors among them
        raise InputError(_not_joined(flags, " ".join(str(error).split())[:300])) from error
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"process {process} has {count}" for process, count in sorted(counts.items()))
        raise InputError(f"processes with different numbers of devices ({shown}): give all the same")


def _check_free(address: str) -> None:
    """Raises InputError where this process could not listen at an address: JAX would crash."""
    host, _, port = address.rpartition(":")
    try:
        for family, kind, protocol, _, found in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(found)
    except OSError as error:
        raise InputError(
            f"--coordinator {address}: process 0 cannot listen there ({error.strerror or error}); give an address of "
            "the machine that process 0 runs on, and a port that is free"
        ) from error


def _not_joined(flags: Processes, what: str) -> str:
    if flags.coordinator is None:
        advice = "give --coordinator, --processes and --process-id where JAX does not know the cluster"
    else:
        advice = f"are all {flags.processes} started with --coordinator {flags.coordinator}, and is that free?"
    return f"the processes could not be joined within --timeout {flags.timeout:g} s: {what}; {advice}"


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes logs, cards and reports."""
    return not several() or jax.process_index() == 0


def client() -> Any:
    """This process's line to the coordination service."""
    # It has no public name; Orbax takes it from here too.
    from jax._src import distributed

    return distributed.global_state.client


def exchange(name: str, text: str, timeout: float) -> list[str]:
    """The texts that all processes give under a name, in the order of the processes; each calls this at the same place.

    Raises:
        InputError: a process gave none within `timeout` seconds (named).
    """
    if not several():
        return [text]
    line, folder, found = client(), f"sparse_jax/{name}/{next(_NUMBERS)}", []
    line.key_value_set(f"{folder}/{jax.process_index()}", text)
    for process in range(jax.process_count()):
        try:
            found.append(line.blocking_key_value_get(f"{folder}/{process}", round(1000 * timeout)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise InputError(
                f"process {process} of {jax.process_count()} has not reached {name!r} within {timeout:g} s: see its "
                "output"
            ) from error
    return found


def agree(values: Mapping[str, Any], timeout: float) -> None:
    """Check that all processes have the same values, before they work together.

    Args:
        values: name -> what is compared, as text.
        timeout: seconds to wait for the others.

    Raises:
        InputError: a process has another value (in all processes, with its number and both values).
    """
    import json

    here = {name: str(value) for name, value in values.items()}
    first, *others = map(json.loads, exchange("agreement", json.dumps(here), timeout))
    for process, other in enumerate(others, start=1):
        differ = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differ:
            shown = "; ".join(f"{n}: {first.get(n)} in process 0, {other.get(n)} in process {process}" for n in differ)
            raise InputError(f"the processes of this run do not agree ({shown}): give all of them the same")


def first_alone(work: Callable[[], T]) -> T | None:
    """What process 0 makes of `work` while the others wait, as long as it takes; None in the others."""
    made = work() if is_first() else None
    wait_for_all("the first process's work")
    return made


def wait_for_all(name: str) -> None:
    """Come back when all processes have come here. A process that ends on the way ends the others (watchdog.py)."""
    if several():
        # Ten days: the watchdog, not this, sees to it that nobody waits in vain.
        client().wait_at_barrier(f"sparse_jax/{name}/{next(_NUMBERS)}", 10 * 24 * 3600 * 1000)
