"""The page of `experiments.explain`: means by basis, explanations with their scores, texts they were made from."""

import json

from experiments import run_folder
from experiments.explain import Flags
from experiments.reading import Subject
from sparse_jax.features import Context, FeatureCard, Report, Table, write
from sparse_jax.features.explain import Case
from sparse_jax.features.explain.study import EXPLAINED, TOKEN_MEANS

# Features of the first basis whose texts are shown.
CARDS = 50
# Heading of a column -> score, figure.
SIMULATION = {name: ("simulation", name) for name in ("top", "random", "both")}
JUDGED = SIMULATION | {"detection": ("detection", "accuracy"), "fuzzing": ("fuzzing", "accuracy")}
BY_RULE = {"rule: correlation": ("other half", "correlation"), "rule: F1": ("other half", "f1")} | SIMULATION
NOTES = {
    True: "top, random, both: correlation of simulated with real activations over all tokens of the scored fragments. "
    "detection, fuzzing: balanced accuracy, 0.5 is chance. token-means and constant ask no language model.",
    False: "rule: on the half of the rows that it was not found on. top, random, both: correlation of the mean "
    "activation of each token with the real activations, over all tokens of the scored fragments. No judge was asked.",
}


def write_report(
    flags: Flags, subject: Subject, cases: list[Case], explanations: list[str], found: list[dict], final: dict
) -> None:
    """Write report.html into the run folder."""
    first = flags.basis[0]
    report = Report(
        title=f"Explanations of features at {subject.data.site}",
        subtitle=f"{subject.coder.dictionary.kind} dictionary of {subject.data.flags.model}; {final['explained_by']}",
        facts=facts(final),
        tables=(means_table(final), *(features_table(b, cases, explanations, found) for b in final["features"])),
        cards=tuple(card(case) for case in cases if case.basis == first)[:CARDS],
        cards_note=f"Features of the first basis ({first}), and the texts they were explained from and scored on.",
        details=json.dumps(run_folder.jsonable(flags), indent=1),
    )
    write(report, flags.out / "report.html")


def facts(final: dict) -> tuple[tuple[str, str], ...]:
    """What was asked, and of what."""
    rows = [("fragments", f"{final['fragments']:,} of {final['fragment_tokens']} tokens")]
    for basis, count in final["features"].items():
        skipped = sum(final["skipped"][basis].values())
        there = final["active_enough"][basis]
        rows.append((basis, f"{count} features, {skipped} skipped; {there['enough']:,} of {there['of']:,} fire enough"))
    if "paid" in final:
        rows.append(("calls paid in this run", f"{final['paid']['calls']:,}"))
    return tuple(rows)


def shown(figure: dict | None) -> str | None:
    """A mean with its standard error."""
    if not figure or figure["mean"] is None:
        return None
    error = "" if figure["error"] is None else f" ± {figure['error']:.3f}"
    return f"{figure['mean']:.3f}{error}".replace("-", "−")


def means_table(final: dict) -> Table:
    """Means over features."""
    judged, rows = final["judge"] is not None, []
    columns = JUDGED if judged else BY_RULE
    for basis, of_basis in final["bases"].items():
        for subject, scores in of_basis.items():
            cells = (shown(scores.get(score, {}).get(name)) for score, name in columns.values())
            rows.append((f"{basis}, {subject}", *cells))
    return Table(
        "Scores, means over features",
        ("basis, what is scored", *columns),
        tuple(rows),
        note=f"{NOTES[judged]} ± is the standard error of the mean. {simulated_by(final)}".strip(),
    )


def simulated_by(final: dict) -> str:
    """How simulated activations were read from replies, in words."""
    values: dict[str, int] = {}
    for of_basis in final["bases"].values():
        for scores in of_basis.values():
            for kind, count in scores.get("simulation", {}).get("values", {}).items():
                values[kind] = values.get(kind, 0) + count
    names = {
        "expected": "expected values over log-probabilities",
        "integer": "the integers that were written",
        "mixed": "some of both",
        "none": "no estimate in the reply",
    }
    if not values:
        return ""
    return f"Simulated fragments: {'; '.join(f'{count:,} with {names[kind]}' for kind, count in values.items())}."


def features_table(basis: str, cases: list[Case], explanations: list[str], found: list[dict]) -> Table:
    """Every feature of a basis with its explanation and scores; without a judge those of rule and token means."""
    rows, columns = [], JUDGED if any(EXPLAINED in scores for scores in found) else BY_RULE
    for case, explanation, scores in zip(cases, explanations, found):
        if case.basis == basis:
            own = scores[EXPLAINED] if EXPLAINED in scores else scores[TOKEN_MEANS] | scores["rule"]
            cells = ((own.get(score) or {}).get(name) for score, name in columns.values())
            rows.append((str(case.feature), explanation or "(none)", *cells))
    return Table(f"Explanations: {basis}", ("feature", "explanation", *columns), tuple(rows))


def card(case: Case) -> FeatureCard:
    """A feature's texts."""
    contexts = []
    for label, part in (("explained", case.explaining), ("top", case.top), ("random", case.random)):
        for example in part:
            activations = tuple(float(v) for v in example.activations)
            peak = int(example.activations.argmax())
            window = slice(max(0, peak - 20), peak + 9)
            contexts.append(
                Context(example.tokens[window], activations[window], peak - window.start, label, example.document)
            )
    return FeatureCard(case.feature, case.density, case.maximum, case.mean, tuple(contexts))
