"""What `experiments.top_tokens` does with its flags, from top to bottom."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import run_folder, sweep
from experiments.data import check_positive
from experiments.reading import Subject, controls, given_of, max_norm_of, open_subject
from experiments.sweep_members import choices
from experiments.top_tokens import Flags
from sparse_jax.dictionaries import L1, Normalised
from sparse_jax.errors import InputError
from sparse_jax.features import Report, Table, write
from sparse_jax.features.collect import Collected, collect
from sparse_jax.features.top_tokens import Row, as_text, commonest_share, table, top_tokens, write_csv
from sparse_jax.lm import check_site, load
from sparse_jax.lm.order import row_indices
from sparse_jax.lm.rows import Rows

# A feature with fewer firings has no share of its commonest token worth averaging.
LEAST_FIRINGS = 10
# Features of each table in the terminal.
PRINTED = 10


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    check(flags)
    run_folder.check_apart(flags.out, *flags.runs)
    run_folder.prepare(flags.out, overwrite=flags.overwrite)
    training = training_flags(flags) if flags.prompts else None
    subjects = None if training else opened(flags, flags.runs)
    run_folder.begin(flags, also=("tables", "training"))
    if training:
        if code := sweep.main(training):
            return code
        subjects = opened(flags, trained_folders(training.out))
    (flags.out / "tables").mkdir()
    layers, tables = [], []
    for label, subject in zip(labels(subjects), subjects):
        figures, made = read(flags, subject, label)
        layers.append(figures)
        tables += made
    write(report(flags, layers, tables), flags.out / "report.html")
    run_folder.write_json(flags.out / "metrics.json", {"tables": layers, "seconds": time.perf_counter() - started})
    print_summary(layers)
    print(f"report: {flags.out / 'report.html'}   tables: {flags.out / 'tables'}")
    return 0


def check(flags: Flags) -> None:
    """Raises InputError for flags that cannot be used, before anything is loaded."""
    check_positive(flags, "target_l0", "expansion", "train_tokens", "context", "read_tokens", "tokens_shown", "least",
                   "rows")  # fmt: skip
    if bool(flags.runs) == bool(flags.prompts):
        raise InputError("give run folders, or --prompts to train on: one of the two")
    if flags.prompts and flags.text is not None:
        raise InputError(f"--text {flags.text} with --prompts: what is trained on the prompts is read on them")
    if flags.runs and flags.layers:
        raise InputError("--layers: a run folder says which layer it is of; with --prompts it says what to train")


def training_flags(flags: Flags) -> sweep.Flags:
    """What `experiments.sweep` is to train: a dictionary a layer, in one pass over the prompts.

    Raises:
        InputError: the model cannot be loaded or lacks a layer; numbers that no training can use.
    """
    model = flags.model or "novel-neox"
    config = load(model, flags.revision).config
    sites = tuple(f"resid_post.{layer}" for layer in flags.layers or range(config.n_layers))
    for site in sites:
        check_site(config, site)
    made = sweep.Flags(
        L1(expansion=flags.expansion),
        model=model,
        revision=flags.revision,
        text=flags.prompts,
        holdout=flags.holdout,
        context=flags.context,
        sites=sites,
        target_l0s=(flags.target_l0,),
        tokens=flags.train_tokens,
        measure_at=(1.0,),
        seeds=(flags.seed,),
        seed=flags.seed,
        out=flags.out / "training",
    )
    choices(made)  # raises for what cannot be
    return made


def trained_folders(out: Path) -> list[Path]:
    """The folders of a sweep's dictionaries, in the order of its sites."""
    return [out / "dictionaries" / name for name in run_folder.read_config(out)["resolved"]["members"]]


def opened(flags: Flags, folders: Sequence[Path]) -> list[Subject]:
    """The dictionaries with their models and texts."""
    given = given_of(flags, "revision", "text") | {"model": None if flags.prompts else flags.model}
    subjects: list[Subject] = []
    for folder in folders:  # dictionaries of one model and text share them
        like = subjects[0] if subjects else None
        subjects.append(open_subject(folder, given, eval_tokens=flags.read_tokens, like=like))
        text_of(flags, subjects[-1])  # raises for what cannot be read
    return subjects


def labels(subjects: Sequence[Subject]) -> list[str]:
    """A name of each for its files: its site, and a number where a site is there twice."""
    sites = [str(subject.data.site) for subject in subjects]
    return [site if sites.count(site) == 1 else f"{site}-{sites[:i].count(site) + 1}" for i, site in enumerate(sites)]


