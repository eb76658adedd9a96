"""The controller: by hand, on a simple plant, and in training."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, PCA
from sparse_jax.errors import InputError
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for
from sparse_jax.training.sparsity_control import MOST, Controller, check_target, control, init_control

D = 16


def run(target, l0_of, steps, active=lambda i: True, controller=Controller()):  # noqa: B008  frozen
    """(log_factor, l0) of every step on a plant that answers with `l0_of(log_factor, i)`."""
    step = jax.jit(lambda s, l0, a: control(s, controller, jnp.float32(target), l0, a, steps))
    state, seen = init_control(), []
    for i in range(steps):
        l0 = l0_of(float(state.log_factor), i)
        state = step(state, jnp.float32(l0), jnp.array(active(i)))
        seen.append((float(state.log_factor), l0))
    return np.array(seen), state


def test_two_steps_by_hand():
    target, controller = jnp.float32(10.0), Controller(average=0.01, integral=5.0, proportional=0.3)
    keep = math.exp(-1.0)  # an average over 1 of 100 steps
    one = control(init_control(), controller, target, jnp.float32(20.0), jnp.array(True), 100)
    assert float(one.l0) == 20.0
    assert float(one.log_factor) == pytest.approx(0.05 * math.log(2))
    two = control(one, controller, target, jnp.float32(5.0), jnp.array(True), 100)
    average = keep * 20 + (1 - keep) * 5
    error = math.log(average / 10)
    assert float(two.l0) == pytest.approx(average)
    change = 0.05 * error + 0.3 * (error - math.log(2))
    assert float(two.log_factor) == pytest.approx(0.05 * math.log(2) + change, rel=1e-5)


def test_a_slow_noisy_plant_comes_to_its_target_and_stays():
    """L0 follows the coefficient with a delay of 3 % of the run, an elasticity of -1.6 and noise of 5 %."""
    rng, level = np.random.default_rng(0), [math.log(90.0)]

    def l0(log_factor, i):
        level[0] += (math.log(90.0) - 1.6 * log_factor - level[0]) / 60
        return math.exp(level[0] + 0.05 * rng.normal())

    seen, _ = run(32.0, l0, 2000)
    assert abs(seen[600:, 1].mean() - 32) < 0.5
    smooth = np.convolve(seen[:, 1], np.ones(40) / 40, mode="valid")
    assert (np.abs(smooth[600:] - 32) < 2).all()


def test_nothing_moves_before_control_begins_or_without_a_target():
    seen, _ = run(5.0, lambda u, i: 50.0, 40, active=lambda i: i >= 30, controller=Controller(integral=10.0))
    assert (seen[:30, 0] == 0).all()
    assert (np.diff(seen[29:35, 0]) > 0).all()
    seen, state = run(0.0, lambda u, i: 50.0, 10)
    assert (seen[:, 0] == 0).all()
    assert float(state.l0) == pytest.approx(50.0)


def test_the_coefficient_is_bounded_even_where_no_feature_fires():
    seen, _ = run(1e-3, lambda u, i: 0.0, 50, controller=Controller(integral=1e4))
    assert np.isfinite(seen).all()
    assert np.abs(seen[:, 0]).max() <= math.log(MOST) + 1e-6


@dataclass(frozen=True)
class Moved(L1):
    """An L1 autoencoder whose coefficient a controller may move."""

    @property
    def sparsity_coefficient(self):
        return "l1"


def sparse_data(key, rows=256, atoms=24, active=3):
    directions = jax.random.normal(jax.random.key(99), (atoms, D))
    chosen = jax.random.uniform(key, (rows, atoms)).argsort(axis=1)[:, :active]
    return jnp.zeros((rows, atoms)).at[jnp.arange(rows)[:, None], chosen].set(1.0) @ directions


@pytest.mark.parametrize("l1", [0.05, 3.0])
def test_training_comes_to_the_wished_l0_from_either_side(l1):
    dictionary, total = Moved(expansion=2, l1=l1).sized(D), 1500
    optimisation = adam(3e-3)
    settings = settings_for(dictionary, optimisation, 5.0)
    state = init_state(dictionary, optimisation.transform, Normaliser(jnp.zeros(D), jnp.array(1.0)), 0, settings)
    step = make_step(dictionary, optimisation, Schedule(), total, 10_000)
    l0 = []
    for i in range(total):
        state, metrics = step(state, sparse_data(jax.random.key(i)), jnp.ones(256))
        l0.append(float(metrics["l0"]))
    assert step._cache_size() == 1
    assert np.mean(l0[-300:]) == pytest.approx(5.0, abs=0.25)
    assert float(metrics["coefficient"]) == pytest.approx(l1 * math.exp(float(state.control.log_factor)), rel=0.05)


@pytest.mark.parametrize(("target", "begins"), [(1e4, 10), (1e-3, 50)])
def test_control_begins_with_the_warm_up_s_end_or_where_l0_has_fallen_to_the_target(target, begins):
    dictionary, total = L1(expansion=2).sized(D), 100
    optimisation = adam(1e-3)
    settings = settings_for(dictionary, optimisation, target)
    state = init_state(dictionary, optimisation.transform, Normaliser(jnp.zeros(D), jnp.array(1.0)), 0, settings)
    step = make_step(dictionary, optimisation, Schedule(lr_warmup=0.1, coefficient_warmup=0.5), total, 10_000)
    factors = []
    for i in range(60):
        state, _ = step(state, sparse_data(jax.random.key(i)), jnp.ones(256))
        factors.append(float(state.control.log_factor))
    # L0 is far below 1e4, and never as low as 1e-3.
    assert factors.index(next(u for u in factors if u != 0)) == begins


def test_a_dictionary_without_a_coefficient_has_no_target():
    with pytest.raises(InputError, match="pca dictionary has no sparsity coefficient"):
        settings_for(PCA(n_features=4).sized(D), adam(1e-3), 3.0)


@pytest.mark.parametrize("l0", [0.0, -3.0, math.nan])
def test_targets_that_cannot_be(l0):
    with pytest.raises(InputError, match=f"--target-l0 {l0}"):
        check_target(L1(), l0)
    check_target(L1(), None)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [({"average": 0.0}, "average 0.0 of a sparsity controller"), ({"proportional": -1.0}, "0 or more")],
)
def test_controllers_that_cannot_be(fields, shown):
    with pytest.raises(InputError, match=shown):
        Controller(**fields)
