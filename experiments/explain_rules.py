"""Explanations that no language model writes: the best simple rule for each feature, found on half of the rows.

The rule says "it is this token", "that token stands before it", or how either is written (see `features.rules`), and is
scored on the other half of the rows, over all of its tokens: not on the fragments that judges see, so its figures stand
apart.
"""

import numpy as np

from sparse_jax.features.explain import Case, Reading
from sparse_jax.features.rules import find_rules
from sparse_jax.features.token_table import read_tables

EXPLAINED_BY = "rule: the best single token or way of writing, here or just before (no language model)"
# The name of what is scored, of its score, and the figures that it has.
RULE, SCORE, FIGURES = "rule", "other half", ("correlation", "f1")


def explain_by_rules(
    readings: dict[str, Reading], numbers: np.ndarray, cases: list[Case], strings: list[str]
) -> list[tuple[str, dict[str, float | None]]]:
    """(the rule in words, its figures on the other half) of each case.

    Args:
        readings: basis -> what its codes are made of.
        numbers: rows of the text.
        cases: features of these bases.
        strings: how each token of the vocabulary is written.
    """
    found: dict[tuple[str, int], tuple[str, dict]] = {}
    for basis, (lm, site, text, coder, max_norm) in readings.items():
        features = [case.feature for case in cases if case.basis == basis]
        if not features:
            continue
        fit, test = (
            read_tables(lm, coder, site, text, half, features, len(strings), max_norm=max_norm)
            for half in (numbers[::2], numbers[1::2])
        )
        rules = find_rules(fit, test, strings)
        for i, feature in enumerate(features):
            figures = {name: float(getattr(rules.scores, name)[i]) for name in FIGURES}
            figures = {name: None if np.isnan(value) else value for name, value in figures.items()}
            found[basis, feature] = rules.words(i, strings), figures
    return [found[case.basis, case.feature] for case in cases]
