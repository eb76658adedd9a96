"""Cases: a feature with the fragments that it is explained from and scored on. What of them goes into a model's prompt
is decided here, once, from a seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparse_jax.features.explain.examples import Example
from sparse_jax.features.explain.fragments import Activity, Fragments, Reading, maxima, token_activations
from sparse_jax.features.explain.selection import Protocol, select


@dataclass(frozen=True)
class Case:
    """A feature to be explained.

    Attributes:
        basis: what it is a feature of ("dictionary", "neurons", "random").
        feature: its number there.
        maximum: its largest activation in the text that is read: 10 on the scale of the prompts.
        density: the share of tokens on which it fires.
        mean: its mean activation where it fires.
        active_fragments: in how many fragments it is active.
        explaining: what the explainer sees, strongest first.
        top, random: what simulations are scored on.
        silent: fragments in which it is silent.
        disjoint_by: "document" or "row": what explaining and scored fragments have none of in common.
    """

    basis: str
    feature: int
    maximum: float
    density: float
    mean: float
    active_fragments: int
    explaining: tuple[Example, ...]
    top: tuple[Example, ...]
    random: tuple[Example, ...]
    silent: tuple[Example, ...]
    disjoint_by: str

    @property
    def scored(self) -> tuple[Example, ...]:
        """Fragments in which the feature is active, and which the explainer has not seen."""
        return self.top + self.random


# What a study draws from its seed besides each feature's fragments; no two draws share a stream.
FEATURES, FRAGMENTS, DETECTION, FUZZING, SHUFFLE = range(5)


def draw_features(active: np.ndarray, count: int, needed: int, seed: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """(features to explain, features skipped on the way): uniformly from those that are active in enough fragments.

    Args:
        active: `[n_features]` in how many fragments each is active.
        count: how many to draw.
        needed: active fragments that a feature must have.
        seed: decides which.
    """
    taken, skipped = [], []
    for feature in np.random.default_rng((*seed, FEATURES)).permutation(len(active)).tolist():
        if len(taken) == count:
            break
        (taken if active[feature] >= needed else skipped).append(feature)
    return taken, skipped


def make_cases(
    reading: Reading,
    fragments: Fragments,
    active: Activity,
    basis: str,
    features: Sequence[int],
    protocol: Protocol,
    token_strings: Callable[[np.ndarray], list[str]],
    seed: tuple[int, ...],
) -> tuple[list[Case], dict[int, str]]:
    """(the cases, feature -> why it is skipped) of some features, in their order.

    Args:
        reading, fragments: the text, and the dictionary that is read.
        active: how often its features fire there.
        basis: its name.
        features: numbers.
        protocol: how many fragments of each kind.
        token_strings: token ids to what is shown.
        seed: decides what is drawn; a feature's draws do not depend on which others are asked for.
    """
    largest = maxima(reading, fragments, features)
    chosen, skipped = {}, {}
    for column, feature in enumerate(features):
        found = select(largest[:, column], fragments, protocol, (*seed, FRAGMENTS, feature))
        (skipped if isinstance(found, str) else chosen)[feature] = found
    wanted = [(f, i) for f, s in chosen.items() for i in (*s.explaining, *s.top, *s.random, *s.silent)]
    values = token_activations(reading, fragments, wanted)

    def example(feature: int, fragment: int) -> Example:
        return Example(
            tokens=tuple(token_strings(fragments.tokens[fragment])),
            activations=values[feature, fragment],
            counts=fragments.counts[fragment],
            row=int(fragments.rows[fragment]),
            start=int(fragments.starts[fragment]),
            document=str(reading.text.documents[fragments.documents[fragment, 0]]),
        )

    column = {feature: i for i, feature in enumerate(features)}
    cases = []
    for feature, found in chosen.items():
        parts = (found.explaining, found.top, found.random, found.silent)
        of_feature = largest[:, column[feature]]
        cases.append(
            Case(
                basis,
                feature,
                float(of_feature.max()),
                float(active.fired[feature] / active.tokens),
                float(active.sums[feature] / active.fired[feature]),
                int((of_feature > 0).sum()),
                *(tuple(example(feature, i) for i in part) for part in parts),
                found.disjoint_by,
            )
        )
    return cases, skipped
