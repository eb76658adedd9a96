"""The methods of `experiments.compositional_ood`: from training rows to a dictionary, some with an encoder."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh

from experiments.compositional_ood import AUTOENCODERS, Flags
from sparse_jax.activations import fit_normaliser
from sparse_jax.coding.compositional import Composition
from sparse_jax.coding.learn import Learner, gradient, online, quadratic
from sparse_jax.coding.learn_dictionary import falling_penalty, learn_dictionary
from sparse_jax.dictionaries import DICTIONARIES, Dictionary
from sparse_jax.numerics import unit_rows
from sparse_jax.training import Schedule, TrainState, adam, init_state, settings_for
from sparse_jax.training.step import step_function

# Share of the steps in which an annealed penalty falls.
FALLING = 0.6
# Steps in one compiled call.
_STEPS_TOGETHER = 100


class Made(NamedTuple):
    """What a method made of the training rows.

    Attributes:
        W: `[n, d]` its dictionary.
        bias: `[d]` what its decoder adds.
        encode: x -> codes by its own encoder; None: it has none.
        l0: mean active features at the end of training, None where nothing was trained.
    """

    W: jax.Array
    bias: jax.Array
    encode: Callable[[jax.Array], jax.Array] | None = None
    l0: float | None = None


def make(
    method: str, flags: Flags, composition: Composition, x: jax.Array, seed: int, start: jax.Array | None = None
) -> Made:
    """What `method` makes of training rows `x [rows, d]`; `start`: W of those that begin with another's."""
    key = jax.random.fold_in(jax.random.key(seed), 2)
    n, d = composition.W.shape
    nothing = jnp.zeros(d, jnp.float32)
    if method == "oracle":
        return Made(composition.W, nothing)
    if method == "random":
        return Made(random_rows(key, n, d), nothing)
    if method == "pca":
        return Made(principal_directions(x, n), jnp.mean(x, axis=0))
    if method in AUTOENCODERS:
        return train_autoencoder(method, flags, n, composition.k, x, seed)
    W = random_rows(key, n, d) if start is None else start
    return learn(method, flags, x, W, jax.random.fold_in(key, 1))


def random_rows(key: jax.Array, n: int, d: int) -> jax.Array:
    """`[n, d]` random directions."""
    return unit_rows(jax.random.normal(key, (n, d), jnp.float32))


def principal_directions(x: jax.Array, n: int) -> jax.Array:
    """`[n, d]`: both signs of each, the largest first, zero rows where there are more features than those."""
    centred = np.asarray(x, np.float64) - np.mean(np.asarray(x, np.float64), axis=0)
    directions = np.linalg.eigh(centred.T @ centred)[1].T[::-1]
    both = np.stack([directions, -directions], axis=1).reshape(-1, x.shape[1])[:n]
    return jnp.array(np.pad(both, [(0, n - len(both)), (0, 0)]), jnp.float32)


def train_autoencoder(method: str, flags: Flags, n: int, k: int, x: jax.Array, seed: int) -> Made:
    """By the library's step, in the units that its defaults are for (E||x||^2 = d), L0 held at k."""
    kind = DICTIONARIES[method]
    counts = "k" in kind.__dataclass_fields__
    dictionary = (kind(n_features=n, k=k) if counts else kind(n_features=n)).sized(x.shape[1])
    optimisation = adam(flags.learning_rate)
    mean = np.mean(np.asarray(x, np.float64), axis=0)
    variance = float(np.mean(np.sum((np.asarray(x, np.float64) - mean) ** 2, axis=1)))
    normaliser = fit_normaliser("scale", mean, variance)
    settings = settings_for(dictionary, optimisation, None if counts else float(k))
    state = init_state(dictionary, optimisation.transform, normaliser, seed, settings)
    # A feature is dead after a twentieth of the run without firing, and after ten of its turns at the least.
    window = max(flags.steps * flags.batch // 20, 10 * n // k)
    step = step_function(dictionary, optimisation, Schedule(), flags.steps, window)
    key, l0 = jax.random.fold_in(jax.random.key(seed), 3), jnp.zeros(0, jnp.float32)
    for first in range(0, flags.steps, _STEPS_TOGETHER):
        numbers = jnp.arange(first, min(first + _STEPS_TOGETHER, flags.steps), dtype=jnp.int32)
        state, l0 = _steps(step, flags.batch, key, x, state, numbers)
    return Made(
        dictionary.directions(state.params),
        state.params.get("b_dec", jnp.zeros(x.shape[1], jnp.float32)) * normaliser.scale,
        partial(_encode, dictionary, state),
        float(jnp.mean(l0)),
    )


@partial(jax.jit, static_argnums=0)
def _encode(dictionary: Dictionary, state: TrainState, x: jax.Array) -> jax.Array:
    return dictionary.encode(state.params, state.normaliser.apply(x))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _steps(step: Callable, batch: int, key: jax.Array, x: jax.Array, state: TrainState, numbers: jax.Array):
    """Steps of the given numbers on random batches: (state, their L0)."""

    def one(state, i):
        rows = jax.random.randint(jax.random.fold_in(key, i), (batch,), 0, x.shape[0])
        state, metrics = step(state, x[rows], jnp.ones(batch, x.dtype))
        return state, metrics["l0"]

    return lax.scan(one, state, numbers)


def learner_for(name: str, steps: int) -> Learner:
    """The learners of coding/learn.py, with rates that suit atoms that are active together.

    "annealed" is Adam with steps so large that at first it jumps out of what the others are stuck in.
    """
    if name == "annealed":
        return gradient(optax.adam(optax.cosine_decay_schedule(3e-2, steps)))
    if name == "quadratic":
        return quadratic(0.1)
    if name == "online":
        return online(10.0)
    return gradient(optax.adam(optax.cosine_decay_schedule(1e-2, steps)))


def mesh_of(devices: int) -> Mesh | None:
    """The first of the machine's devices, as many as asked for, on one axis; None for one."""
    if devices == 1:
        return None
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))


def learn(method: str, flags: Flags, x: jax.Array, W: jax.Array, key: jax.Array) -> Made:
    """By a learner with lasso codes, from W."""
    annealed = method.startswith("annealed")
    refreshed = annealed or method.startswith("warm")
    learner = learner_for("annealed" if annealed else method.split("-")[1], flags.learner_steps)
    penalty = flags.fixed_penalty
    if annealed:
        penalty = falling_penalty(flags.first_penalty, flags.penalty, FALLING, flags.learner_steps)
    learned = learn_dictionary(
        x, W, penalty, learner, flags.learner_steps, batch=min(flags.batch, x.shape[0]), key=key,
        refresh_every=flags.refresh_every if refreshed else 0, mesh=mesh_of(flags.devices),
    )  # fmt: skip
    return Made(learned.W, jnp.zeros(x.shape[1], jnp.float32), None, float(jnp.mean(learned.l0[-20:])))
