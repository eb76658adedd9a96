"""Which dictionaries a sweep trains: all combinations of what its flags list, checked before anything is loaded."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.data import check_numbers, check_positive
from experiments.sweep import Flags
from sparse_jax.dictionaries import Dictionary, MatchingPursuit
from sparse_jax.errors import InputError
from sparse_jax.lm.sites import Site


@dataclass(frozen=True)
class Choice:
    """One member before its site's width is known.

    Attributes:
        site: as given by the flags.
        dictionary: with its sparsity and expansion set.
        learning_rate: Adam's peak.
        sparsity: the value of the knob (see `knob`), or the wished L0.
        target_l0: the L0 to hold; None: the coefficient stays.
        seed: of its initial parameters.
        name: of its folder; unique within a site.
    """

    site: str
    dictionary: Dictionary
    learning_rate: float
    sparsity: float
    target_l0: float | None
    seed: int
    name: str


def knob(dictionary: Dictionary) -> str | None:
    """The flag of a dictionary that decides how sparse it is: "k", or its sparsity coefficient; None: there is none."""
    if "k" in dictionary.__dataclass_fields__:
        return "k"
    name = dictionary.sparsity_coefficient
    return name if name in dictionary.__dataclass_fields__ else None


def choices(flags: Flags) -> list[Choice]:
    """Every member, sites first, then widths, rates, sparsities and seeds.

    Raises:
        InputError: flags that no sweep can use; see `check`.
    """
    check(flags)
    made = []
    for site, expansion, rate, sparsity, seed in itertools.product(
        flags.sites, flags.expansions or (None,), flags.learning_rates, _sparsities(flags), flags.seeds
    ):
        dictionary = flags.dictionary
        if expansion is not None:
            dictionary = dataclasses.replace(dictionary, expansion=expansion)
        if not flags.target_l0s:
            dictionary = with_sparsity(dictionary, sparsity)
        width = f"n{dictionary.n_features}" if dictionary.n_features else f"{dictionary.expansion}x"
        wished = "target-l0" if flags.target_l0s else knob(flags.dictionary)
        name = f"{wished}-{sparsity:.12g}_{width}_lr-{rate:.12g}_seed-{seed}"
        made.append(Choice(site, dictionary, rate, sparsity, sparsity if flags.target_l0s else None, seed, name))
    return made


def with_sparsity(dictionary: Dictionary, value: float) -> Dictionary:
    """The dictionary with its knob at `value`."""
    name = knob(dictionary)
    return dataclasses.replace(dictionary, **{name: int(value) if name == "k" else float(value)})


def _sparsities(flags: Flags) -> Sequence[float]:
    """The values of the knob, or wished L0s; by default where the dictionary's own flags put the knob."""
    if values := flags.target_l0s or flags.sparsities:
        return values
    name = knob(flags.dictionary)
    own = getattr(flags.dictionary, name)
    return (own if own is not None else flags.dictionary.coefficients[name],)


def check(flags: Flags) -> None:
    """Raises InputError for flags that no sweep can use, before anything is loaded."""
    check_numbers(flags)
    check_positive(flags, "learning_rates", "target_l0s", "expansions", "measure_tokens")
    for name in ("sites", "seeds", "learning_rates"):
        if not getattr(flags, name):
            raise InputError(f"--{name.replace('_', '-')}: give at least one")
    for name in ("seeds", "learning_rates", "sparsities", "target_l0s", "expansions", "measure_at"):
        _check_distinct(name, getattr(flags, name), getattr(flags, name))
    _check_distinct("sites", flags.sites, [str(Site.parse(site)) for site in flags.sites])
    if min(flags.seeds) < 0:
        raise InputError(f"--seeds {_shown(flags.seeds)}: a seed cannot be negative")
    if not all(0 < share <= 1 for share in flags.measure_at):
        raise InputError(f"--measure-at {_shown(flags.measure_at)}: give shares of the run, more than 0 and at most 1")
    measured_steps(flags)
    if flags.expansions and flags.dictionary.n_features:
        raise InputError(
            f"--expansions {_shown(flags.expansions)} and --n-features {flags.dictionary.n_features} both say how wide "
            "a dictionary is: give one of them"
        )
    _check_sparsity(flags)


def measured_steps(flags: Flags) -> dict[int, float]:
    """After how many steps every member is measured -> the share of the run that this stands for.

    Raises:
        InputError: two shares round to the same step.
    """
    steps, found = flags.tokens // flags.batch, {}
    for share in flags.measure_at:
        at = max(1, round(share * steps))
        if at in found:
            raise InputError(
                f"--measure-at {_shown((found[at], share))}: both are step {at} of the run's {steps}; give shares that "
                "are further apart, or train on more --tokens"
            )
        found[at] = share
    return found


def _check_sparsity(flags: Flags) -> None:
    kind, name = flags.dictionary.kind, knob(flags.dictionary)
    if flags.sparsities and flags.target_l0s:
        raise InputError("--sparsities and --target-l0s both decide how sparse members are: give one of them")
    if flags.target_l0s and flags.dictionary.sparsity_coefficient is None:
        raise InputError(
            f"--target-l0s {_shown(flags.target_l0s)}: a {kind} dictionary has no sparsity coefficient to move; its L0 "
            "is set by --sparsities"
        )
    if name is None:
        raise InputError(f"a {kind} dictionary has neither a k nor a sparsity coefficient to vary")
    if name == "k" and (wrong := [k for k in flags.sparsities if k < 1 or k != int(k)]):
        raise InputError(f"--sparsities {_shown(wrong)}: k of a {kind} dictionary is a whole number of 1 or more")
    if wrong := [value for value in flags.sparsities if not value >= 0]:
        raise InputError(f"--sparsities {_shown(wrong)}: a coefficient cannot be negative")
    if flags.dictionary.n_features:
        check_k(flags.dictionary.n_features, _sparsities(flags), flags.dictionary)
    for value in flags.sparsities:
        with_sparsity(flags.dictionary, value)  # the dictionary's own rules


def check_k(n_features: int, sparsities: Sequence[float], dictionary: Dictionary) -> None:
    """Raises InputError for a k above the number of features, where two such would be the same dictionary."""
    # A pursuit may take more steps than there are features: it chooses some again.
    if knob(dictionary) == "k" and max(sparsities) > n_features and not isinstance(dictionary, MatchingPursuit):
        raise InputError(f"--sparsities {max(sparsities):g}: k exceeds the {n_features} features of the dictionary")


def _check_distinct(name: str, given: Sequence, values: Sequence) -> None:
    if len(set(values)) < len(values):
        raise InputError(f"--{name.replace('_', '-')} {_shown(given)}: one of them is there twice")


def _shown(values: Sequence) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
