"""Everything a training run carries from step to step, as one pytree: what is not in here is lost on resume."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries.protocol import Dictionary, Params
from sparse_jax.training.sparsity_control import ControlState, init_control


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "opt_state", "step", "age", "rows_seen", "key", "normaliser", "control"],
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
    """

    params: Params
    opt_state: Any
    step: jax.Array
    age: jax.Array
    rows_seen: jax.Array
    key: jax.Array
    normaliser: Normaliser
    control: ControlState


def init_state(dictionary: Dictionary, optimiser, normaliser: Normaliser, seed: int) -> TrainState:
    """The state before the first step, a function of the seed."""
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
        normaliser=normaliser,
        control=init_control(),
    )


def count_rows(seen: jax.Array, more: jax.Array) -> jax.Array:
    """`rows_seen` after `more` rows."""
    rest = seen[1] + more
    return jnp.stack([seen[0] + rest // 1_000_000, rest % 1_000_000])


def total_rows(seen) -> int:
    """`rows_seen` as a Python int."""
    return int(seen[0]) * 1_000_000 + int(seen[1])
