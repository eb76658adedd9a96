"""What `experiments.feature_measures` does with its flags, from top to bottom."""

import time

import numpy as np

from experiments import run_folder
from experiments.data import check_positive
from experiments.feature_measures import Flags
from experiments.reading import Subject, controls, given_of, max_norm_of, open_subject
from experiments.search_features_run import finite, write_csv
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.counted_codes import count_firings
from sparse_jax.features.rules import KINDS, find_rules
from sparse_jax.features.token_entropy import base_entropy, commonest_shares, entropies, entropies_of_draws
from sparse_jax.features.token_table import read_tables

TABLE = "features.csv"
# Figures of the printed table, by their names in metrics.json.
SHOWN = {
    "commonest_token": "share of the commonest token",
    "token_entropy": "token entropy, nats, equal firings",
    "before_entropy": "entropy of the token before",
    "rule_precision": "best rule: precision",
    "rule_recall": "best rule: recall",
    "rule_f1": "best rule: F1",
    "rule_correlation": "best rule: correlation",
    "token_correlation": "token alone: correlation",
    "token_before_correlation": "token before alone: correlation",
    "regex_correlation": "pattern alone: correlation",
    "regex_before_correlation": "pattern before alone: correlation",
    "token_entropy_all": "token entropy, nats, all firings",
}


class TooFew(InputError):
    """Too few features fire often enough for a mean and its error."""


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    check(flags)
    run_folder.check_apart(flags.out, flags.dictionary, flags.step0_run)
    run_folder.prepare(flags.out, overwrite=flags.overwrite)
    given = given_of(flags, "model", "revision", "site", "text", "eval_text")
    subject = open_subject(flags.dictionary, given, eval_tokens=flags.eval_tokens)
    step0 = None if flags.step0_run is None else open_subject(flags.step0_run, eval_tokens=flags.eval_tokens)
    halves = split_rows(subject.numbers)
    max_norm = max_norm_of(flags.max_norm, subject)
    firing = count(subject, subject.coder, halves, max_norm)
    k = max(1, round(float(sum(f.sum() for f, _ in firing)) / sum(n for _, n in firing)))
    measured, columns = {}, []
    for name, read_on, coder, limit in bases(flags, subject, step0, k, max_norm):
        counts = firing if coder is subject.coder else None
        try:
            figures, rows = measure(flags, name, read_on, coder, limit, counts)
        except TooFew as few:
            if name == "dictionary":
                raise
            print(f"{name} is left out: {few}", flush=True)
            continue
        measured[name] = figures
        columns.append(rows)
    final = {
        "tokens": sum(n for _, n in firing),
        "k_of_controls": k,
        "bases": measured,
        "seconds": time.perf_counter() - started,
    }
    write(flags, subject, step0, final, columns)
    print_table(flags, subject, final)
    print(f"figures: {flags.out / 'metrics.json'}; each feature: {flags.out / TABLE}")
    return 0


def check(flags: Flags) -> None:
    """Raises InputError for numbers that cannot be, before anything is loaded."""
    check_positive(flags, "sample", "min_firings", "draws", "levels", "eval_tokens")
    if flags.sample < 2:
        raise InputError(f"--sample {flags.sample}: a standard error needs at least two features")
    if flags.max_norm is not None and not flags.max_norm > 0:
        raise InputError(f"--max-norm {flags.max_norm}: give a positive number")
    for name in ("draws", "levels"):
        if getattr(flags, name) > 2 * flags.min_firings:
            raise InputError(
                f"--{name} {getattr(flags, name)} with --min-firings {flags.min_firings}: features may fire only "
                f"{2 * flags.min_firings} times, on both halves together; give less, or more firings"
            )


