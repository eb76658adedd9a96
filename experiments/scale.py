"""A training run over a mesh and several processes: what experiments do about it around their own work."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import command, run_folder
from experiments.data import Data
from experiments.scale_flags import OWN, ScaleFlags
from sparse_jax.activations import Block, SiteBlock
from sparse_jax.activations.spread import Spread
from sparse_jax.dictionaries import Dictionary
from sparse_jax.errors import InputError
from sparse_jax.numerics.whole import to_host, to_local
from sparse_jax.training import JsonLines, processes
from sparse_jax.training.accumulation import Chunks
from sparse_jax.training.mesh import MeshShape, check_fits, make_mesh, place, shape_of
from sparse_jax.training.offload import check_host_memory
from sparse_jax.training.processes import Processes
from sparse_jax.training.shared_stop import SharedStop
from sparse_jax.training.sinks import Nowhere
from sparse_jax.training.watchdog import together

T = TypeVar("T", Block, SiteBlock)


def joined(flags: ScaleFlags) -> contextlib.AbstractContextManager[None]:
    """`together` with the processes that the flags name, for all that the experiment does.

    Raises:
        InputError: flags that do not fit each other; with `with`, processes that could not be joined.
    """
    of = Processes(flags.distributed, flags.coordinator, flags.processes, flags.process_id, flags.timeout)
    if flags.mesh is not None or flags.distributed:
        # Read when JAX starts, of CPUs alone: where a step begins before the last has ended, the collectives of the two
        # can wait for each other for ever (seen with eight devices on two cores).
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    return together(of, flags.debug)


def mesh_of(flags: ScaleFlags) -> Mesh | None:
    """The mesh of the flags; None: one device, without any. All processes must have been given the same flags.

    Raises:
        InputError: no such mesh, it does not fit the devices, or does not divide batches or blocks; the processes have
            other flags.
    """
    if processes.several():
        plain = run_folder.jsonable(flags)
        processes.agree({name: value for name, value in plain.items() if name not in OWN}, flags.timeout)
    if flags.mesh is None and not processes.several():
        return None
    shape = MeshShape(data=jax.device_count()) if flags.mesh is None else MeshShape.parse(flags.mesh)
    check_fits(shape, batch=flags.batch, n_features=shape.features, members=shape.ensemble)
    if flags.block_rows % shape.data:
        raise InputError(
            f"--block-rows {flags.block_rows}: data={shape.data} of the mesh does not divide it; give a multiple"
        )
    return make_mesh(shape)


def check_sizes(mesh: Mesh | None, batch: int, groups: Sequence[tuple[int, int]]) -> None:
    """Raises InputError unless the mesh divides (features, members) of each group of dictionaries, and a batch."""
    for n_features, members in groups if mesh is not None else ():
        check_fits(shape_of(mesh), batch=batch, n_features=n_features, members=members)


def check_memory(flags: ScaleFlags, mesh: Mesh | None, dictionaries: Sequence[Dictionary]) -> None:
    """Raises InputError unless batches and dictionaries can be cut as the flags say, and moments lie where they say."""
    shape = MeshShape() if mesh is None else shape_of(mesh)
    for dictionary in dictionaries:
        chunks_of(flags).check(dictionary, flags.batch, shape.data, shape.features)
    if flags.offload:
        check_host_memory(mesh)


def chunks_of(flags: ScaleFlags) -> Chunks:
    """How a step is cut."""
    return Chunks(flags.accumulate, flags.feature_chunks)


def check_same_data(flags: ScaleFlags, data: Data) -> None:
    """Raises InputError unless all processes have the same model and text, and a row of it at least."""
    if not processes.several():
        return
    rows = data.train.n_rows
    processes.agree({**data.identity(), "rows of text": rows}, flags.timeout)
    if rows is not None and rows < jax.process_count():
        raise InputError(
            f"the text has {rows} rows to train on and there are {jax.process_count()} processes: give more text, a "
            "shorter --context or fewer processes"
        )


def lines_of(flags: Any) -> JsonLines | Nowhere:
    """The run's metrics.jsonl, which process 0 alone writes."""
    return JsonLines(flags.out / "metrics.jsonl") if processes.is_first() else Nowhere()


def stop_request(step: int) -> SharedStop | command.StopRequest:
    """What listens for Ctrl-C and SIGTERM from a step on."""
    return SharedStop(step) if processes.several() else command.StopRequest()


def exit_code_when_stopped() -> int:
    """Of a run that was asked to stop and has saved. What starts many processes takes a code above 0 for a failure."""
    return 0 if processes.several() else command.EXIT_INTERRUPTED


def placed(state: Any, mesh: Mesh | None, members: bool = False) -> Any:
    """A state, or several, laid out over the mesh; `members`: stacked along a leading axis."""
    return state if mesh is None else place(mesh, state, members)


def on_one_device(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that lie over a mesh, on this process's default device; all processes call it at the same place."""
    return tree if mesh is None else to_local(tree)


def sites_on_one_device(by_site: dict[str, Data]) -> dict[str, Data]:
    """`Data.on_one_device` of several sites of one model, which stays one."""
    first = next(iter(by_site.values())).on_one_device()
    return {site: dataclasses.replace(data, lm=first.lm, spread=None) for site, data in by_site.items()}


def whole_block(block: T, spread: Spread | None) -> T:
    """A block in its order, as NumPy arrays where it was spread."""
    return block if spread is None else jax.tree.map(spread.in_order, to_host(block))


def first_rows(values: np.ndarray, spread: Spread | None, rows: int) -> Any:
    """The first rows of a block's array, in its order; on all devices alike where it was spread."""
    return values[:rows] if spread is None else spread.leading(values, rows)
