"""Checkpoints of the whole training state with Orbax: written whole or not at all, the newest whole one restored."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from sparse_jax.errors import InputError
from sparse_jax.training import checkpoint_files as files
from sparse_jax.training import checkpoint_metadata as metadata
from sparse_jax.training import checkpoint_tree as tree
from sparse_jax.training.checkpoint_lock import all_agree, hold
from sparse_jax.training.ensemble import States
from sparse_jax.training.state import TrainState, steps_taken


class Checkpoints:
    """The `checkpoints/` folder of a run, for its one writer. Use as a context manager.

    A checkpoint is written in the background, from a snapshot of the state: the next step may consume its buffers.
    Orbax writes into a temporary folder and renames it, so that a killed write leaves no checkpoint behind; older ones
    are removed after that. What went wrong in the background is raised by the next `save`, `latest`, `restore`, or at
    the end.

    With several processes all of them call everything in the same order, and all see the same folder; the first one
    holds it against other writers.

    Args:
        folder: made if it is not there.
        keep: how many of the newest checkpoints stay.
        best: a metric that is logged; the checkpoint with the lowest one ("fvu") or the highest
            ("explained_variance:highest") stays too. It is that of the last batch before the checkpoint, of an ensemble
            the mean over its members.
        config: the run's flags; kept with each checkpoint.
        identity: of model and text, as JSON values; a checkpoint of another one is not restored.
        background: False writes before `save` returns.
        say: gets a line where a checkpoint is passed over, or was written with other versions.

    Raises:
        InputError: another process writes into the folder; numbers below 1; no name of a metric.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        *,
        best: str | None = None,
        config: dict | None = None,
        identity: dict | None = None,
        background: bool = True,
        say: Callable[[str], None] = print,
    ):
        if keep < 1:
            raise InputError(f"{keep} checkpoints to keep: give at least 1")
        # Orbax takes over a second to import; a `--help` must not wait for it.
        from orbax.checkpoint import v1 as ocp

        self._folder, self._about, self._background = folder.absolute(), (config, identity), background
        self._say = say if jax.process_index() == 0 else lambda line: None
        self._kept = _Kept(keep, best)
        self._pending = None
        self._lock = hold(self._folder)
        try:
            context = ocp.Context()
            # Where they cannot be made, Orbax (0.12.8) waits in the background for minutes before it says so.
            context.asynchronous.create_directories_asynchronously = False
            # Called when all is written, before the temporary folder gets its name.
            if jax.process_index() == 0:
                context.asynchronous.post_finalization_callback = lambda: files.write_sizes(self._folder)
            self._checkpointer = ocp.training.Checkpointer(
                self._folder, context=context, preservation_policy=self._kept, cleanup_tmp_directories=True
            )
            self._kept.metrics.update(self._saved_metrics() if best else {})
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self._finish()
        except InputError as failed:
            if error is None:
                raise
            self._say(f"also: {failed}")
        finally:
            with contextlib.suppress(Exception):  # what it has to say of the last save was said
                self._checkpointer.close()
            self._lock.release()

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None. Whether it is undamaged, `restore` finds out."""
        self._finish()
        return max(self._steps(), default=None)

    def best(self) -> int | None:
        """Step of the best checkpoint by the metric that was named, or None."""
        self._finish()
        return self._kept.best_of(self._steps())

    def save(self, state: TrainState | tuple[States, ...], rows: Sequence[dict] = ()) -> None:
        """Write a checkpoint under the state's step, unless that step's is there. A save that still goes on is awaited.

        Args:
            state: of a run, or those of an ensemble's groups; what is written of an ensemble is the same whichever way
                it is stepped.
            rows: the metrics that belong to it, one for each member.

        Raises:
            InputError: the last save failed (a full disk, say); the metric of the best is not in `rows`; a checkpoint
                of a later step is there.
        """
        self._finish()
        step, newest = steps_taken(state), max(self._steps(), default=-1)
        if newest == step:
            return
        if newest > step:
            raise InputError(f"{self._folder} holds checkpoint {newest}, later than {step}: give another folder")
        metric = self._kept.metric_of(rows)
        self._kept.metrics[step] = metric
        stored = tree.snapshot(state)
        about = metadata.describe(step, stored, *self._about, metric)
        try:
            response = self._checkpointer.save_async(step, stored, force=True, custom_metadata=about)
        except OSError as error:
            raise InputError(_not_written(step, error)) from error
        self._pending = (step, response)
        if not self._background:
            self._finish()

    def wait(self) -> None:
        """Until all is on disk; raises InputError if the last save failed."""
        self._finish()

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The newest whole checkpoint, with `like`'s structure, shapes, dtypes and shardings.

        A damaged one is passed over for the next older one, which is said, and renamed to `STEP.damaged`. It is whole
        when each file has its size and each array its digest; so it does not matter on which mesh, or by how many
        processes, it was written.

        Args:
            like: a state as the run would start with, on the mesh where it is to go on.
            step: that of a certain checkpoint instead, to look at (`best()`): a run goes on from the newest.

        Raises:
            InputError: there is no whole one; it does not fit the run's flags; it is of another model or text.
        """
        self._finish()
        steps = sorted(self._steps(), reverse=True) if step is None else [step]
        if not steps or not set(steps) <= set(self._steps()):
            raise InputError("there is no checkpoint to resume from" if step is None else f"no checkpoint {step}")
        damaged: dict[int, str] = {}
        for at in steps:
            state, reason = self._read(at, like)
            if state is not None:
                break
            damaged[at] = reason
        else:
            reasons = "; ".join(f"{at}: {reason}" for at, reason in damaged.items())
            raise InputError(f"no whole checkpoint in {self._folder} ({reasons}): begin anew in another folder")
        if damaged:
            self._pass_over(damaged, at)
        return state

    def _pass_over(self, damaged: dict[int, str], whole: int) -> None:
        for at, reason in damaged.items():
            self._say(f"checkpoint {at} is damaged ({reason}): set aside as {at}{files.DAMAGED}, going on from {whole}")
        if jax.process_index() == 0:
            files.set_aside(self._folder, list(damaged))
        all_agree(True)  # renamed, before others look at the folder again
        self._checkpointer.reload()

    def _read(self, step: int, like: Any) -> tuple[Any | None, str]:
        """The state of a checkpoint, or None and why it is damaged. Raises InputError if it is whole and unfit."""
        reason = files.damaged_file(self._folder / str(step))
        if not reason:
            try:
                about = self._checkpointer.metadata(step).custom_metadata
                reason = metadata.reason_unreadable(about, step)
            except Exception as error:
                reason = _cause(error)
        if not all_agree(not reason):
            return None, reason or "another process cannot read it"
        metadata.check_same(about, self._about[1])
        wanted = tree.abstract(like)
        if unlike := tree.difference(about["shapes"], tree.shapes(wanted)):
            raise InputError(f"checkpoint {step} does not fit this run: {unlike}")
        try:
            stored = self._checkpointer.load(step, wanted)
        except Exception as error:
            if _out_of_memory(error):
                raise
            stored, reason = None, _cause(error)
        if not all_agree(stored is not None):
            return None, reason or "another process cannot read it"
        if name := tree.damaged_array(stored):
            return None, f"{name} is not what was saved"
        if others := metadata.other_versions(about):
            self._say(
                f"checkpoint {step} was written with other versions ({others}): last bits may differ from here on"
            )
        return tree.usable(stored, like), ""

    def _steps(self) -> list[int]:
        return [each.step for each in self._checkpointer.checkpoints]

    def _saved_metrics(self) -> dict[int, float | None]:
        found = {}
        for step in self._steps():
            try:
                found[step] = (self._checkpointer.metadata(step).custom_metadata or {}).get("metric")
            except Exception:  # a damaged one, which is not the best
                found[step] = None
        return found

    def _finish(self) -> None:
        """Wait for the save that goes on in the background; raises InputError if it failed."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            if _out_of_memory(error):
                raise
            raise InputError(_not_written(step, error)) from error


class _Kept:
    """Which checkpoints stay, in the form that Orbax asks for: the newest, and the best by a metric.

    Orbax keeps metrics in a file of their own and cannot open a folder in which one is damaged (0.12.8): here they are
    among the metadata.

    Attributes:
        metrics: step -> the metric, None where it is not finite.
    """

    def __init__(self, latest: int, best: str | None):
        self._latest = latest
        self._name, _, direction = (best or "").partition(":")
        if best is not None and (not self._name or direction not in ("", "lowest", "highest")):
            raise InputError(f"best checkpoint by {best!r}: give a metric's name, NAME:lowest or NAME:highest")
        self._sign = -1.0 if direction == "highest" else 1.0
        self.metrics: dict[int, float | None] = {}

    def metric_of(self, rows: Sequence[dict]) -> float | None:
        """The metric of a checkpoint: the mean over the rows that are logged with it, of those that are finite."""
        if not self._name:
            return None
        if any(self._name not in row for row in rows):
            known = ", ".join(sorted(rows[0]))
            raise InputError(f"best checkpoint by {self._name!r}: no such metric is logged; there are: {known}")
        finite = [float(row[self._name]) for row in rows if math.isfinite(row[self._name])]
        return sum(finite) / len(finite) if finite else None

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The best of some steps, the later one of two that are equal; None if there is none with a metric."""
        known = [(self._sign * value, -step) for step in steps if (value := self.metrics.get(step)) is not None]
        return -min(known)[1] if known else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's `PreservationPolicy`."""
        steps = [each.step for each in checkpoints]
        kept = {*sorted(steps)[-self._latest :], self.best_of(steps)}
        return [step in kept for step in steps]


def _not_written(step: int, error: BaseException) -> str:
    return f"checkpoint {step} could not be written ({_cause(error)}): earlier ones are still there"


def _cause(error: BaseException) -> str:
    """What is at the bottom of a chain of errors, in a line. Orbax ends some of its searches with a KeyError."""
    found = error
    while (error := error.__cause__ or error.__context__) is not None:
        if not isinstance(error, LookupError | StopIteration):
            found = error
    return f"{type(found).__name__}: {' '.join(str(found).split())}"[:200]


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
