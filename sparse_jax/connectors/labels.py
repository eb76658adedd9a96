"""A label of how a target depends on its inputs, from which of them are on where it fires: OR, AND, AND-NOT, or else.

    labels = label_targets(held_out.inputs, held_out.targets, W)
    labels.label[30], labels.note(30)           "AND", ""            "weighted sum", "too few tokens for AND"
    labels.evidence(30)                         (Test("exactly +0", ...), ...) with their counts

On means a code above 0. Of each target's inputs with a weight that is not zero these are looked at: the `POSITIVE` = 6
strongest with a positive weight and the `NEGATIVE` = 4 strongest with a negative one, by |weight| x mean code where the
input is on. All others are ignored: they may do what they like. With `P` over the tokens of the pair:

    none          no positive input is on
    exactly i     positive input i is on and no other positive input is
    together S    all of S, two or three positive inputs, are on and no other positive input is
    A and B,      positive input A is on, and negative input B is (is not); the others as they like
    A, not B

    OR            P(fires | exactly i) >= 0.8 for two inputs or more, and P(fires | none) <= 0.05
    AND           for some S: P(fires | exactly i) <= 0.2 for every i of S, and P(fires | together S) >= 0.8
    AND-NOT       for some A, B: P(fires | A, not B) >= 0.8 and P(fires | A and B) <= 0.2
    weighted sum  none of them (where there are inputs at all: else "no inputs")

The first that holds is the label; `status` says of each rule whether it holds. A condition that fewer than 50 tokens
meet has no P: what depends on it is neither true nor false. A rule FAILS when it would fail whatever those P were, and
is UNTESTED when it hangs on them: a "weighted sum" with an untested rule is one for want of tokens.

In OR and AND negative inputs do as they like. Others that are positive are off: else an input that comes with the one
that matters would seem to matter. In AND-NOT it may: `evidence` gives P(fires | exactly A) beside it, and of several
pairs that hold one whose A suffices alone is taken.

A linear sum of positive inputs without a threshold fires where any of them does: it is an OR by this rule.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import sparse

from sparse_jax.connectors.code_columns import code_columns
from sparse_jax.connectors.paired_codes import SiteCodes
from sparse_jax.errors import InputError

OR, AND, AND_NOT, WEIGHTED_SUM, NO_INPUTS = "OR", "AND", "AND-NOT", "weighted sum", "no inputs"
RULES = (OR, AND, AND_NOT)
HOLDS, FAILS, UNTESTED = 1, 0, -1
POSITIVE, NEGATIVE = 6, 4
MIN_TOKENS = 50
HIGH, LOW, NONE = 0.8, 0.2, 0.05

_SETS = tuple(s for size in (2, 3) for s in combinations(range(POSITIVE), size))
_PAIRS = tuple((a, b) for a in range(POSITIVE) for b in range(NEGATIVE))
_N_PATTERNS = 1 << (POSITIVE + NEGATIVE)


class Test(NamedTuple):
    """One condition on the inputs and what the target does where it is met.

    Attributes:
        condition: "none", "exactly", "together", "and", "not", or "input": B is on, whatever the others do.
        positive, negative: rows of W that it is about.
        tokens: that meet it.
        fired: of those, where the target fires.
        enough: whether they are enough to give P(fires | condition).
    """

    condition: str
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    tokens: int
    fired: int
    enough: bool

    @property
    def share(self) -> float | None:
        """Share of those tokens on which the target fires; None of none."""
        return self.fired / self.tokens if self.tokens else None


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of targets and the counts behind them; `n` targets. Numpy, host.

    Attributes:
        label: `[n]` str.
        status: `[n, 3]` int8, of OR, AND, AND-NOT: HOLDS, FAILS or UNTESTED.
        positive: `[n, POSITIVE]` int32, rows of W of the positive inputs looked at, the strongest first; -1: none.
        negative: `[n, NEGATIVE]` the same of the negative ones.
        tokens, fired: `[n, conditions]` int64, tokens that meet each condition, and those where the target fires.
        best: `[n, 3]` int16, which case made a rule hold: of AND a set, of AND-NOT a pair; -1: it does not hold.
        min_tokens: fewer give no P.
        n_tokens: tokens of the pair.
    """

    label: np.ndarray
    status: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    tokens: np.ndarray
    fired: np.ndarray
    best: np.ndarray
    min_tokens: int
    n_tokens: int

    def note(self, target: int) -> str:
        """Which rules could not be tested, where that decides; "" where the label does not hang on it."""
        before = RULES.index(self.label[target]) if self.label[target] in RULES else len(RULES)
        untested = [rule for i, rule in enumerate(RULES[:before]) if self.status[target, i] == UNTESTED]
        return f"too few tokens for {', '.join(untested)}" if untested else ""

    def test(self, target: int, condition: int) -> Test:
        """One condition of `CONDITIONS` with its counts."""
        kind, positive, negative = CONDITIONS[condition]
        return Test(
            kind,
            tuple(int(self.positive[target, i]) for i in positive),
            tuple(int(self.negative[target, i]) for i in negative),
            int(self.tokens[target, condition]),
            int(self.fired[target, condition]),
            bool(self.tokens[target, condition] >= self.min_tokens),
        )

    def overlap(self, target: int) -> float | None:
        """P(A | B) of the pair that makes a target an AND-NOT: how often the one that stops it comes with the other."""
        if (pair := self.best[target, 2]) < 0:
            return None
        both, stopper = (self.tokens[target, _NUMBER[each]] for each in _pair_tests(*_PAIRS[pair])[1:])
        return float(both / stopper)

    def evidence(self, target: int) -> tuple[Test, ...]:
        """The conditions that the label rests on; of a weighted sum those of each input, and the strongest pairs.

        Always: none, and exactly each positive input. Of an AND together its set, of an AND-NOT its A and B; of others
        the two strongest positive inputs together, and the strongest positive with each negative one.
        """
        n_positive = int((self.positive[target] >= 0).sum())
        n_negative = int((self.negative[target] >= 0).sum())
        chosen = [("none", (), ())] + [("exactly", (i,), ()) for i in range(n_positive)]
        of_and, of_not = self.best[target, 1], self.best[target, 2]
        if of_and >= 0:
            chosen.append(("together", _SETS[of_and], ()))
        elif n_positive > 1:
            chosen.append(("together", (0, 1), ()))
        pairs = [_PAIRS[of_not]] if of_not >= 0 else [(0, b) for b in range(n_negative if n_positive else 0)]
        for a, b in pairs:
            chosen += _pair_tests(a, b)
        return tuple(self.test(target, _NUMBER[each]) for each in chosen)


