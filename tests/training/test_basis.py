"""The step of a learner: dead atoms start again and are young then, the penalty holds L0, masked rows do nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.coding.learn import quadratic
from sparse_jax.dictionaries import Fista
from sparse_jax.training import Schedule, adam, init_state, settings_for
from sparse_jax.training.basis import LearnerAsOptimiser, frozen, make_basis_step

D, N, ROWS, WINDOW = 8, 16, 64, 100


def made(learner, target_l0=None, restart_dead=True, total=100):
    dictionary = Fista(n_features=N, l1=1.0).sized(D)
    settings = settings_for(dictionary, adam(1e-3), target_l0)
    state = init_state(dictionary, LearnerAsOptimiser(learner), Normaliser(jnp.zeros(D), jnp.ones(())), 0, settings)
    return state, make_basis_step(dictionary, learner, Schedule(), total, WINDOW, restart_dead=restart_dead)


def rows(seed=0):
    return jax.random.normal(jax.random.key(seed), (ROWS, D))


@pytest.mark.parametrize("restart", [True, False])
def test_dead_atoms_start_again(restart):
    state, step = made(quadratic(0.1), restart_dead=restart)
    # Atom 3 is 0 and never fires; it has been silent for longer than the window.
    params = state.params | {"W_dec": state.params["W_dec"].at[3].set(0)}
    state = dataclasses.replace(state, params=params, age=jnp.full(N, WINDOW + 1, jnp.int32))
    state, metrics = step(state, rows(), jnp.ones(ROWS))
    length = float(jnp.linalg.norm(state.params["W_dec"][3]))
    assert (int(metrics["refreshed"]) >= 1) == restart
    np.testing.assert_allclose(length, 1.0 if restart else 0.0, atol=1e-5)
    assert int(state.age[3]) == (0 if restart else WINDOW + 1 + ROWS)
    if restart:  # it is young now, and fires on what it was drawn from
        state, metrics = step(state, rows(), jnp.ones(ROWS))
        assert int(metrics["refreshed"]) == 0


def test_frozen_atoms_stay_while_the_penalty_holds_l0():
    state, step = made(frozen(), target_l0=3.0, restart_dead=False)
    before = np.array(state.params["W_dec"])
    first = np.array(state.params["penalty"])
    for i in range(100):
        state, metrics = step(state, rows(i), jnp.ones(ROWS))
    np.testing.assert_array_equal(state.params["W_dec"], before)
    assert metrics["moved"] == 0
    assert state.params["penalty"] == metrics["coefficient"] != first
    assert abs(float(metrics["l0"]) - 3) < 0.8


def test_masked_rows_change_nothing():
    weight = jnp.ones(ROWS).at[40:].set(0)
    ends = []
    for rest in (0.0, 1e15):
        state, step = made(quadratic(0.1))
        state, metrics = step(state, rows().at[40:].set(rest), weight)
        ends.append((state.params, state.age, metrics["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)
