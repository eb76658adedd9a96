"""The lasso on a fixed dictionary: ours against scikit-learn, SPAMS and a plain FISTA in PyTorch.

    make bench-sparse-coding        all of it, or, with everything that is to be compared installed, some:
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.sparse_coding --data real --widths 256 --features 2048

    minimise ||x - c W||^2 + lambda sum c,  c >= 0,  for 1,024 rows at once; lambda for a mean L0 of 16, 32 and 64

Contestants take turns and medians are compared; a ratio is the median of those of single turns, above 1 where ours is
faster. Freed memory is kept for all of them, threads are the same number (JAX and NumPy take all cores). Times hold
all that is made of rows and atoms, Gram matrices included; not compiling, nor copies into the form that a contestant
reads (Fortran order, float64, a device), nor SPAMS' sparse codes to dense ones. Gaps are (primal - dual) / primal of
each row, in float64, what is negative by rounding being 0.

`sparse_jax lasso` solves every row to a gap of 1e-4, `sparse_jax lasso, median` to the first of some looser ways whose
median gap is at most that; PyTorch's FISTA takes the iterations that the median needs. scikit-learn codes only the
first `--slow-rows` rows, of which its gap, L0 and FVU are; its time, but for its Gram matrix, is scaled up to all rows.
A peer that is not installed is left out by name.
"""

import importlib.metadata
import itertools
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from benchmarks import sparse_coding_data
from benchmarks.sparse_coding_peers import MAKERS, TOLERANCE, Contestant, Problem, solve
from experiments import command
from experiments.run_folder import environment, write_json
from sparse_jax.errors import InputError
from sparse_jax.numerics.allocator import keep_freed_memory

OURS, OURS_MEDIAN = "sparse_jax lasso", "sparse_jax lasso, median"
PACKAGES = ("torch", "scikit-learn", "spams-bin")
# Codes above this count as active.
ACTIVE = 1e-6


@dataclass(frozen=True)
class Flags:
    """The lasso on a fixed dictionary, solver against solver."""

    data: tuple[Literal["real", "gaussian"], ...] = ("real", "gaussian")
    """Activations with a trained dictionary, normal numbers with random atoms."""
    widths: tuple[int, ...] = (256, 512)
    """Widths of the rows."""
    features: tuple[int, ...] = (2048, 8192)
    """Sizes of the dictionary."""
    l0s: tuple[float, ...] = (16, 32, 64)
    """Active features of the solution, mean over rows."""
    rows: int = 1024
    """Rows that are coded."""
    solvers: tuple[Literal["fista", "torch", "spams", "lasso_cd", "lasso_lars", "omp"], ...] = tuple(
        name for name in MAKERS if name != "ours"
    )
    """Which take part beside ours on working sets."""
    repeats: int = 5
    """Turns."""
    slow_repeats: int = 2
    """Turns of FISTA and of scikit-learn, the first ones."""
    slow_rows: int = 64
    """Rows that scikit-learn is timed on."""
    threads: int = 2
    """Threads of PyTorch and SPAMS."""
    folder: Path = Path("runs/sparse_coding")
    """Activations and dictionaries; made where they are not there."""
    results: Path = Path("benchmarks/sparse_coding_results.json")
    """A cell that is run replaces the one that is there."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> None:
    """Run every cell, print its table, keep its figures."""
    check(flags)
    keep_freed_memory()
    for data, width, features in itertools.product(flags.data, flags.widths, flags.features):
        if data == "real":
            x, W = sparse_coding_data.real(width, features, flags.folder)
        else:
            x, W = sparse_coding_data.gaussian(width, features)
        x = np.ascontiguousarray(x[: flags.rows])
        for l0 in flags.l0s:
            problem = with_l0(x, W, l0)
            figures = measure(problem, flags)
            print_table(f"{data}, d {width}, n {features}, {len(x)} rows", problem, figures)
            about = {"data": data, "width": width, "features": features, "l0": l0}
            keep(flags, about, problem, figures)


def check(flags: Flags) -> None:
    """Raises InputError for numbers that cannot be used."""
    for name in ("widths", "features", "l0s", "rows", "repeats", "slow_repeats", "slow_rows", "threads"):
        value = getattr(flags, name)
        if not all(each > 0 for each in (value if isinstance(value, tuple) else (value,))):
            raise InputError(f"--{name.replace('_', '-')} {value}: give positive numbers")
    if flags.rows > sparse_coding_data.MOST_ROWS:
        raise InputError(f"--rows {flags.rows}: there are {sparse_coding_data.MOST_ROWS}")


def with_l0(x: np.ndarray, W: np.ndarray, wished: float) -> Problem:
    """The problem whose lambda gives the wished mean L0, within 0.5 % where bisection gets there.

    Raises:
        InputError: no lambda does: d or n is too small.
    """
    xs, Ws = jnp.array(x), jnp.array(W)

    def l0_of(penalty):
        return float(np.mean(np.sum(np.asarray(solve(xs, Ws, penalty, TOLERANCE)) > ACTIVE, axis=1)))

    most = 2 * float(np.max(x @ W.T))  # nothing is active from here on
    high = penalty = most
    found = 0.0
    while found < wished:
        high, penalty = penalty, 0.7 * penalty
        found = l0_of(penalty)
        if penalty < 1e-6 * most:
            raise InputError(f"--l0s {wished:g}: {found:.1f} at the least lambda; give a smaller one")
    low = penalty
    for _ in range(20):
        if abs(found - wished) < 0.005 * wished:
            break
        penalty = (low * high) ** 0.5
        found = l0_of(penalty)
        low, high = (penalty, high) if found > wished else (low, penalty)
    return Problem(x, W, penalty, found)


def measure(problem: Problem, flags: Flags) -> dict[str, dict[str, Any]]:
    """Contestant -> its times and what its codes are worth."""
    contestants = {}
    for name in ("ours", *flags.solvers):
        try:
            contestants |= MAKERS[name](problem, flags.threads, flags.slow_rows)
        except ImportError as error:
            print(f"left out: {name} ({error})")
    # The first run of each compiles, and its codes are looked at.
    figures = {name: worth(problem, each) for name, each in contestants.items()}
    for name, times in in_turns(contestants, len(problem.x), flags.repeats, flags.slow_repeats).items():
        figures[name]["seconds"] = times
    for each in figures.values():
        for key, first in (("ratio", OURS), ("ratio_median", OURS_MEDIAN)):
            # Turn by turn: both sides of a ratio met the same load.
            each[key] = statistics.median(a / b for a, b in zip(each["seconds"], figures[first]["seconds"]))
    return figures


def worth(problem: Problem, contestant: Contestant) -> dict[str, Any]:
    """Gaps, L0 and FVU of a contestant's codes."""
    codes = np.asarray(contestant.codes(contestant.run(contestant.prepare())))
    gaps = problem.gaps(codes) if contestant.solves else None
    return {
        "gap_median": None if gaps is None else float(np.median(gaps)),
        "gap_worst": None if gaps is None else float(np.max(gaps)),
        "l0": float(np.mean(np.sum(np.abs(codes) > ACTIVE, axis=1))),
        "fvu": problem.fvu(codes),
        "rows": len(codes),
        "note": contestant.note,
    }