def text_of(flags: Flags, subject: Subject) -> tuple[Rows, np.ndarray]:
    """(rows of text, which of them are read).

    Raises:
        InputError: the training text is no text that can be read from any place.
    """
    side = flags.side or ("training" if flags.prompts else "held-out")
    if side == "held-out":
        return subject.data.evaluation, subject.numbers
    rows = subject.data.train
    if not isinstance(rows, Rows):
        raise InputError("--side training: the training text is read as it goes; give --side held-out")
    count = min(len(rows), max(1, flags.read_tokens // rows.context))
    return rows, row_indices(len(rows), 0, 0, count)


def read(flags: Flags, subject: Subject, label: str) -> tuple[dict, list[Table]]:
    """(figures, tables for the report) of a dictionary and of the neurons beside it; CSV files are written."""
    found = collected(flags, subject, subject.coder)
    l0 = float(found.fired.sum()) / found.tokens
    k = max(1, round(l0))
    neurons = collected(flags, subject, controls(subject, k, flags.seed)["neurons"])
    made = []
    for name, each, title in (
        (label, found, f"{label}, dictionary"),
        (f"{label}-neurons", neurons, f"{label}, neurons, the {k} largest of each token"),
    ):
        rows = top_tokens(each, subject.data.tokenizer.token_strings, count=flags.tokens_shown, over=flags.over,
                          least=flags.least, order=flags.order)  # fmt: skip
        write_csv(rows, flags.out / "tables" / f"{name}.csv")
        print(f"\n{title}\n{as_text(rows[:PRINTED])}")
        made.append(table(rows[: flags.rows], title, note_of(flags, rows)))
    identity = {"label": label, "run": str(subject.path), "site": str(subject.data.site), "tokens": found.tokens}
    return identity | figures(found) | {"neurons": {"k": k} | figures(neurons)}, made


def collected(flags: Flags, subject: Subject, coder: Normalised) -> Collected:
    """What the tables are made of; places are not needed."""
    from tqdm import tqdm

    text, numbers = text_of(flags, subject)
    data = subject.data
    name = f"{coder.dictionary.kind} at {data.site}"
    with tqdm(total=numbers.size * text.context, desc=name, unit="token", unit_scale=True, mininterval=0.5) as bar:
        return collect(data.lm, data.site, text, numbers, coder, top=1, sample=1, coactive_tokens=1,
                       max_norm=max_norm_of(None, subject), progress=bar.update)  # fmt: skip


def figures(found: Collected) -> dict:
    """Figures of one table."""
    often = found.fired >= LEAST_FIRINGS
    share = commonest_share(found.token_counts)[often]
    return {
        "n_features": found.n_features,
        "alive": int((found.fired > 0).sum()),
        "l0": float(found.fired.sum()) / found.tokens,
        "commonest_token_share": float(share.mean()) if len(share) else None,
        "features_of_one_token": float((share > 0.5).mean()) if len(share) else None,
    }


def note_of(flags: Flags, rows: Sequence[Row]) -> str:
    """What stands below a table."""
    over = "all its occurrences" if flags.over == "occurrences" else "the occurrences on which the feature fires"
    return (
        f"Mean activation of a token over {over}; tokens that occur less than {flags.least} times are left out. "
        f"{min(flags.rows, len(rows))} of {len(rows)} features that fire."
    )


def report(flags: Flags, layers: list[dict], tables: list[Table]) -> Report:
    """The page."""
    rows = []
    for layer in layers:
        for name, each in (("dictionary", layer), ("neurons", layer["neurons"])):
            rows.append(
                (f"{layer['label']}, {name}", each["n_features"], each["alive"], each["l0"],
                 each["commonest_token_share"], each["features_of_one_token"])
            )  # fmt: skip
    summary = Table(
        "How far features are about single tokens",
        ("", "features", "that fire", "L0", "share of the commonest token", "with more than half on one token"),
        tuple(rows),
        f"Shares are means over features that fire at least {LEAST_FIRINGS} times; a feature fires where its code is "
        "above 0.",
    )
    where = flags.prompts or ", ".join(str(path) for path in flags.runs)
    return Report(
        title="Top tokens",
        subtitle=where,
        facts=(("tokens read", f"{layers[0]['tokens']:,}"), ("mean over", flags.over)),
        tables=(summary, *tables),
        details=(flags.out / "config.json").read_text(encoding="utf8"),
    )


def print_summary(layers: list[dict]) -> None:
    """A line for each table."""
    print(f"\n{'':>28} {'fire':>12} {'L0':>8} {'commonest token':>16} {'of one token':>13}")
    for layer in layers:
        for name, each in ((layer["label"], layer), (f"{layer['label']}, neurons", layer["neurons"])):
            share, single = (
                "–" if each[key] is None else f"{each[key]:.3f}"
                for key in ("commonest_token_share", "features_of_one_token")
            )
            print(f"{name:>28} {each['alive']:>5} /{each['n_features']:>5} {each['l0']:8.2f} {share:>16} {single:>13}")
