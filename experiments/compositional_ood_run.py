"""What `experiments.compositional_ood` does with its flags, from top to bottom."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command, run_folder
from experiments.compositional_ood import AUTOENCODERS, METHODS, Flags
from experiments.compositional_ood_methods import Made, make
from experiments.compositional_ood_report import print_table, summarise, write_report
from sparse_jax.coding import lasso, objective
from sparse_jax.coding.compositional import Composition, compose, draw, draw_x, width
from sparse_jax.errors import InputError
from sparse_jax.metrics import (
    Matching,
    hungarian_mean_cosine,
    match,
    matched_correlation,
    mean_max_cosine,
    support_scores,
)
from sparse_jax.training import JsonLines, read_lines

# The lasso's penalties that are tried on validation rows, in units of codes about 1.
PENALTIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
# Sizes above which a code counts as active, as shares of the root mean square of active codes, likewise.
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
# Evaluation rows in which each latent is active, about, at the least.
TIMES_ACTIVE = 20
# Relative duality gap of codes that are measured, and rows that are solved together.
TOLERANCE, ROWS_TOGETHER = 1e-3, 1000


class Size(NamedTuple):
    """One problem; a cell is a method on it."""

    latents: int
    active: int
    rows: int
    seed: int


class Rows(NamedTuple):
    """x and the latents behind it, on the host."""

    x: np.ndarray
    z: np.ndarray


class Task(NamedTuple):
    """A problem's rows: for training (no latents), validation, and evaluation by name ("in", "out")."""

    composition: Composition
    x: jax.Array
    validation: Rows
    evaluation: dict[str, Rows]


class Start(NamedTuple):
    """A dictionary to begin with, and whose it is."""

    method: str
    W: jax.Array


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    check(flags)
    earlier = run_folder.prepare(flags.out, resume=flags.resume, overwrite=flags.overwrite)
    if earlier is not None:
        run_folder.check_same(earlier["flags"], run_folder.jsonable(flags), flags.out)
    if flags.overwrite:
        run_folder.clear(flags.out)
    if not flags.resume:
        flags.out.mkdir(parents=True, exist_ok=True)
        config = {"flags": run_folder.jsonable(flags), "environment": run_folder.environment()}
        run_folder.write_json(flags.out / "config.json", config)
    (flags.out / "dictionaries").mkdir(exist_ok=True)
    cells = finished(flags.out)
    with command.StopRequest() as stop:
        for cell in missing_cells(flags, cells, stop):
            print(line_of(cell), flush=True)
    if stop():
        print(f"{len(cells)} cells are saved; continue with --resume")
        return command.EXIT_INTERRUPTED
    final = {"cells": cells, "summary": summarise(cells), "seconds": time.perf_counter() - started}
    run_folder.write_json(flags.out / "metrics.json", final)
    write_report(flags.out, final)
    print_table(final["summary"])
    print(f"\nreport: {flags.out / 'report.html'}   figures: {flags.out / 'metrics.json'}")
    return 0


def check(flags: Flags) -> None:
    """Raises InputError for flags that no run can use, before any work; the data's own checks are made here too."""
    if unknown := [name for name in flags.methods if name not in METHODS]:
        raise InputError(f"--methods {' '.join(unknown)}: not known; known are {' '.join(METHODS)}")
    for name in ("latents", "active", "rows", "seeds", "methods"):
        values = getattr(flags, name)
        if not values or len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: give at least one, and none twice")
    warm = [name for name in flags.methods if is_warm(name)]
    if warm and not any(name in AUTOENCODERS for name in flags.methods):
        raise InputError(f"--methods {' '.join(warm)}: give an autoencoder to begin with, {' '.join(AUTOENCODERS)}")
    for name in ("eval_rows", "steps", "batch", "learner_steps"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(flags, name)}: give a positive number")
    for name in ("learning_rate", "penalty", "first_penalty", "fixed_penalty", "width_factor"):
        if not getattr(flags, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(flags, name)}: give a positive number")
    if flags.refresh_every < 0:
        raise InputError(f"--refresh-every {flags.refresh_every}: give a positive number, or 0 for never")
    if min(flags.rows) < 2:
        raise InputError(f"--rows {min(flags.rows)}: give at least 2")
    check_devices(flags)
    for n, k in itertools.product(flags.latents, flags.active):
        if not 2 <= k <= n // 2:
            raise InputError(f"--active {k} of --latents {n}: give at least 2, and at most half of the latents")
        composition_of(flags, Size(n, k, 0, flags.seeds[0]))


