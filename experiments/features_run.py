"""What `experiments.features` does with its flags, from top to bottom."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from experiments import run_folder
from experiments.data import check_positive
from experiments.feature_panels import SCORES, Measured, measure, panels
from experiments.feature_texts import open_earlier, with_contexts
from experiments.features import Flags, MeasuringFlags
from experiments.reading import Subject, given_of, max_norm_of, open_subject
from sparse_jax.errors import InputError
from sparse_jax.features.index_page import write_pages
from sparse_jax.features.panels import FeaturePanel
from sparse_jax.training import read_lines

COLLECTED = "collected.npz"
PAGES = "features"
# Features that are printed: those whose ablation raises the cross-entropy most.
PRINTED = 10


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    check(flags)
    check_positive(flags, "top", "per_quantile", "tokens_shown", "causes", "cause_texts")
    if flags.need_texts < 0:
        raise InputError(f"--need-texts {flags.need_texts}: give 0 or more")
    run_folder.check_apart(flags.out, flags.explanations)
    explained = {} if flags.explanations is None else read_explanations(flags.explanations)
    subject = opened(flags)
    earlier = None if flags.earlier is None else open_earlier(flags, subject)
    run_folder.begin(flags, resolved(subject), also=(COLLECTED, PAGES))
    max_norm = max_norm_of(flags.max_norm, subject)
    measured = measure(
        subject, None, max_norm=max_norm, effect_tokens=flags.effect_tokens, rule_tokens=flags.rule_tokens,
        seed=flags.seed, top=max(flags.top, flags.need_texts), memory_gb=flags.memory_gb,
    )  # fmt: skip
    if not len(measured.features):
        raise InputError(f"no feature fires on the {measured.collected.tokens:,} tokens: read more, or another text")
    measured.collected.save(flags.out / COLLECTED)
    plain = panels(subject, measured, tokens=flags.tokens_shown, top=flags.top, per_quantile=flags.per_quantile)
    shown = (
        with_explanation(with_contexts(flags, subject, measured, panel, earlier, flags.need_texts), explained)
        for panel in plain
    )
    rows: list[tuple] = []
    page = write_pages(
        flags.out / PAGES,
        f"{subject.coder.dictionary.kind} dictionary of {subject.data.site}",
        noted(with_bar(shown, len(measured.features)), rows),
        subtitle=f"{subject.data.flags.model}, {subject.coder.dictionary.n_features:,} features",
        facts=facts(flags, subject, measured),
        score_hints=SCORES,
    )
    final = figures(subject, measured) | {"seconds": time.perf_counter() - started}
    run_folder.write_json(flags.out / "metrics.json", final)
    print_table(rows, final)
    print(f"pages: {page}   figures: {flags.out / 'metrics.json'}")
    return 0


def check(flags: MeasuringFlags) -> None:
    """Raises InputError for numbers that cannot be, before anything is loaded."""
    check_positive(flags, "eval_tokens", "memory_gb")
    for name in ("effect_tokens", "rule_tokens", "seed"):
        if getattr(flags, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(flags, name)}: give 0 or more")
    if flags.max_norm is not None and not flags.max_norm > 0:
        raise InputError(f"--max-norm {flags.max_norm}: give a positive number")


def opened(flags: MeasuringFlags) -> Subject:
    """The dictionary with its model and text; the run folder is checked first."""
    run_folder.check_apart(flags.out, flags.dictionary, flags.earlier)
    run_folder.prepare(flags.out, overwrite=flags.overwrite)
    given = given_of(flags, "model", "revision", "site", "text", "eval_text")
    return open_subject(flags.dictionary, given, eval_tokens=flags.eval_tokens)


def resolved(subject: Subject) -> dict:
    """What is read, for config.json."""
    return {"dictionary": subject.coder.dictionary.kind, **subject.data.identity()}


def read_explanations(run: Path) -> dict[int, tuple[str, tuple[tuple[str, float | None], ...]]]:
    """Feature of the dictionary -> (explanation, its scores by name), of a run of `experiments.explain`.

    Raises:
        InputError: there is none.
    """
    path = run / "explanations.jsonl"
    if not path.is_file():
        raise InputError(f"--explanations {run}: no run of experiments.explain is there ({path.name} is missing)")
    found = {}
    for line in read_lines(path):
        if line["basis"] == "dictionary" and "explanation" in line:
            scores = line["scores"].get("explained") or line["scores"].get("rule") or {}
            named = ((score, figures) for score, figures in scores.items())
            shown = tuple((score, figures.get("both", figures.get("accuracy"))) for score, figures in named)
            found[line["feature"]] = line["explanation"], tuple(pair for pair in shown if pair[1] is not None)
    return found


def with_explanation(panel: FeaturePanel, explained: dict) -> FeaturePanel:
    """The panel with its explanation, if there is one, before its rule."""
    if panel.index not in explained:
        return panel
    words, scores = explained[panel.index]
    both = f"{words} · {panel.explanation}" if panel.explanation else words
    return dataclasses.replace(panel, explanation=both, scores=(*scores, *panel.scores))


def with_bar(shown: Iterable[FeaturePanel], total: int) -> Iterable[FeaturePanel]:
    """The same, with a progress bar."""
    from tqdm import tqdm

    return tqdm(shown, total=total, desc="panels", unit="feature", mininterval=0.5)


def noted(shown: Iterable[FeaturePanel], rows: list[tuple]) -> Iterator[FeaturePanel]:
    """The same panels, while what is printed of each is put into `rows`."""
    for panel in shown:
        tokens = [token for token, _ in panel.top_tokens[:4]]
        rows.append((panel.index, panel.density, panel.maximum, panel.effect, panel.outlier, tokens, panel.explanation))
        yield panel


def facts(flags: Flags, subject: Subject, measured: Measured) -> list[tuple[str, str]]:
    """What stands above the table."""
    collected, effects, data = measured.collected, measured.effects, subject.data
    held = data.evaluation.documents
    made = [
        ("model", data.flags.model),
        ("site", f"{data.site} (width {data.width})"),
        ("dictionary", f"{subject.coder.dictionary.kind}, {collected.n_features:,} features"),
        (
            "text",
            f"{data.flags.eval_text or data.flags.text}, held out: {', '.join(held[:2])}{', ...' * (len(held) > 2)}",
        ),
        ("tokens read", f"{collected.tokens:,}"),
        ("fire", f"{len(measured.features):,} features; {collected.n_features - len(measured.features):,} never do"),
        ("outliers", f"{int(collected.outlier.sum()):,} features of first tokens"),
    ]
    if effects is not None:
        made.append(("ablated on", f"{effects.predictions:,} predictions"))
    if measured.rules is not None:
        made.append(("rules", f"found on one half of {flags.rule_tokens:,} tokens at most, scored on the other"))
    return made


def figures(subject: Subject, measured: Measured) -> dict:
    """What stands in metrics.json."""
    collected, effects, rules = measured.collected, measured.effects, measured.rules
    final = {
        "dictionary": subject.coder.dictionary.kind,
        "model": subject.data.flags.model,
        "site": str(subject.data.site),
        "n_features": collected.n_features,
        "tokens": collected.tokens,
        "firing": int((collected.fired > 0).sum()),
        "outliers": int(collected.outlier.sum()),
        "l0": float(collected.fired.sum() / max(1, collected.tokens)),
        "token_pairs_lost": int(collected.token_counts.lost.sum()),
    }
    if effects is not None:
        scored = effects.scored > 0
        final |= {"ablated": int(scored.sum()), "ablation_predictions": effects.predictions}
        final["ce_change"] = {
            "mean": float(effects.ce_change[scored].mean()) if scored.any() else None,
            "largest": float(effects.ce_change.max()),
        }
    if rules is not None:
        named = {"rule_f1": rules.scores.f1, "rule_correlation": rules.scores.correlation}
        final |= {name: float(np.nanmean(values)) for name, values in named.items() if np.isfinite(values).any()}
    return final


def print_table(rows: list[tuple], final: dict) -> None:
    """The features whose ablation costs most, or the strongest where none were ablated."""
    print(f"\n{final['firing']:,} of {final['n_features']:,} features fire on {final['tokens']:,} tokens")
    print(f"{'feature':>8} {'density':>9} {'max':>8} {'CE rise':>9}  top tokens; best simple rule")
    for index, density, maximum, effect, outlier, tokens, words in sorted(
        rows, key=lambda row: (row[3] if row[3] is not None else -1.0, row[2]), reverse=True
    )[:PRINTED]:
        rise = "-" if effect is None else f"{effect:+.5f}"
        told = " ".join(repr(token) for token in tokens) + (f"; {words.removeprefix('rule: ')}" if words else "")
        print(f"{index:>8} {100 * density:>8.3f}% {maximum:>8.2f} {rise:>9}  {told}{' (outlier)' * outlier}")
