"""The course of an experiment on connections: layer after layer, each kept when it is done, a control beside."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import run_folder
from experiments.connecting import Ends, Opened, open_dictionaries
from experiments.connecting_codes import Codes, collect
from experiments.connecting_flags import ConnectingFlags
from sparse_jax.errors import InputError

LAYERS, FIGURES = "layers", "figures.json"

# (flags, what is opened, a connection, codes) -> its figures
Measure = Callable[[Any, Opened, Ends, Codes], dict]


def run_layers(
    flags: ConnectingFlags,
    experiment: str,
    measure: Measure,
    write_report: Callable[[Any, Opened, dict], None],
    print_summary: Callable[[dict], None],
    *,
    suits: Callable[[Opened], None] = lambda opened: None,
    over_all: Callable[[Opened, dict], dict] = lambda opened, layers: layers,
    facts: dict | None = None,
) -> int:
    """Measure every layer and write metrics.json and the report; returns the exit code.

    Args:
        flags: checked already.
        experiment: its name, which a control must have too.
        measure: of one layer; kept in its folder, and not done again by a resumed run.
        write_report, print_summary: of the final figures.
        suits: raises InputError where what is opened cannot be used.
        over_all: layers' figures, completed by what needs all of them.
        facts: more of the final figures.
    """
    started = time.perf_counter()
    control = read_control(flags, experiment)
    earlier = prepared(flags)
    opened = open_dictionaries(flags)
    suits(opened)
    check_control(control, opened)
    begin(flags, opened, earlier)
    codes, layers = collect(flags, opened), {}
    for ends in opened.ends:
        figures = done_before(flags, ends)
        if figures is None:
            figures = measure(flags, opened, ends, codes)
            run_folder.write_json(layer_folder(flags.out, ends) / FIGURES, figures)
        layers[str(ends.layer)] = figures
    final = {
        "experiment": experiment,
        "model": opened.data.flags.model,
        "weights_sha256": opened.data.identity()["weights_sha256"],
        **(facts or {}),
        "layers": over_all(opened, layers),
        "control": None if control is None else control["layers"],
    }
    write_report(flags, opened, final)
    run_folder.write_json(flags.out / "metrics.json", final | {"seconds": time.perf_counter() - started})
    print_summary(final)
    print(f"report: {flags.out / 'report.html'}   figures: {flags.out / 'metrics.json'}")
    return 0


@dataclass
class Stages:
    """Seconds of each stage of a layer's work, told as they go."""

    label: str
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)
        print(f"{self.label}: {name}, {self.seconds[name]:.1f} s", flush=True)


def layer_folder(out: Path, ends: Ends) -> Path:
    """Where a layer's tables, connectors and pages are."""
    return out / LAYERS / str(ends.layer)


def done_before(flags: ConnectingFlags, ends: Ends) -> dict | None:
    """A layer's figures where --resume finds it done; else its folder is emptied."""
    folder = layer_folder(flags.out, ends)
    if flags.resume and (folder / FIGURES).is_file():
        return json.loads((folder / FIGURES).read_text(encoding="utf8"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return None


def begin(flags: ConnectingFlags, opened: Opened, earlier: dict | None) -> None:
    """The run folder with its config.json; a resumed run keeps what it has."""
    if earlier is None:
        run_folder.begin(flags, opened.resolved(), also=(LAYERS,))


def prepared(flags: ConnectingFlags) -> dict | None:
    """Check the run folder; an earlier run's config where it is resumed, whose flags must be the same."""
    earlier = run_folder.prepare(flags.out, overwrite=flags.overwrite, resume=flags.resume)
    if earlier is not None:
        run_folder.check_same(earlier["flags"], run_folder.jsonable(flags), flags.out)
    return earlier


def read_control(flags: ConnectingFlags, experiment: str) -> dict | None:
    """`metrics.json` of --step0-run; None where none was given.

    Raises:
        InputError: it is no finished run of this experiment.
    """
    if flags.step0_run is None:
        return None
    path = flags.step0_run / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, json.JSONDecodeError):
        raise InputError(f"--step0-run {flags.step0_run}: no finished run is there (metrics.json)") from None
    if found.get("experiment") != experiment:
        raise InputError(f"--step0-run {flags.step0_run} is a run of {found.get('experiment')!r}, not of {experiment}")
    return found


def check_control(control: dict | None, opened: Opened) -> None:
    """Raises InputError where the control is of the same model, or of none of the same sites."""
    if control is None:
        return
    if control.get("weights_sha256") == opened.data.identity()["weights_sha256"]:
        raise InputError("--step0-run is of the same weights: give a run on the model with random ones")
    if not set(control["layers"]) & {str(ends.layer) for ends in opened.ends}:
        raise InputError(f"--step0-run has layers {', '.join(control['layers'])}: give a run on the same ones")


def plain(value: Any) -> Any:
    """JSON values: of named tuples and dataclasses dicts, of arrays lists, None for what is no finite number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rows_of(columns: dict[str, Any]) -> list[dict]:
    """One JSON row a target of columns of equal length."""
    listed = {name: plain(np.asarray(values)) for name, values in columns.items()}
    return [dict(zip(listed, row)) for row in zip(*listed.values(), strict=True)]