def check_devices(flags: Flags) -> None:
    """Raises InputError for devices that are not there, or that cannot share a batch evenly."""
    if not 1 <= flags.devices <= jax.device_count():
        raise InputError(f"--devices {flags.devices}: this machine has {jax.device_count()}")
    if wrong := [batch for rows in flags.rows if (batch := min(flags.batch, rows)) % flags.devices]:
        raise InputError(f"--devices {flags.devices}: give a divisor of the batch, {wrong[0]}")


def is_warm(method: str) -> bool:
    """Whether the method begins with an autoencoder's dictionary."""
    return "warm" in method


def composition_of(flags: Flags, size: Size) -> Composition:
    """The known dictionary and the held-out pairs: the same for any number of training rows."""
    n, k = size.latents, size.active
    key = jax.random.fold_in(jax.random.key(size.seed), 0)
    d = width(n, k, flags.width_factor)
    return compose(key, n, d, k, held_out=flags.held_out, values=flags.values, noise=flags.noise)


def make_task(flags: Flags, size: Size) -> Task:
    """All rows of a problem. Validation and evaluation rows are the same for any number of training rows."""
    composition = composition_of(flags, size)
    key = jax.random.fold_in(jax.random.key(size.seed), 1)
    count = max(flags.eval_rows, TIMES_ACTIVE * size.latents // size.active)

    def rows(number, held_out):
        x, z = jax.device_get(draw(jax.random.fold_in(key, number), composition, count, held_out))
        return Rows(x, z)

    evaluation = {"in": rows(2, False), "out": rows(3, True)}
    return Task(composition, draw_x(jax.random.fold_in(key, 0), composition, size.rows), rows(1, False), evaluation)


def missing_cells(flags: Flags, cells: list[dict], stop: command.StopRequest) -> Iterator[dict]:
    """Finish and write every cell that is not among `cells` yet, which grows."""
    log = JsonLines(flags.out / "metrics.jsonl")
    # The order in METHODS: autoencoders before what begins with them.
    methods = [name for name in METHODS if name in flags.methods]
    done = {(*size_of(cell), cell["method"]) for cell in cells}
    for size in itertools.starmap(Size, itertools.product(flags.latents, flags.active, flags.rows, flags.seeds)):
        left = [name for name in methods if (*size, name) not in done]
        task = make_task(flags, size) if left else None
        for method in left:
            if stop():
                return
            cell = finish_cell(flags, size, method, task, cells)
            cells.append(cell)
            log.write(cell)
            yield cell


def finish_cell(flags: Flags, size: Size, method: str, task: Task, cells: list[dict]) -> dict:
    """Train a method and measure what it made."""
    started = time.perf_counter()
    start = best_autoencoder(flags.out, size, cells) if is_warm(method) else None
    made = make(method, flags, task.composition, task.x, size.seed, start and start.W)
    made.W.block_until_ready()
    seconds = time.perf_counter() - started
    np.savez(dictionary_path(flags.out, size, method), W=made.W, bias=made.bias)
    bias, value = better_bias(made, task.validation.x, flags.penalty)
    truth, found = np.asarray(task.composition.W), np.asarray(made.W)
    return {
        "step": len(cells),
        **size._asdict(),
        "width": truth.shape[1],
        "method": method,
        "start": start and start.method,
        "training_seconds": seconds,
        "training_l0": made.l0,
        "objective": value,
        "biased": bool(np.any(bias)),
        "truth_in_found": mean_max_cosine(truth, found),
        "found_in_truth": mean_max_cosine(found, truth),
        "hungarian": hungarian_mean_cosine(truth, found),
        "codes": measure(made, bias, task),
        "seconds": time.perf_counter() - started,
    }


def better_bias(made: Made, x: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """(the method's bias or 0, the lasso's objective with it): whichever is lower, so without a look at latents."""
    biases = [np.zeros(x.shape[1], np.float32)]
    if np.any(made.bias):
        biases.append(np.asarray(made.bias))
    values = [
        float(np.mean(_objective(x - bias, made.W, penalty, solved(x - bias, made.W, penalty)))) for bias in biases
    ]
    return biases[int(np.argmin(values))], min(values)


def measure(made: Made, bias: np.ndarray, task: Task) -> dict[str, dict]:
    """Kind of codes ("own", "lasso") -> figures "in" and "out", and what was chosen on validation rows for them."""
    measured = {}
    if made.encode is not None:
        encode = lambda x: np.asarray(made.encode(jnp.array(x)))  # noqa: E731
        measured["own"] = figures(encode, *chosen(encode(task.validation.x), task.validation.z)[1:], task)
    tried = []
    for penalty in PENALTIES:
        codes = solved(task.validation.x - bias, made.W, penalty)
        tried.append((*chosen(codes, task.validation.z), penalty))
    _, matching, threshold, penalty = max(tried, key=lambda each: each[0])
    measured["lasso"] = {
        **figures(lambda x: solved(x - bias, made.W, penalty), matching, threshold, task),
        "penalty": penalty,
    }
    return measured


def chosen(codes: np.ndarray, z: np.ndarray) -> tuple[float, Matching, float]:
    """(matched correlation, the matching, the threshold of the largest F1), on validation rows."""
    matching = match(z, codes)
    size = np.abs(codes[codes != 0])
    scale = float(np.sqrt(np.mean(size**2))) if size.size else 1.0
    threshold = max((scale * share for share in THRESHOLDS), key=lambda t: support_scores(z, codes, matching, t).f1)
    return matched_correlation(z, codes, matching), matching, threshold


def figures(encode, matching: Matching, threshold: float, task: Task) -> dict:
    """What is reported of one kind of codes."""
    made = {"threshold": threshold}
    for name, rows in task.evaluation.items():
        codes = encode(rows.x)
        made[name] = {
            "correlation": matched_correlation(rows.z, codes, matching),
            **support_scores(rows.z, codes, matching, threshold)._asdict(),
            "l0": float(np.mean(np.sum(np.abs(codes) > threshold, axis=1))),
        }
    return made


def solved(x: np.ndarray, W: jax.Array, penalty: float) -> np.ndarray:
    """Lasso codes, rows in groups of one shape."""
    group = min(ROWS_TOGETHER, len(x))
    padded = np.pad(x, [(0, -len(x) % group), (0, 0)])
    parts = [np.asarray(_lasso(padded[i : i + group], W, penalty)) for i in range(0, len(padded), group)]
    return np.concatenate(parts)[: len(x)]


@jax.jit
def _lasso(x: jax.Array, W: jax.Array, penalty: jax.Array) -> jax.Array:
    return lasso(x, W, jnp.asarray(penalty, x.dtype), TOLERANCE).codes


_objective = jax.jit(lambda x, W, penalty, codes: objective(x, W, jnp.asarray(penalty, x.dtype), codes))


def best_autoencoder(out: Path, size: Size, cells: list[dict]) -> Start:
    """The autoencoder of this problem on whose dictionary the objective of validation rows is lowest.

    Its bias stays behind: rows have none, and atoms that are learned beside a wrong one are bent by it.
    """
    here = [cell for cell in cells if size_of(cell) == size and cell["method"] in AUTOENCODERS]
    best = min(here, key=lambda cell: cell["objective"])
    with np.load(dictionary_path(out, size, best["method"])) as saved:
        return Start(best["method"], jnp.array(saved["W"]))


def dictionary_path(out: Path, size: Size, method: str) -> Path:
    """Where a method's dictionary is kept, for those that begin with it and for the reader."""
    name = f"n{size.latents}_k{size.active}_rows{size.rows}_seed{size.seed}_{method}.npz"
    return out / "dictionaries" / name


def size_of(cell: dict) -> Size:
    """The problem of a finished cell."""
    return Size(*(cell[name] for name in Size._fields))


def finished(out: Path) -> list[dict]:
    """The cells of an earlier run; a line that a kill cut short is dropped from the file."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    cells = read_lines(path)
    path.write_text("".join(json.dumps(cell) + "\n" for cell in cells), encoding="utf8")
    return cells


def line_of(cell: dict) -> str:
    """A finished cell for the terminal."""
    codes = "   ".join(
        f"{kind}: in {found['in']['correlation']:.3f} out {found['out']['correlation']:.3f} F1 {found['out']['f1']:.3f}"
        for kind, found in cell["codes"].items()
    )
    size = f"n {cell['latents']} d {cell['width']} k {cell['active']} rows {cell['rows']} seed {cell['seed']}"
    return f"{size}  {cell['method']:14} hungarian {cell['hungarian']:.3f}  {codes}  {cell['seconds']:.0f} s"
