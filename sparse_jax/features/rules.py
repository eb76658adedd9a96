r"""Simple rules in place of a judge: the best rule for a feature, found on one half of a text and scored on the other.

A rule holds at a place, or does not. Three kinds, each for the token at the place and for the token before it:

    token       it is a certain token
    regex       how it is written matches one of `PATTERNS` (a capital, a digit, "-ing", ...)

The best rule of a kind is the one whose 0/1 indicator has the largest Pearson correlation with the feature's
activation (or the largest F1) on the half it is found on. How well rules so simple tell a feature is no measure of
meaning by itself: neurons, PCA, random directions and features of a random model beside it say what is above chance.
Source: Bills et al. 2023 and Cunningham et al. 2023 score explanations by correlation; here the explanation is a rule.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sparse_jax.features.target_scores import Scores, scores_of
from sparse_jax.features.token_table import Tables, TokenTable

By = Literal["correlation", "f1"]

# Name -> what is searched for in a token as it is written. Words begin with a space in byte-level vocabularies.
PATTERNS = {
    "begins with a space": r"^ ",
    "no space before it": r"^[^\s]",
    "begins with a capital": r"^ ?[A-Z]",
    "all capitals": r"^ ?[A-Z]{2,}$",
    "lower case": r"^ ?[a-z]+$",
    "one letter": r"^ ?[A-Za-z]$",
    "digits": r"(?<!\\x)(?<!\\x[0-9a-f])\d",  # not those that spell a byte
    "four digits": r"^ ?\d{4}$",
    "newline": r"\n",
    "white space": r"^\s+$",
    "punctuation": r"^ ?[^\w\s]+$",
    "ends a sentence": r"[.!?]",
    "comma, semicolon, colon": r"^ ?[,;:]",
    "quotation mark": r"[\"“”«»]|^ ?['‘’`]+$",
    "bracket": r"[()\[\]{}<>]",
    "dash": r"^ ?[-–—]+$",
    "-ing": r"[a-z]ing$|^ing$",
    "-ed": r"[a-z]ed$|^ed$",
    "-s": r"[a-z]s$|^s$",
    "-ly": r"[a-z]ly$|^ly$",
    "-er": r"[a-z]er$|^er$",
    "-est": r"[a-z]est$|^est$",
    "-ion": r"[a-z]ion$|^ion$",
    "contraction": r"^['’](s|t|re|ve|ll|d|m)$",
    "not ASCII": r"[^\x00-\x7f]|\\x[0-9a-f]{2}",
}

KINDS = ("token", "token before", "regex", "regex before")


class Found(NamedTuple):
    """The best rule of one kind for each feature, `[features]`.

    Attributes:
        rule: a token's id, or a place in PATTERNS; -1 where the feature does not fire on the half.
        fitted: its score on the half that it was found on.
        scores: on the other half.
    """

    rule: Int64[np.ndarray, " features"]
    fitted: Float64[np.ndarray, " features"]
    scores: Scores


class Rules(NamedTuple):
    """Best rules.

    Attributes:
        found: kind (as in KINDS) -> the best rule of that kind.
        best: `[features]` which of KINDS was best on the half that rules were found on.
        scores: of that rule, on the other half.
    """

    found: dict[str, Found]
    best: Int64[np.ndarray, " features"]
    scores: Scores

    @classmethod
    def joined(cls, parts: Sequence["Rules"]) -> "Rules":
        """Rules of several lists of features as those of one."""

        def scores(each: list[Scores]) -> Scores:
            return Scores(*map(np.concatenate, zip(*each)))

        found = {
            kind: Found(
                np.concatenate([part.found[kind].rule for part in parts]),
                np.concatenate([part.found[kind].fitted for part in parts]),
                scores([part.found[kind].scores for part in parts]),
            )
            for kind in parts[0].found
        }
        return cls(found, np.concatenate([part.best for part in parts]), scores([part.scores for part in parts]))

    def words(self, feature: int, strings: list[str]) -> str:
        """The best rule of a feature in words; `strings` is how tokens are written."""
        kind = KINDS[self.best[feature]]
        rule = int(self.found[kind].rule[feature])
        if rule < 0:
            return "no rule"
        what = list(PATTERNS)[rule] if kind.startswith("regex") else _quoted(rule, strings)
        return f"the token before: {what}" if kind.endswith("before") else f"the token: {what}"


def _quoted(token: int, strings: list[str]) -> str:
    return repr(strings[token]) if token < len(strings) else "none, a row begins"


def pattern_table(strings: list[str]) -> Bool[np.ndarray, "vocab patterns"]:
    """Which tokens match which of PATTERNS; `strings` is how each token of the vocabulary is written."""
    compiled = [re.compile(pattern) for pattern in PATTERNS.values()]
    return np.array([[pattern.search(string) is not None for pattern in compiled] for string in strings])


def find_rules(fit: Tables, test: Tables, strings: list[str], by: By = "correlation") -> Rules:
    """The best rules on one half of a text, scored on the other.

    Args:
        fit, test: of the same features, on two texts that share no row.
        strings: how each token of the vocabulary is written.
        by: what makes a rule the best.
    """
    # A row's beginning is no token, and matches nothing.
    patterns = np.concatenate([pattern_table(strings), np.zeros((1, len(PATTERNS)), bool)])
    found = {}
    for kind in KINDS:
        table = "before" if kind.endswith("before") else "here"
        if kind.startswith("token"):
            found[kind] = _best_token(fit, test, table, by)
        else:
            found[kind] = _best_pattern(fit, test, table, patterns, by)
    fitted = np.stack([np.where(np.isnan(f.fitted), -np.inf, f.fitted) for f in found.values()])
    best = np.argmax(fitted, axis=0)
    chosen = [np.stack([getattr(f.scores, name) for f in found.values()]) for name in Scores._fields]
    columns = np.arange(fitted.shape[1])
    return Rules(found, best, Scores(*(figure[best, columns] for figure in chosen)))


def _scores(tables: Tables, features, target, hits, hit_sums) -> Scores:
    of = (values[features] for values in (tables.fired, tables.sums, tables.squares))
    return scores_of(tables.places, target, *of, hits, hit_sums)


def _best_token(fit: Tables, test: Tables, which: str, by: By) -> Found:
    table: TokenTable = getattr(fit, which)
    n, features, tokens = len(fit.fired), table.features, table.tokens
    value = getattr(_scores(fit, features, table.totals[tokens], table.counts, table.sums), by)
    value = np.where(np.isnan(value), -np.inf, value)
    # The last of each feature's entries when sorted by value; of equal ones that of the lower id.
    order = np.lexsort((-tokens, value, features))
    last = np.flatnonzero(np.append(np.diff(features[order]) != 0, True)) if len(order) else order
    rule, fitted = np.full(n, -1, np.int64), np.full(n, np.nan)
    best = order[last]
    rule[features[best]], fitted[features[best]] = tokens[best], value[best]
    other: TokenTable = getattr(test, which)
    hits, sums = other.at(np.arange(n), np.maximum(rule, 0))
    scores = _scores(test, np.arange(n), other.totals[np.maximum(rule, 0)], hits, sums)
    return Found(rule, fitted, _without(scores, rule < 0))


def _best_pattern(fit: Tables, test: Tables, which: str, patterns: np.ndarray, by: By) -> Found:
    n = len(fit.fired)

    def scored(tables: Tables) -> Scores:
        table: TokenTable = getattr(tables, which)
        # One pattern after the other: the table may have millions of entries.
        hits, sums = (
            np.stack([np.bincount(table.features, v * matches[table.tokens], n) for matches in patterns.T], axis=1)
            for v in (table.counts, table.sums)
        )
        return _scores(tables, np.arange(n)[:, None], table.totals @ patterns, hits, sums)

    value = getattr(scored(fit), by)
    value = np.where(np.isnan(value), -np.inf, value)
    silent = fit.fired == 0
    rule = np.where(silent, -1, np.argmax(value, axis=1))
    at = np.arange(n), np.maximum(rule, 0)
    scores = Scores(*(figure[at] for figure in scored(test)))
    return Found(rule, np.where(silent, np.nan, value[at]), _without(scores, silent))


def _without(scores: Scores, silent: np.ndarray) -> Scores:
    """nan where there is no rule."""
    return Scores(*(np.where(silent, np.nan, figure) for figure in scores))