def in_turns(contestants: dict[str, Contestant], rows: int, repeats: int, slow_repeats: int) -> dict[str, list[float]]:
    """Seconds that each takes for all rows, the order rotating; slow ones only take part in the first turns."""
    names = list(contestants)
    times = {name: [] for name in names}
    for i in range(max(repeats, slow_repeats)):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            contestant = contestants[name]
            if i >= (slow_repeats if contestant.slow else repeats):
                continue
            time.sleep(0.01)  # threads that spin after their work let go
            begin = time.perf_counter()
            prepared = contestant.prepare()
            middle = time.perf_counter()
            contestant.run(prepared)
            end = time.perf_counter()
            times[name].append(middle - begin + (end - middle) * rows / (contestant.rows or rows))
    return times


def print_table(title: str, problem: Problem, figures: dict[str, dict[str, Any]]) -> None:
    """One line a contestant, the fastest first."""
    print(f"\n{title}, lambda {problem.penalty:.4g}, L0 {problem.l0:.1f}")
    print(
        f"{'solver':>26} {'ms':>10} {'gap, median':>12} {'gap, worst':>11} {'L0':>6} {'FVU':>7} "
        f"{'its time / ours':>16} {'/ ours, median':>15}  note"
    )
    for name, each in sorted(figures.items(), key=lambda item: statistics.median(item[1]["seconds"])):
        gaps = [f"{each[key]:.1e}" if each[key] is not None else "no gap" for key in ("gap_median", "gap_worst")]
        scaled = f"scaled up from {each['rows']} rows" if each["rows"] < len(problem.x) else ""
        print(
            f"{name:>26} {1e3 * statistics.median(each['seconds']):10.1f} {gaps[0]:>12} {gaps[1]:>11} "
            f"{each['l0']:6.1f} {each['fvu']:7.4f} {each['ratio']:16.2f} {each['ratio_median']:15.2f}  "
            f"{'; '.join(filter(None, (each['note'], scaled)))}",
            flush=True,
        )


def keep(flags: Flags, about: dict[str, Any], problem: Problem, figures: dict[str, dict[str, Any]]) -> None:
    """Put a cell into the file of results, in the place of an earlier one."""
    cells = json.loads(flags.results.read_text())["cells"] if flags.results.exists() else []
    cells = [each for each in cells if {key: each[key] for key in about} != about]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cell = {
        **about,
        "rows": len(problem.x),
        "lambda": problem.penalty,
        "l0_of_solution": problem.l0,
        "solvers": figures,
        "environment": environment(),
        "peers": versions,
        "threads": flags.threads,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
    }
    flags.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(flags.results, {"cells": [*cells, cell]})


if __name__ == "__main__":
    command.main(Flags, main)
