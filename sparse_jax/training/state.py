"""Everything a training run carries from step to step, as one pytree: what is not in here is lost on resume."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.protocol import Dictionary, Params
from sparse_jax.errors import InputError
from sparse_jax.training.sparsity_control import ControlState, check_target, init_control

if TYPE_CHECKING:
    from sparse_jax.training.step import Optimisation


class Settings(NamedTuple):
    """What runs of one compiled step may differ in, float32 scalars.

    Attributes:
        coefficients: peak values of the dictionary's coefficients.
        learning_rate: Adam's peak rate of the group "main".
        target_l0: the wished mean number of active features; 0 or less: none.
    """

    coefficients: dict[str, jax.Array]
    learning_rate: jax.Array
    target_l0: jax.Array


def settings_for(dictionary: Dictionary, optimisation: "Optimisation", target_l0: float | None = None) -> Settings:
    """The settings that a dictionary and an optimisation stand for.

    Raises:
        InputError: a target that the dictionary cannot be held at.
    """
    check_target(dictionary, target_l0)
    return Settings(
        coefficients={name: _scalar(value) for name, value in dictionary.coefficients.items()},
        learning_rate=_scalar(optimisation.learning_rate),
        target_l0=_scalar(0.0 if target_l0 is None else target_l0),
    )


def _scalar(value) -> jax.Array:
    return jnp.array(value, jnp.float32)  # a copy, also of an array: the step consumes its state


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "opt_state", "step", "age", "rows_seen", "key", "normaliser", "control", "settings"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """The state of a run. With the text, the model and the flags it decides all that follows, to the bit.

    Attributes:
        params: the dictionary's parameters, float32.
        opt_state: the optimiser's state for those that are trained.
        step: int32, steps taken. Batches are numbered like steps, so it is the position in the data too.
        age: `[n_features]` int32, rows since each feature last fired.
        rows_seen: `[2]` int32, rows that counted: (millions, rest), since int32 ends at 2.1e9.
        key: the run's key; step `i` uses `fold_in(key, i)`.
        normaliser: what stands between raw activations and the dictionary.
        control: of the controller that holds L0 on target.
        settings: what is traced of the flags.
    """

    params: Params
    opt_state: Any
    step: jax.Array
    age: jax.Array
    rows_seen: jax.Array
    key: jax.Array
    normaliser: Normaliser
    control: ControlState
    settings: Settings


def init_state(dictionary: Dictionary, optimiser, normaliser: Normaliser, seed: int, settings: Settings) -> TrainState:
    """The state before the first step, a function of the seed.

    Raises:
        InputError: settings for another dictionary.
    """
    if set(settings.coefficients) != set(dictionary.coefficients):
        raise InputError(
            f"settings with the coefficients {sorted(settings.coefficients)}: a {dictionary.kind} dictionary has "
            f"{sorted(dictionary.coefficients)}; see settings_for"
        )
    key = jax.random.key(seed)
    params = dictionary.init(jax.random.fold_in(key, 0))
    trained = {name: value for name, value in params.items() if name not in dictionary.frozen}
    return TrainState(
        params=params,
        opt_state=optimiser.init(trained),
        step=jnp.zeros((), jnp.int32),
        age=jnp.zeros(dictionary.n_features, jnp.int32),
        rows_seen=jnp.zeros(2, jnp.int32),
        key=jax.random.fold_in(key, 1),
        # Copies: the step consumes its state, and several states may be given one normaliser.
        normaliser=jax.tree.map(jnp.copy, normaliser),
        control=init_control(),
        settings=jax.tree.map(_scalar, settings),
    )


def steps_taken(state: Any) -> int:
    """How many steps a state, a stack of states or any tree of such has taken."""
    first = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TrainState))[0]
    # Of a stack over devices of several processes, what lies here: all members have taken the same.
    return int(np.asarray(first.step.addressable_data(0)).reshape(-1)[0])


def count_rows(seen: jax.Array, more: jax.Array) -> jax.Array:
    """`rows_seen` after `more` rows."""
    rest = seen[1] + more
    return jnp.stack([seen[0] + rest // 1_000_000, rest % 1_000_000])


def total_rows(seen) -> int:
    """`rows_seen` as a Python int."""
    return int(seen[0]) * 1_000_000 + int(seen[1])