def _pair_tests(a: int, b: int) -> list[tuple]:
    return [("not", (a,), (b,)), ("and", (a,), (b,)), ("input", (), (b,))]


def _conditions() -> tuple[list, np.ndarray]:
    """Conditions on places of a pattern, and `[conditions, patterns]` whether each pattern meets them."""
    pattern = np.arange(_N_PATTERNS)
    on = [(pattern >> bit & 1).astype(bool) for bit in range(POSITIVE + NEGATIVE)]
    positive = pattern & ((1 << POSITIVE) - 1)
    made = [("none", (), (), positive == 0)]
    made += [("exactly", (i,), (), positive == 1 << i) for i in range(POSITIVE)]
    made += [("together", s, (), positive == sum(1 << i for i in s)) for s in _SETS]
    made += [("not", (a,), (b,), on[a] & ~on[POSITIVE + b]) for a, b in _PAIRS]
    made += [("and", (a,), (b,), on[a] & on[POSITIVE + b]) for a, b in _PAIRS]
    made += [("input", (), (b,), on[POSITIVE + b]) for b in range(NEGATIVE)]
    return [each[:3] for each in made], np.stack([each[3] for each in made])


CONDITIONS, _MEETS = _conditions()
_NUMBER = {condition: i for i, condition in enumerate(CONDITIONS)}
_EXACTLY = np.array([_NUMBER["exactly", (i,), ()] for i in range(POSITIVE)])
_TOGETHER = np.array([_NUMBER["together", s, ()] for s in _SETS])
_NOT = np.array([_NUMBER["not", (a,), (b,)] for a, b in _PAIRS])
_AND = np.array([_NUMBER["and", (a,), (b,)] for a, b in _PAIRS])


