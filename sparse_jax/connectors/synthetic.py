"""Pairs of codes whose connections are known: what can be told of a connector is told on these first.

    planted = planted_connections(tokens=60_000, seed=0)
    planted.pair                                    inputs, targets, documents
    planted.kind, planted.support, planted.weights  the truth

Inputs come in groups of four (A, B, C, D) with an event behind each: A, C and D fire only where the event is, each
independently (so any two of a group are correlated, about 0.5), B fires on half of A's tokens and nowhere else, with a
fixed multiple of A's code (a subset pair). How often events are differs from document to document, together for the
groups of a topic: tokens of a document are not independent.

Targets, of inputs a, b (codes) and constants w > 0:

    weighted sum   w a;  w A - v B with A the larger part;  w A + v B          linear, fires wherever A does
    or             w1 a + w2 b (+ w3 c), of groups apart                       linear, fires wherever one does
    and-not        w (A - B / multiple)                                        linear, fires where A does and B does not
    and            (w1 a + w2 b) where both fire                               not linear: neither alone does anything
    product        w a b                                                       not linear
    xor            w (a + b) where exactly one fires                           not linear
    threshold      w (a - its median) where that is positive                   not linear
    weak           w (its median - a) where that is positive and a fires       not linear, not monotonic

The maximum of two inputs is not among them: a linear map explains nine tenths of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.errors import InputError

LINEAR_KINDS = ("weighted sum", "or", "and-not")
NONLINEAR_KINDS = ("and", "product", "xor", "threshold", "weak")
KINDS = LINEAR_KINDS + NONLINEAR_KINDS

_GROUP, _GROUPS_IN_TOPIC, _ROW, _VOCAB = 4, 4, 128, 1000
# How often A and C, D fire where their event is.
_SHARES = (2 / 3, 1 / 2, 1 / 2)


@dataclass(frozen=True, eq=False)
class Planted:
    """Codes with known connections. Numpy, host.

    Attributes:
        pair: inputs, targets (noise added), and where the tokens stand.
        kind: `[targets]` str, one of `KINDS`.
        label: `[targets]` str, what a rule on patterns of firing should say: the kind where that is a matter of
            patterns ("weighted sum", "or", "and", "and-not"), "" elsewhere.
        linear: `[targets]` bool, whether a linear map of the inputs gives the target but for the noise.
        support: `[inputs, targets]` bool, the inputs that the target is a function of.
        weights: `[inputs, targets]` float32 in target units per input unit: all there is to know of a linear target;
            of an "and" the weights where it fires; 0 for the other kinds.
        clean: `[tokens, targets]` float32 targets before the noise.
        subsets: `[pairs, 2]` int: (A, B), B fires only where A does.
    """

    pair: Pair
    kind: np.ndarray
    label: np.ndarray
    linear: np.ndarray
    support: np.ndarray
    weights: np.ndarray
    clean: np.ndarray
    subsets: np.ndarray


class _Target(NamedTuple):
    """One target before its noise: `[tokens]` codes, the inputs, and the weights of those (None: not linear)."""

    codes: np.ndarray
    inputs: Sequence[int]
    weights: Sequence[float] | None


def planted_connections(
    *,
    tokens: int = 60_000,
    n_inputs: int = 128,
    n_targets: int = 64,
    kinds: Sequence[str] = KINDS,
    density: tuple[float, float] = (0.005, 0.02),
    noise: float = 0.05,
    document_tokens: int = 400,
    seed: int = 0,
) -> Planted:
    """Draw inputs, and targets that are known functions of them.

    Memory: some `12 x tokens x (n_inputs + n_targets)` bytes.

    Args:
        tokens: how many.
        n_inputs: a multiple of 4, at least 16.
        n_targets: how many; kinds take turns, so each has as many to within one.
        kinds: of the targets.
        density: least and greatest share of tokens on which an input fires (expected; B of a subset pair fires half
            as often as A). Targets fire on a half of the least to twice the greatest.
        noise: variance of the noise over the variance of the clean target. It stands where the target fires, as codes
            have it, and never makes a code negative.
        document_tokens: mean length of a document.
        seed: decides everything.

    Raises:
        InputError: numbers that cannot be, or an unknown kind.
    """
    _check(tokens, n_inputs, n_targets, kinds, density, noise, document_tokens)
    rng = np.random.default_rng(seed)
    where = _tokens(rng, tokens, document_tokens)
    inputs, multiples = _inputs(rng, where.document, n_inputs, density)
    kind = np.array([kinds[j % len(kinds)] for j in range(n_targets)])
    support = np.zeros((n_inputs, n_targets), bool)
    weights = np.zeros((n_inputs, n_targets), np.float32)
    clean = np.zeros((tokens, n_targets), np.float32)
    for j in range(n_targets):
        # Units of targets differ, as those of real dictionaries do.
        scale = np.exp(0.7 * rng.standard_normal())
        target = _MAKE[kind[j]](rng, inputs, multiples)
        clean[:, j] = scale * target.codes
        support[list(target.inputs), j] = True
        if target.weights is not None:
            weights[list(target.inputs), j] = scale * np.array(target.weights)
    patterned = np.isin(kind, ("weighted sum", "or", "and", "and-not"))
    first = np.arange(0, n_inputs, _GROUP)
    pair = Pair(_site("inputs", inputs), _site("targets", _noisy(rng, clean, noise)), where)
    return Planted(
        pair, kind, np.where(patterned, kind, ""), np.isin(kind, LINEAR_KINDS), support, weights, clean,
        np.stack([first, first + 1], axis=1),
    )  # fmt: skip


def _check(tokens, n_inputs, n_targets, kinds, density, noise, document_tokens) -> None:
    if n_inputs < 4 * _GROUP or n_inputs % _GROUP:
        raise InputError(f"{n_inputs} inputs: give a multiple of {_GROUP}, at least {4 * _GROUP}")
    if min(tokens, n_targets, document_tokens) < 1:
        raise InputError(f"{tokens} tokens, {n_targets} targets, {document_tokens} tokens a document: at least 1 each")
    if not kinds or (unknown := set(kinds) - set(KINDS)):
        raise InputError(f"kinds {', '.join(sorted(unknown)) if kinds else '(none)'}: give some of {', '.join(KINDS)}")
    low, high = density
    if not 0 < 2 * low <= high <= 0.2:
        raise InputError(f"densities from {low} to {high}: give 0 < low <= high / 2, high at most 0.2")
    if not 0 <= noise < 0.5:
        raise InputError(f"noise {noise}: give a share of the variance, 0 or more and below 0.5")


def _tokens(rng, n, document_tokens) -> Tokens:
    """Documents of half to one and a half times the mean length; rows of 128 tokens, cut without regard to them."""
    lengths = rng.integers(document_tokens // 2 + 1, document_tokens * 3 // 2 + 2, 2 * n // document_tokens + 2)
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:n]
    places = np.arange(n)
    return Tokens(
        rng.integers(0, _VOCAB, n).astype(np.int32), document, places // _ROW, (places % _ROW).astype(np.int32)
    )


def _inputs(rng, document, n_inputs, density) -> tuple[np.ndarray, np.ndarray]:
    """Codes `[tokens, inputs]` float32, and `[groups]` what B's code is times A's."""
    n_groups, n = n_inputs // _GROUP, len(document)
    # A fires on 2 low to high; B on half of that.
    rates = np.exp(rng.uniform(np.log(2 * density[0]), np.log(density[1]), n_groups)) / _SHARES[0]
    multiples = rng.uniform(0.5, 2, n_groups)
    busy = rng.gamma(2, 0.5, (document.max() + 1, -(-n_groups // _GROUPS_IN_TOPIC)))
    codes = np.zeros((n, n_inputs), np.float32)
    for group in range(n_groups):
        event = rng.random(n) < rates[group] * busy[document, group // _GROUPS_IN_TOPIC]
        at = np.flatnonzero(event)
        strength = 0.35 * rng.standard_normal(len(at))
        for member, share in zip((0, 2, 3), _SHARES, strict=True):
            value = np.exp(strength + 0.35 * rng.standard_normal(len(at))).clip(0.25, 4)
            codes[at, _GROUP * group + member] = value * (rng.random(len(at)) < share)
        codes[at, _GROUP * group + 1] = multiples[group] * codes[at, _GROUP * group] * (rng.random(len(at)) < 0.5)
    return codes, multiples


def _noisy(rng, clean, noise) -> np.ndarray:
    """With noise of the stated share of each target's variance, all of it where the target fires."""
    fires = clean > 0
    spread = np.sqrt(noise * clean.var(axis=0, dtype=np.float64) / np.maximum(fires.mean(axis=0), 1e-9))
    codes = np.zeros_like(clean)
    codes[fires] = np.maximum(clean[fires] + (spread * rng.standard_normal(clean.shape))[fires], 0)
    return codes