def split_rows(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the first and of the second half of the text: at most one document is in both.

    Raises:
        InputError: there are fewer than two rows.
    """
    if len(numbers) < 2:
        raise InputError("the text has a single row: give more --eval-tokens")
    ordered = np.sort(numbers)
    return ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]


def bases(flags: Flags, subject: Subject, step0: Subject | None, k: int, max_norm: float):
    """(name, what it is read on, dictionary, largest norm that counts) of all that is measured."""
    yield "dictionary", subject, subject.coder, max_norm
    if flags.controls:
        for name, coder in controls(subject, k, flags.seed).items():
            yield name, subject, coder, max_norm
    if step0 is not None:
        yield "step0", step0, step0.coder, max_norm_of(None, step0)


def count(subject: Subject, coder: Normalised, halves: tuple, max_norm: float) -> list[tuple[np.ndarray, int]]:
    """(firings of each feature, places that count) on each half."""
    data = subject.data
    return [count_firings(data.lm, coder, data.site, data.evaluation, half, max_norm=max_norm) for half in halves]


def measure(
    flags: Flags, name: str, subject: Subject, coder: Normalised, max_norm: float, counts: list | None
) -> tuple[dict, dict]:
    """(means with standard errors, and what they are of; columns of each feature's figures).

    Raises:
        TooFew: fewer than two features fire often enough.
    """
    halves, data = split_rows(subject.numbers), subject.data
    counts = counts or count(subject, coder, halves, max_norm)
    often = np.flatnonzero(np.minimum(counts[0][0], counts[1][0]) >= flags.min_firings)
    if len(often) < 2:
        raise TooFew(
            f"{len(often)} features of the {name} fire {flags.min_firings} times in each half of "
            f"{sum(n for _, n in counts):,} tokens: give more --eval-tokens or fewer --min-firings"
        )
    sample = np.sort(np.random.default_rng(flags.seed).permutation(often)[: flags.sample])
    print(
        f"{name}: {len(sample)} of {len(often)} features that fire often enough, of {coder.dictionary.n_features}",
        flush=True,
    )
    vocab = data.lm.config.vocab_size
    tables = [
        read_tables(data.lm, coder, data.site, data.evaluation, half, sample, vocab, max_norm=max_norm)
        for half in halves
    ]
    strings = data.tokenizer.token_strings(range(vocab))
    rows = each_feature(flags, tables, strings)
    figures = {key: mean_and_error(values) for key, values in rows.items() if values.dtype.kind == "f"}
    about = {
        "features": coder.dictionary.n_features,
        "firing_often": len(often),
        "sample": len(sample),
        "entropy_of_text": base_entropy(tables[0].merge(tables[1]).here),
        "density": float(rows["fired"].mean() / sum(n for _, n in counts)),
    }
    basis = np.full(len(sample), name, dtype=object)
    return {**about, "figures": figures}, {"basis": basis, "feature": sample, **rows}


def each_feature(flags: Flags, tables: list, strings: list[str]) -> dict[str, np.ndarray]:
    """Every figure of every feature of the sample."""
    whole, n = tables[0].merge(tables[1]), len(tables[0].fired)
    rules = find_rules(*tables, strings, flags.by)
    token, before = entropies_of_draws(whole.firings, n, flags.draws, flags.seed)
    rows = {
        "fired": whole.fired,
        "commonest_token": commonest_shares(whole.firings, n, flags.levels),
        "token_entropy": token,
        "before_entropy": before,
        "token_entropy_all": entropies(whole.here, n),
        "before_entropy_all": entropies(whole.before, n),
    }
    scored = {"rule": rules.scores} | {kind.replace(" ", "_"): rules.found[kind].scores for kind in KINDS}
    for kind, scores in scored.items():
        for name in ("precision", "recall", "f1", "correlation"):
            values = getattr(scores, name)
            # A rule that never holds on the second half tells nothing there.
            rows[f"{kind}_{name}"] = np.where(np.isnan(values), 0.0, values)
    rows["rule"] = np.array([rules.words(i, strings) for i in range(n)], dtype=object)
    return rows


def mean_and_error(values: np.ndarray) -> dict:
    """Mean over features and its standard error."""
    return {"mean": finite(values.mean()), "error": finite(values.std(ddof=1) / np.sqrt(len(values)))}


def write(flags: Flags, subject: Subject, step0: Subject | None, final: dict, columns: list[dict]) -> None:
    """The run folder: config.json, metrics.json, features.csv."""
    resolved = {"dictionary": subject.coder.dictionary.kind, **subject.data.identity()}
    if step0 is not None:
        resolved["step0"] = {"dictionary": step0.coder.dictionary.kind, **step0.data.identity()}
    run_folder.begin(flags, resolved, also=(TABLE,))
    run_folder.write_json(flags.out / "metrics.json", final)
    write_csv(flags.out / TABLE, {key: np.concatenate([rows[key] for rows in columns]) for key in columns[0]})


def print_table(flags: Flags, subject: Subject, final: dict) -> None:
    """Each figure's mean and standard error, a column for each basis."""
    measured = final["bases"]
    print(
        f"\n{final['tokens']:,} tokens at {subject.data.site}; rules found by {flags.by} on one half, scored on the "
        f"other; controls keep {final['k_of_controls']} coefficients of each token"
    )
    print(f"{'mean (standard error)':>36} " + " ".join(f"{name:>16}" for name in measured))
    for key, words in SHOWN.items():
        cells = [f"{m['figures'][key]['mean']:.3f} ({m['figures'][key]['error']:.3f})" for m in measured.values()]
        print(f"{words:>36} " + " ".join(f"{cell:>16}" for cell in cells))
    for key in ("sample", "firing_often"):
        print(f"{key.replace('_', ' '):>36} " + " ".join(f"{m[key]:>16,}" for m in measured.values()))
    print(f"{'density of the sample':>36} " + " ".join(f"{m['density']:>16.4f}" for m in measured.values()))