def label_targets(
    inputs: SiteCodes | sparse.csc_array,
    targets: SiteCodes | sparse.csc_array,
    W,
    *,
    strengths: np.ndarray | None = None,
    min_tokens: int = MIN_TOKENS,
) -> Labels:
    """Label every target.

    Some 100 conditions are counted of each target from the tokens where its inputs or it are on: about a millisecond
    for 200,000 tokens of which 1 to 2 % have each input on. Memory: the codes by feature (8 bytes an active one), and
    1.5 kB of counts a target.

    Args:
        inputs, targets: held-out codes of the same tokens, or codes by feature, as `code_columns` and `hidden_columns`
            give them (hidden units are targets too).
        W: `[n_in, n_out]` weights, dense or scipy sparse; exactly 0 is no input.
        strengths: `[n_in]` what |weight| is multiplied with to choose inputs; None: each input's mean code where on.
        min_tokens: fewer make no P.

    Raises:
        InputError: shapes that do not fit, `min_tokens` below 1.
    """
    inputs, targets = (code_columns(each) if isinstance(each, SiteCodes) else each for each in (inputs, targets))
    W = sparse.csc_array(W)
    _check(inputs, targets, W, strengths, min_tokens)
    if strengths is None:
        strengths = inputs.sum(axis=0) / np.maximum(np.diff(inputs.indptr), 1)
    positive, negative = _chosen(W, np.asarray(strengths, np.float64))
    n = targets.shape[1]
    tokens, fired = (np.zeros((n, len(CONDITIONS)), np.int64) for _ in range(2))
    meets = _MEETS.T.astype(np.float64)  # counts below 2^53 are exact, and products of floats are fast
    pattern = np.zeros(inputs.shape[0], np.uint16)
    for begin in range(0, n, 512):
        block = range(begin, min(begin + 512, n))
        counted = [_counts(inputs, targets, j, (*positive[j], *negative[j]), pattern) for j in block]
        for out, counts in zip((tokens, fired), zip(*counted)):
            out[begin : begin + len(block)] = np.stack(counts) @ meets
    status, best = _decide(tokens, fired, positive >= 0, negative >= 0, min_tokens)
    label = np.full(n, WEIGHTED_SUM, object)
    for i in reversed(range(len(RULES))):
        label[status[:, i] == HOLDS] = RULES[i]
    label[(positive[:, 0] < 0) & (negative[:, 0] < 0)] = NO_INPUTS
    return Labels(label, status, positive, negative, tokens, fired, best, min_tokens, inputs.shape[0])


def _check(inputs, targets, W, strengths, min_tokens) -> None:
    if inputs.shape[0] != targets.shape[0]:
        raise InputError(f"{inputs.shape[0]} tokens of inputs and {targets.shape[0]} of targets: give the same tokens")
    if W.shape != (inputs.shape[1], targets.shape[1]):
        raise InputError(f"W {W.shape} of {inputs.shape[1]} inputs and {targets.shape[1]} targets: give [n_in, n_out]")
    if strengths is not None and np.shape(strengths) != (inputs.shape[1],):
        raise InputError(f"strengths {np.shape(strengths)} of {inputs.shape[1]} inputs: give one each")
    if min_tokens < 1:
        raise InputError(f"min_tokens {min_tokens}: give 1 or more")


