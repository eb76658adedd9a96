"""Ensembles: many dictionaries that learn from one stream of activations.

Members that share a site and all static choices form a group and run one compiled step; in what they differ
(coefficients, k, learning rate, wished L0, seed) is in their states. Two ways of stepping a group:

    loop    one call of the compiled step for each member: the way on CPU
    vmap    one call for all, on states that are stacked along a leading axis: the way on accelerators

On CPU a stacked state must be copied in and out of each member's step: `lax.map` took 1.15 to 1.25 times as long as
separate calls (d 256, n 2048, batch 1024, 4 members), `vmap` 1.2 to 1.6 times; the loop costs nothing and gives a
single run's bits.

On a mesh (mesh.py) whose axis "ensemble" has several devices members are stacked and lie over them; along its other
axes each member's rows and features do.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.dictionaries.protocol import Dictionary
from sparse_jax.errors import InputError
from sparse_jax.lm.sites import Site
from sparse_jax.numerics.axes import ENSEMBLE
from sparse_jax.training.accumulation import WHOLE, Chunks
from sparse_jax.training.mesh import place
from sparse_jax.training.schedules import Schedule
from sparse_jax.training.sparsity_control import Controller
from sparse_jax.training.state import Settings, TrainState, init_state
from sparse_jax.training.step import Optimisation, compiled_step, make_step, step_function

Way = Literal["loop", "vmap"]
# The states of a group: one for each member (loop), or one whose leaves have a leading member axis (vmap).
States = tuple[TrainState, ...] | TrainState


@dataclass(frozen=True)
class Member:
    """One dictionary of an ensemble.

    Attributes:
        site: where its activations are taken, as `str(Site)`.
        dictionary: its own static choices, sized for the site; its k is the k of inference.
        settings: what is traced; see `settings_for`.
        seed: of its parameters and of its steps' keys, as in a single run.
        name: by which it is logged; no two members have the same.
    """

    site: str
    dictionary: Dictionary
    settings: Settings
    seed: int
    name: str


@dataclass(frozen=True)
class Group:
    """Members that run one compiled step.

    Attributes:
        site: theirs.
        dictionary: one that stands for all of them: only what is not traced matters, and its k is the largest.
        members: in the order in which they were given.
    """

    site: str
    dictionary: Dictionary
    members: tuple[Member, ...]


def group(members: Sequence[Member]) -> tuple[Group, ...]:
    """The members in groups that share a site and everything static, in the order of each group's first member.

    Raises:
        InputError: there are none, two have one name, a dictionary has no size yet, or a member's settings have
            another k than its dictionary.
    """
    if not members:
        raise InputError("an ensemble without members: give at least one")
    names = [member.name for member in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"several members are called {', '.join(map(repr, twice))}: each needs a name of its own")
    groups: dict[tuple, list[Member]] = {}
    for member in members:
        _check(member)
        groups.setdefault((member.site, *_static(member.dictionary)), []).append(member)
    return tuple(
        # The largest k bounds the shapes of all.
        Group(of[0].site, max((m.dictionary for m in of), key=lambda d: getattr(d, "k", 0)), tuple(of))
        for of in groups.values()
    )


def _check(member: Member) -> None:
    dictionary = member.dictionary
    if not dictionary.d_in or not dictionary.n_features:
        raise InputError(f"the dictionary of member {member.name!r} has no size: use its `sized` with the site's width")
    k = member.settings.coefficients.get("k_now")
    if k is not None and float(k) != dictionary.k:
        raise InputError(
            f"member {member.name!r} has k {dictionary.k} in its dictionary and {float(k):g} in its settings: "
            "make the settings from the dictionary (settings_for)"
        )


def check_harvested(groups: Sequence[Group], sites: Sequence[Site]) -> None:
    """Raises InputError if members stand at a site that is not among those that are harvested."""
    names = [str(site) for site in sites]
    for of in groups:
        if of.site not in names:
            members = ", ".join(member.name for member in of.members)
            raise InputError(f"site {of.site} of {members} is not among those that are harvested ({', '.join(names)})")


def _static(dictionary: Dictionary) -> tuple:
    """What decides the compiled step of a dictionary: everything but the values of its coefficients, and its form."""
    traced = set(dictionary.coefficient_fields.values())
    names = [field.name for field in dataclasses.fields(dictionary) if field.name not in traced]
    return (
        type(dictionary),
        tuple((name, getattr(dictionary, name)) for name in names),
        # Ramps and frozen parameters may follow from a coefficient (Lp with p = p_start does not anneal).
        tuple(sorted(dictionary.ramps.items())),
        dictionary.frozen,
        # In another form of the step a member would not get a single run's bits (TopK chooses its form by k).
        dictionary.step_form,
    )


def way_here(way: Way | None = None, mesh: Mesh | None = None) -> Way:
    """The given way, or where none is given the one for this backend and mesh.

    Raises:
        InputError: another way than those, or a loop over members that are to lie over devices.
    """
    if mesh is not None and mesh.shape[ENSEMBLE] > 1:
        if way == "loop":
            raise InputError(f"way loop with a mesh of {ENSEMBLE}={mesh.shape[ENSEMBLE]}: give vmap, or no such axis")
        way = "vmap"
    if way not in (None, "loop", "vmap"):
        raise InputError(f"way {way!r} of stepping an ensemble: give loop or vmap, or none for this device's")
    return way or ("loop" if jax.default_backend() == "cpu" else "vmap")


def init_ensemble(
    group: Group, optimiser, normaliser: Normaliser, way: Way | None = None, mesh: Mesh | None = None
) -> States:
    """The states of a group's members before the first step, each as `init_state` makes it, laid out over the mesh."""
    states = tuple(init_state(m.dictionary, optimiser, normaliser, m.seed, m.settings) for m in group.members)
    way = way_here(way, mesh)
    states = states if way == "loop" else stack(states)
    return states if mesh is None else place(mesh, states, members=way == "vmap")


