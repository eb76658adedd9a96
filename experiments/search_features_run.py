"""What `experiments.search_features` does with its flags, from top to bottom."""

import csv
import math
import time
from pathlib import Path

import numpy as np

from experiments import run_folder
from experiments.data import check_positive
from experiments.reading import Subject, given_of, max_norm_of, open_subject
from experiments.search_features import Flags
from experiments.search_features_kinds import KINDS, Ranked, kind_of
from sparse_jax.errors import InputError
from sparse_jax.features.token_table import read_tables

# Top tokens of each feature in the table.
TOP_TOKENS = 5
TABLE = "features.csv"


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    check_positive(flags, "count", "eval_tokens")
    if flags.verify < 0 or flags.permutations < 0:
        raise InputError("--verify and --permutations cannot be negative")
    if flags.max_norm is not None and not flags.max_norm > 0:
        raise InputError(f"--max-norm {flags.max_norm}: give a positive number")
    name, by = kind_of(flags)
    content = KINDS[name].read(flags)
    run_folder.check_apart(flags.out, flags.dictionary)
    run_folder.prepare(flags.out, overwrite=flags.overwrite)
    given = given_of(flags, "model", "revision", "site", "text", "eval_text")
    subject = open_subject(flags.dictionary, given, eval_tokens=flags.eval_tokens)
    options = {"max_norm": max_norm_of(flags.max_norm, subject)}
    found = KINDS[name].search(flags, subject, content, by, options)
    tokens = top_tokens(subject, found.features[: flags.count], options)
    resolved = {
        "search": name,
        "by": by,
        "dictionary": subject.coder.dictionary.kind,
        "n_features": subject.coder.dictionary.n_features,
        "max_norm": finite(options["max_norm"]),
        **subject.data.identity(),
    }
    write(flags, resolved, found, tokens, time.perf_counter() - started)
    print_table(flags, resolved, found, tokens)
    print(f"figures: {flags.out / 'metrics.json'}; all {len(found.features)} that were ranked: {flags.out / TABLE}")
    return 0


def top_tokens(subject: Subject, features: np.ndarray, options: dict) -> list[list[tuple[str, int]]]:
    """Of each feature, the tokens of largest summed activation on the held-out text, with how often it fires there."""
    data = subject.data
    read = (data.lm, subject.coder, data.site, data.evaluation, subject.numbers, features, data.lm.config.vocab_size)
    table = read_tables(*read, **options).here
    found = []
    for column in range(len(features)):
        own = np.flatnonzero(table.features == column)
        best = own[np.argsort(-table.sums[own], kind="stable")[:TOP_TOKENS]]
        strings = data.tokenizer.token_strings(table.tokens[best])
        found.append(list(zip(strings, (int(count) for count in table.counts[best]))))
    return found


def finite(value: float) -> float | int | None:
    """A number as JSON can hold it; null for one that is infinite or not defined."""
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if math.isfinite(value) else None


def write(flags: Flags, resolved: dict, found: Ranked, tokens: list, seconds: float) -> None:
    """The run folder: config.json, metrics.json, features.csv."""
    run_folder.begin(flags, resolved, also=(TABLE,))
    rows = []
    for i, feature in enumerate(found.features[: flags.count]):
        figures = {name: finite(values[i]) for name, values in found.columns.items()}
        row = {"feature": int(feature), **figures, "top_tokens": tokens[i]}
        rows.append(row if found.places is None else {**row, "places": found.places[i]})
    summary = {name: finite(value) for name, value in found.summary.items()}
    final = {"search": resolved["search"], "by": resolved["by"], **summary, "features": rows, "seconds": seconds}
    run_folder.write_json(flags.out / "metrics.json", final)
    write_csv(flags.out / TABLE, {"feature": found.features, **found.columns})


def write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Columns by name, each `[rows]`; what is not defined stays empty."""
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values()):
            writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in map(_plain, row)])


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


def print_table(flags: Flags, resolved: dict, found: Ranked, tokens: list) -> None:
    """The best features with figures and top tokens."""
    words = [f"{name.replace('_', ' ')} {_number(value)}" for name, value in found.summary.items()]
    print("\n" + "; ".join([f"{resolved['n_features']} features at {resolved['site']}, by {resolved['by']}", *words]))
    # Errors stand behind what they are of.
    names = [name for name in found.columns if not name.endswith("error")]
    widths = {name: max(10, len(name.replace("_estimated", " est."))) for name in names}
    header = " ".join(f"{name.replace('_estimated', ' est.'):>{widths[name]}}" for name in names)
    print(f"{'feature':>8} {header}  fires most on")
    for i, feature in enumerate(found.features[: flags.count]):
        figures = " ".join(f"{_number(found.columns[name][i]):>{widths[name]}}" for name in names)
        shown = ", ".join(f"{string!r} {count}" for string, count in tokens[i])
        print(f"{feature:>8} {figures}  {shown}")
        if found.places is not None and found.places[i]:
            print(f"{'':>8} where (suffix:token): {'; '.join(found.places[i])}")


def _number(value) -> str:
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    return "-" if math.isnan(value) else f"{value:.4g}"