def _chosen(W: sparse.csc_array, strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[n, POSITIVE]` and `[n, NEGATIVE]` rows of W, the strongest first, -1 where there are no more."""
    made = tuple(np.full((W.shape[1], count), -1, np.int32) for count in (POSITIVE, NEGATIVE))
    for j in range(W.shape[1]):
        part = slice(W.indptr[j], W.indptr[j + 1])
        rows, weights = W.indices[part], W.data[part]
        by_strength = np.argsort(-np.abs(weights) * strengths[rows], kind="stable")
        for out, sign in zip(made, (1, -1)):
            best = rows[by_strength][sign * weights[by_strength] > 0][: out.shape[1]]
            out[j, : len(best)] = best
    return made


def _counts(inputs, targets, j, chosen, pattern) -> tuple[np.ndarray, np.ndarray]:
    """`[patterns]` tokens, and those where target j fires. `pattern` is all 0, and is left so."""
    where = [inputs.indices[inputs.indptr[row] : inputs.indptr[row + 1]] if row >= 0 else () for row in chosen]
    where = [(np.uint16(1 << bit), rows) for bit, rows in enumerate(where) if len(rows)]
    for bit, rows in where:
        pattern[rows] |= bit
    counts = np.zeros(_N_PATTERNS, np.int64)
    for bit, rows in where:
        found = pattern[rows]
        # A token counts once: with the lowest of its bits.
        counts += np.bincount(found[found & (bit - 1) == 0], minlength=_N_PATTERNS)
    counts[0] = len(pattern) - counts.sum()
    firing = targets.indices[targets.indptr[j] : targets.indptr[j + 1]]
    fired = np.bincount(pattern[firing], minlength=_N_PATTERNS)
    for _, rows in where:
        pattern[rows] = 0
    return counts, fired


def _decide(tokens, fired, positive, negative, min_tokens) -> tuple[np.ndarray, np.ndarray]:
    """`status` and `best` of `Labels`. `positive`, `negative`: `[n, ...]` bool, which inputs there are."""
    share, enough = fired / np.maximum(tokens, 1), tokens >= min_tokens
    surely = _cases((share >= HIGH) & enough, (share <= LOW) & enough, (share <= NONE) & enough, positive, negative)
    # What has no P might pass any test.
    few = ~enough
    possibly = _cases((share >= HIGH) | few, (share <= LOW) | few, (share <= NONE) | few, positive, negative)
    # Of the cases that hold, the smaller set, the pair whose A suffices alone, then what stands furthest from failing.
    # Of OR there is one case.
    small = np.array([len(s) == 2 for s in _SETS])
    suffices = ((share >= HIGH) & enough)[:, _EXACTLY][:, [a for a, _ in _PAIRS]]
    margins = np.zeros((len(tokens), 1)), share[:, _TOGETHER] + small, share[:, _NOT] - share[:, _AND] + suffices
    status, best = [], []
    for sure, possible, margin in zip(surely, possibly, margins):
        holds = sure.any(axis=1)
        status.append(np.where(holds, HOLDS, np.where(possible.any(axis=1), UNTESTED, FAILS)))
        best.append(np.where(holds, np.where(sure, margin, -1).argmax(axis=1), -1))
    return np.stack(status, axis=1).astype(np.int8), np.stack(best, axis=1).astype(np.int16)


def _cases(high, low, none, positive, negative) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[n, cases]` whether each case of OR (one), AND (sets) and AND-NOT (pairs) holds.

    `high`, `low`, `none`: `[n, conditions]` bool, whether P passes each of the three limits.
    """
    a, b = np.array(_PAIRS).T
    several = (high[:, _EXACTLY] & positive).sum(axis=1) >= 2
    quiet = low[:, _EXACTLY] & positive
    sets = np.stack([quiet[:, s].all(axis=1) for s in map(list, _SETS)], axis=1)
    pairs = positive[:, a] & negative[:, b]
    return (none[:, 0] & several)[:, None], sets & high[:, _TOGETHER], pairs & high[:, _NOT] & low[:, _AND]