def make_ensemble_step(
    group: Group,
    optimisation: Optimisation,
    schedule: Schedule,
    total_steps: int,
    dead_window: int,
    controller: Controller = Controller(),  # noqa: B008  frozen
    way: Way | None = None,
    mesh: Mesh | None = None,
    chunks: Chunks = WHOLE,
) -> Callable[[States, jax.Array, jax.Array], tuple[States, dict[str, jax.Array]]]:
    """The step `(states, x [rows, d] raw, weight [rows]) -> (states, metrics)` of a group; old states are consumed.

    It is compiled once, whatever the number of members in a loop. Metrics are those of `make_step`, each `[member]`.
    Arguments are those of `make_step`.
    """
    arguments = (group.dictionary, optimisation, schedule, total_steps, dead_window, controller)
    if way_here(way, mesh) == "vmap":
        over = None if mesh is None else ENSEMBLE
        mapped = jax.vmap(step_function(*arguments, chunks), in_axes=(0, None, None), spmd_axis_name=over)
        return compiled_step(mapped, mesh, members=True)
    step = make_step(*arguments, mesh=mesh, chunks=chunks)

    def one_by_one(states, x, weight):
        stepped = [step(state, x, weight) for state in states]
        return tuple(state for state, _ in stepped), _stacked([metrics for _, metrics in stepped])

    return one_by_one


@jax.jit
def _stacked(trees: Sequence):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def stack(states: Sequence[TrainState]) -> TrainState:
    """States of one shape as one, along a new leading axis of every leaf."""
    return _stacked(list(states))


def member_state(states: States, i: int) -> TrainState:
    """The state of member `i` of a group; in a loop the very buffers that the next step consumes."""
    return states[i] if isinstance(states, tuple) else jax.tree.map(lambda leaf: leaf[i], states)


def with_member(states: States, i: int, state: TrainState) -> States:
    """The states with that of member `i` replaced (after resampling, say)."""
    if isinstance(states, tuple):
        return (*states[:i], state, *states[i + 1 :])
    return jax.tree.map(lambda leaf, new: leaf.at[i].set(new), states, state)


def members_of(groups: Sequence[States]) -> list[TrainState]:
    """The states of all members of all groups, in order."""
    return [member_state(states, i) for states in groups for i in range(_count(states))]


def with_members(groups: Sequence[States], states: Sequence[TrainState]) -> tuple[States, ...]:
    """The inverse of `members_of`: the states in groups (and ways) like `groups`."""
    rest = iter(states)
    taken = [[next(rest) for _ in range(_count(like))] for like in groups]
    return tuple(tuple(of) if isinstance(like, tuple) else stack(of) for like, of in zip(groups, taken))


def _count(states: States) -> int:
    return len(states) if isinstance(states, tuple) else states.step.shape[0]


def trained(group: Group, states: States, i: int) -> Normalised:
    """Member `i` as it is measured and saved: with its own dictionary, so with its own k."""
    state = member_state(states, i)
    return Normalised(group.members[i].dictionary, state.params, state.normaliser)
