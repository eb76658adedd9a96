"""Which fragments a feature is explained from, and on which the explanation is scored: never the same text.

Of the `top` fragments by maximum and `random` others that are active, `explain` of the first are shown to the
explainer; other top ones and random ones are what its explanation is scored on, and silent ones for the scores that
ask which texts are active at all. No document has fragments on both sides. Where a feature's top fragments come from
too few documents for that (two novels), no row has; the result says which. A fragment with exactly the tokens of one
that is explained from is never scored, whatever document it is in.

Source: Bills et al. 2023; the numbers are those of Cunningham et al. 2023, section 3.
"""

from dataclasses import dataclass

import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.features.explain.fragments import Fragments


@dataclass(frozen=True)
class Protocol:
    """How many fragments of each kind.

    Attributes:
        top: the pool of strongest fragments.
        random: the pool of fragments drawn uniformly from those in which the feature is active; a feature with fewer
            active ones than this or `top` is skipped.
        explain: strongest ones that are explained from.
        score_top, score_random: strongest and random ones that are scored.
        silent: fragments in which the feature is silent.
    """

    top: int = 20
    random: int = 20
    explain: int = 5
    score_top: int = 5
    score_random: int = 5
    silent: int = 10

    def __post_init__(self):
        if min(self.explain, self.score_top, self.score_random) < 1 or self.silent < 0:
            raise InputError("explain, score_top and score_random must be positive, silent not negative")
        if self.explain + self.score_top > self.top or self.score_random > self.random:
            raise InputError(
                f"{self.explain} + {self.score_top} of the top {self.top} and {self.score_random} of {self.random} "
                "random fragments: the pools are too small"
            )

    @property
    def needed(self) -> int:
        """Active fragments that a feature must have."""
        return max(self.top, self.random)


@dataclass(frozen=True)
class Selection:
    """Numbers of fragments.

    Attributes:
        explaining: strongest first.
        top, random: scored.
        silent: scored as such; fewer than asked for where the feature is active nearly everywhere.
        disjoint_by: "document" or "row": what explaining and scoring fragments have none of in common.
    """

    explaining: tuple[int, ...]
    top: tuple[int, ...]
    random: tuple[int, ...]
    silent: tuple[int, ...]
    disjoint_by: str


def select(maxima: np.ndarray, fragments: Fragments, protocol: Protocol, seed: tuple[int, ...]) -> Selection | str:
    """The fragments of a feature, or why it has none.

    Args:
        maxima: `[n_fragments]` its largest activation in each, 0 where it is silent.
        fragments: the same fragments.
        protocol: how many.
        seed: decides all that is drawn.

    Returns:
        The selection; or, of a feature that is skipped, the reason in a few words.
    """
    active = np.flatnonzero(maxima > 0)
    if len(active) < protocol.needed:
        return f"fewer than {protocol.needed} active fragments"
    generator = np.random.default_rng(seed)
    # Equally strong ones in random order: in the order of the text they would come from one document.
    order = np.lexsort((generator.random(len(active)), -maxima[active].astype(np.float64)))
    pool = active[order[: protocol.top]]
    walk = generator.permutation(pool)
    drawn = generator.permutation(active)[: protocol.random]
    silent = generator.permutation(np.flatnonzero(maxima <= 0))
    for by in ("document", "row"):
        if (found := _split(maxima, fragments, protocol, by, walk, drawn, silent)) is not None:
            return found
    return "active in too few rows"


def _units(fragments: Fragments, fragment: int, by: str) -> set[int]:
    if by == "row":
        return {int(fragments.rows[fragment])}
    first, last = fragments.documents[fragment]
    return set(range(int(first), int(last) + 1))


def _split(maxima, fragments, protocol, by, walk, drawn, silent) -> Selection | None:
    """The selection with no unit on both sides; None where there is too little."""
    explaining = [int(i) for i in walk[: protocol.explain]]
    units = set().union(*(_units(fragments, i, by) for i in explaining))
    texts = {fragments.tokens[i].tobytes() for i in explaining}

    def take(candidates, count: int, without=()) -> list[int]:
        taken = []
        for i in map(int, candidates):
            if len(taken) == count:
                break
            apart = not (_units(fragments, i, by) & units) and fragments.tokens[i].tobytes() not in texts
            if apart and i not in without:
                taken.append(i)
        return taken

    top = take(walk[protocol.explain :], protocol.score_top)
    random = take(drawn, protocol.score_random, top)
    if len(top) < protocol.score_top or len(random) < protocol.score_random:
        return None

    def strongest_first(chosen: list[int]) -> tuple[int, ...]:
        return tuple(sorted(chosen, key=lambda i: (-float(maxima[i]), i)))

    quiet = tuple(take(silent, protocol.silent))
    return Selection(strongest_first(explaining), strongest_first(top), tuple(random), quiet, by)
