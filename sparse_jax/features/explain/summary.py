"""Means over features, by basis and by what was scored."""

from collections import Counter
from collections.abc import Sequence

from sparse_jax.features.explain.cases import Case
from sparse_jax.features.explain.scores import mean_and_error

# Of a score these are no figures to be averaged but counts.
COUNTS = ("missing_tokens", "unanswered")


def summarise(cases: Sequence[Case], found: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """Basis -> what was scored -> score -> figure -> mean over features, its standard error, number of features.

    Beside them: `values`, how many simulated fragments had expected values, integers, a mixture or none; how many
    tokens and texts the judge left out.
    """
    bases: dict[str, dict] = {}
    for basis in dict.fromkeys(case.basis for case in cases):
        members = [scored for case, scored in zip(cases, found) if case.basis == basis]
        subjects = dict.fromkeys(name for scored in members for name in scored)
        bases[basis] = {name: _of_subject([scored.get(name, {}) for scored in members]) for name in subjects}
    return bases


def _of_subject(members: Sequence[dict]) -> dict[str, dict]:
    summary = {}
    for score in dict.fromkeys(score for member in members for score in member):
        there = [member[score] for member in members if member.get(score)]
        names = [name for name in (there[0] if there else ()) if name not in (*COUNTS, "values")]
        summary[score] = {name: mean_and_error([each[name] for each in there]) for name in names}
        for count in COUNTS:
            if there and count in there[0]:
                summary[score][count] = sum(each[count] for each in there)
        if there and "values" in there[0]:
            summary[score]["values"] = dict(sum((Counter(each["values"]) for each in there), Counter()))
    return summary