def _site(name: str, codes: np.ndarray) -> SiteCodes:
    """Codes in slots, as many as the token with most needs, in the order of the features."""
    slots = max(1, int((codes > 0).sum(axis=1).max()))
    values, indices = np.zeros((len(codes), slots), np.float32), np.zeros((len(codes), slots), np.int32)
    row, feature = np.nonzero(codes > 0)
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    values[row, slot], indices[row, slot] = codes[row, feature], feature
    return SiteCodes(name, codes.shape[1], values, indices)


def _weight(rng) -> float:
    return float(rng.uniform(0.5, 1.5))


def _one(rng, n_inputs, member=None) -> int:
    """An input, or one that is A (0), B (1), C (2) or D (3) of its group."""
    member = int(rng.integers(_GROUP)) if member is None else member
    return _GROUP * int(rng.integers(n_inputs // _GROUP)) + member


def _two(rng, n_inputs) -> tuple[int, int]:
    """Two inputs of a group of which neither implies the other."""
    first, second = ((0, 2), (0, 3), (2, 3))[rng.integers(3)]
    start = _one(rng, n_inputs, 0)
    return start + first, start + second


def _weighted_sum(rng, codes, multiples) -> _Target:
    w, form = _weight(rng), rng.integers(3)
    if form == 0:
        a = _one(rng, codes.shape[1])
        return _Target(w * codes[:, a], (a,), (w,))
    a = _one(rng, codes.shape[1], 0)
    # B takes 30 to 60 % of what A gives, or adds as much.
    v = (-1 if form == 1 else 1) * w * rng.uniform(0.3, 0.6) / multiples[a // _GROUP]
    return _Target(w * codes[:, a] + v * codes[:, a + 1], (a, a + 1), (w, v))


def _or(rng, codes, multiples) -> _Target:
    n = int(rng.integers(2, 4))
    groups = rng.choice(codes.shape[1] // _GROUP, n, replace=False)
    inputs = [int(_GROUP * group + rng.integers(_GROUP)) for group in groups]
    weights = [_weight(rng) for _ in inputs]
    return _Target(codes[:, inputs] @ np.array(weights, np.float32), inputs, weights)


def _and_not(rng, codes, multiples) -> _Target:
    a, w = _one(rng, codes.shape[1], 0), _weight(rng)
    # What the linear formula gives up to rounding, and exactly 0 where B fires.
    return _Target(np.where(codes[:, a + 1] > 0, 0, w * codes[:, a]), (a, a + 1), (w, -w / multiples[a // _GROUP]))


def _and(rng, codes, multiples) -> _Target:
    a, b = _two(rng, codes.shape[1])
    w, v = _weight(rng), _weight(rng)
    both = (codes[:, a] > 0) & (codes[:, b] > 0)
    return _Target(np.where(both, w * codes[:, a] + v * codes[:, b], 0), (a, b), (w, v))


def _product(rng, codes, multiples) -> _Target:
    a, b = _two(rng, codes.shape[1])
    return _Target(_weight(rng) * codes[:, a] * codes[:, b], (a, b), None)


def _xor(rng, codes, multiples) -> _Target:
    a, b = _two(rng, codes.shape[1])
    one = (codes[:, a] > 0) != (codes[:, b] > 0)
    return _Target(np.where(one, _weight(rng) * (codes[:, a] + codes[:, b]), 0), (a, b), None)


def _threshold(rng, codes, multiples) -> _Target:
    a = _one(rng, codes.shape[1])
    return _Target(_weight(rng) * np.maximum(codes[:, a] - _median(codes[:, a]), 0), (a,), None)


def _weak(rng, codes, multiples) -> _Target:
    a = _one(rng, codes.shape[1])
    below = np.maximum(_median(codes[:, a]) - codes[:, a], 0)
    return _Target(_weight(rng) * np.where(codes[:, a] > 0, below, 0), (a,), None)


def _median(code) -> float:
    """Of a code where it fires; 0 if it never does."""
    fires = code > 0
    return float(np.median(code[fires])) if fires.any() else 0.0


_MAKE: dict[str, Callable[..., _Target]] = {
    "weighted sum": _weighted_sum,
    "or": _or,
    "and-not": _and_not,
    "and": _and,
    "product": _product,
    "xor": _xor,
    "threshold": _threshold,
    "weak": _weak,
}
