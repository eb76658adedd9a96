"""Which features `experiments.explain` explains, of the dictionary and of what it is read beside."""

from typing import NamedTuple

from experiments.explain import Flags
from experiments.reading import Subject, controls, max_norm_of
from sparse_jax.features.explain import Case, Fragments, Protocol, Reading, activity, draw_features, make_cases


class Chosen(NamedTuple):
    """What is explained.

    cases: of all bases.
    skipped: basis -> feature -> why it is skipped.
    enough: basis -> {"of": its features, "enough": how many are active in enough fragments}.
    readings: basis -> what its codes are made of.
    """

    cases: list[Case]
    skipped: dict[str, dict[int, str]]
    enough: dict[str, dict[str, int]]
    readings: dict[str, Reading]


def choose(flags: Flags, subject: Subject, fragments: Fragments) -> Chosen:
    """The features that were asked for, and as many of the other bases."""
    data, protocol, chosen = subject.data, Protocol(), Chosen([], {}, {}, {})
    reading = Reading(data.lm, data.site, data.evaluation, subject.coder, max_norm_of(None, subject))
    active, coders = activity(reading, fragments), {"dictionary": subject.coder}
    if set(flags.basis) - {"dictionary"}:
        coders |= controls(subject, max(1, round(active.l0)), flags.seed)
    for number, basis in enumerate(("dictionary", "neurons", "random")):
        if basis not in flags.basis:
            continue
        seed = (flags.seed, number)
        if basis != "dictionary":
            reading = reading._replace(coder=coders[basis])
            active = activity(reading, fragments)
        features, passed_over = list(flags.features), []
        if basis != "dictionary" or not flags.features:
            count = len(flags.features) or flags.count
            features, passed_over = draw_features(active.fragments, count, protocol.needed, seed)
        strings = data.tokenizer.token_strings
        made, left_out = make_cases(reading, fragments, active, basis, features, protocol, strings, seed)
        chosen.cases.extend(made)
        chosen.skipped[basis] = dict.fromkeys(passed_over, f"fewer than {protocol.needed} active fragments") | left_out
        enough = int((active.fragments >= protocol.needed).sum())
        chosen.enough[basis] = {"of": len(active.fragments), "enough": enough}
        chosen.readings[basis] = reading
    return chosen


def reasons(skipped: dict[int, str]) -> dict[str, int]:
    """Reason -> how many features."""
    return {reason: sum(each == reason for each in skipped.values()) for reason in dict.fromkeys(skipped.values())}


def words(subject: Subject, fragments: Fragments, chosen: Chosen) -> str:
    """What will be explained, in a few lines."""
    lines = [f"{len(fragments):,} fragments of {fragments.length} tokens of held-out text at {subject.data.site}"]
    for basis, left_out in chosen.skipped.items():
        count = sum(case.basis == basis for case in chosen.cases)
        also = "".join(f"; {n} skipped, {reason}" for reason, n in reasons(left_out).items())
        lines.append(f"{basis}: {count} features{also}")
    by_row = sum(case.disjoint_by == "row" for case in chosen.cases)
    if by_row:
        lines.append(f"{by_row} features have too few documents: explained and scored on other rows of the same ones")
    return "\n".join(lines)
