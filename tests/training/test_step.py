"""The step: one compilation, donated state, ages, rows seen, schedules; it learns."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, TopK
from sparse_jax.dictionaries.protocol import HELD, Ramp
from sparse_jax.errors import InputError
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for, total_rows
from sparse_jax.training.schedules import coefficients, learning_rate
from sparse_jax.training.state import count_rows
from sparse_jax.training.step import rate_of

D = 16


def normaliser() -> Normaliser:
    return Normaliser(jnp.full(D, 3.0), jnp.array(2.0))


def sparse_data(key, rows=512, atoms=24, active=3):
    """Sparse combinations of fixed random directions, in raw units."""
    directions = jax.random.normal(jax.random.key(99), (atoms, D))
    chosen = jax.random.uniform(key, (rows, atoms)).argsort(axis=1)[:, :active]
    codes = jnp.zeros((rows, atoms)).at[jnp.arange(rows)[:, None], chosen].set(1.0)
    return 3.0 + 2.0 * codes @ directions


def setup(total=300, rate=3e-3, **fields):
    dictionary = L1(expansion=2, **fields).sized(D)
    optimisation = adam(rate)
    state = init_state(dictionary, optimisation.transform, normaliser(), 0, settings_for(dictionary, optimisation))
    step = make_step(dictionary, optimisation, Schedule(), total, dead_window=2000)
    return dictionary, state, step


@pytest.mark.parametrize("tied", [False, True])
def test_training_lowers_the_error_and_keeps_unit_rows(tied):
    _, state, step = setup(l1=0.5, tied=tied)
    weight = jnp.ones(512)
    first = last = None
    for i in range(300):
        state, metrics = step(state, sparse_data(jax.random.key(i)), weight)
        first = first or float(metrics["fvu"])
        last = float(metrics["fvu"])
    assert last < 0.25 * first
    assert last < 0.2
    np.testing.assert_allclose(np.linalg.norm(state.params["W_dec"], axis=1), 1, atol=1e-5)


def test_the_step_compiles_once_and_consumes_its_state():
    _, state, step = setup()
    before = state
    for i in range(4):
        state, _ = step(state, sparse_data(jax.random.key(i)), jnp.ones(512))
    assert step._cache_size() == 1
    assert before.params["W_dec"].is_deleted()


def test_what_the_settings_say_is_traced():
    """Other coefficients, rates and targets run in the same program, and do what they say."""
    dictionary, _, step = setup()
    before = np.array(dictionary.init(jax.random.fold_in(jax.random.key(0), 0))["b_enc"])
    step, seen = make_step(dictionary, adam(7.0), Schedule(0.0, 0.0, 0.0), 10, 100), {}
    for l1, rate, target in ((0.5, 1e-2, None), (50.0, 1e-2, None), (0.5, 1e-3, None), (0.5, 1e-2, 3.0)):
        other = replace(dictionary, l1=l1)
        state = init_state(dictionary, adam(1.0).transform, normaliser(), 0, settings_for(other, adam(rate), target))
        for i in range(3):
            state, metrics = step(state, sparse_data(jax.random.key(i)), jnp.ones(512))
            if i == 0:
                moved = np.abs(np.array(state.params["b_enc"]) - before)
                np.testing.assert_allclose(moved[moved > 0], rate, rtol=1e-3)
        seen[l1, rate, target] = {name: float(value) for name, value in metrics.items()}
        assert (seen[l1, rate, target]["coefficient"] > 1.001 * l1) == (target is not None)
        assert seen[l1, rate, target]["learning_rate"] == pytest.approx(rate)
    assert seen[50.0, 1e-2, None]["l1"] > 20 * seen[0.5, 1e-2, None]["l1"]
    assert step._cache_size() == 1


def test_a_normaliser_and_settings_serve_several_states():
    dictionary, _, step = setup()
    shared, settings = normaliser(), settings_for(dictionary, adam(1e-3))
    for seed in (0, 1):
        state = init_state(dictionary, adam(1.0).transform, shared, seed, settings)
        step(state, sparse_data(jax.random.key(0)), jnp.ones(512))
    assert float(shared.scale) == 2.0
    assert float(settings.learning_rate) == pytest.approx(1e-3)


def test_settings_for_another_dictionary_are_refused():
    with pytest.raises(InputError, match=r"\['l1'\]: a topk dictionary has \['aux_k', 'k_now'\]"):
        init_state(TopK().sized(D), adam(1.0).transform, normaliser(), 0, settings_for(L1(), adam(1e-3)))


def test_masked_rows_change_nothing():
    x = sparse_data(jax.random.key(0))
    weight = jnp.ones(512).at[100:].set(0)
    results = []
    for filler in (0.0, 1e6):
        _, state, step = setup()
        state, metrics = step(state, x.at[100:].set(filler), weight)
        results.append((state, metrics))
    (one, metrics_one), (two, metrics_two) = results
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.age, two.age)
    for name in metrics_one:
        np.testing.assert_array_equal(metrics_one[name], metrics_two[name])
    assert total_rows(one.rows_seen) == 100


def test_ages_count_rows_since_a_feature_fired():
    dictionary, state, step = setup()
    silent = jnp.zeros(dictionary.n_features).at[5].set(-1e6)
    state.params["b_enc"] = silent
    for i in range(3):
        state, metrics = step(state, sparse_data(jax.random.key(i)), jnp.ones(512))
    assert int(state.age[5]) == 3 * 512
    assert float(metrics["dead"]) == 0
    state, metrics = step(state, sparse_data(jax.random.key(9)), jnp.ones(512))
    assert int(state.age[5]) == 2048
    assert float(metrics["dead"]) == pytest.approx(np.mean(np.asarray(state.age) > 2000))
    assert float(metrics["dead"]) > 0


def test_the_first_adam_step_has_the_size_of_the_learning_rate():
    dictionary, state, _ = setup(rate=1e-2)
    step = make_step(dictionary, adam(7.0), Schedule(0.0, 0.0, 0.0), 10, 100)  # the rate is the state's
    before = np.array(state.params["b_enc"])
    state, metrics = step(state, sparse_data(jax.random.key(0)), jnp.ones(512))
    moved = np.abs(np.array(state.params["b_enc"]) - before)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)
    np.testing.assert_allclose(moved[moved > 0], 1e-2, rtol=1e-3)


def test_schedules_are_shares_of_the_run():
    schedule = Schedule(lr_warmup=0.1, lr_decay=0.2, coefficient_warmup=0.5)
    rate = [float(learning_rate(schedule, 100)(step)) for step in range(100)]
    assert rate[0] == pytest.approx(0.1)
    assert rate[9] == rate[50] == rate[80] == 1.0
    assert rate[99] == pytest.approx(0.05)
    ramp = [float(coefficients(L1(), schedule, 100)(step, {"l1": 2.0})["l1"]) for step in range(100)]
    assert ramp[0] == pytest.approx(0.04)
    assert ramp[48] < 2.0
    assert ramp[49] == ramp[99] == 2.0


@dataclass(frozen=True)
class Ramps(L1):
    """Three coefficients, each on another ramp."""

    @property
    def coefficients(self):
        return {"k": 32.0, "p": 0.25, "l1": 1.0}

    @property
    def ramps(self):
        return {"k": HELD, "p": Ramp(1.0, begin=0.2, end=0.6)}


def test_coefficients_come_to_their_values_on_ramps_of_their_own():
    at = coefficients(Ramps(), Schedule(coefficient_warmup=0.1), 100)
    peaks = Ramps().coefficients
    values = {name: [float(at(step, peaks)[name]) for step in range(100)] for name in ("k", "p", "l1")}
    assert set(values["k"]) == {32.0}
    assert values["p"][:20] == [1.0] * 20
    assert values["p"][20] == pytest.approx(1 - 0.75 / 40)
    assert values["p"][39] == pytest.approx(1 - 0.75 / 2)
    np.testing.assert_allclose(values["p"][59:], 0.25, rtol=1e-6)
    np.testing.assert_allclose(values["l1"][:10], np.arange(1, 11) / 10, rtol=1e-6)


@dataclass(frozen=True)
class Groups(L1):
    """Biases in a group of their own."""

    @property
    def labels(self):
        return {"b_enc": "bias"}

    @property
    def group_factors(self):
        return {"bias": 3.0}


def test_learning_rates_of_groups():
    assert rate_of(Groups(), "W_enc", {}, 0.1) == 0.1
    assert rate_of(Groups(), "b_enc", {}, 0.1) == pytest.approx(0.3)
    assert rate_of(Groups(), "b_enc", {"bias": 0.7}, 0.1) == 0.7
    assert rate_of(L1(), "b_enc", {}, 0.1) == 0.1


@pytest.mark.parametrize("fields", [{"lr_warmup": -0.1}, {"lr_decay": 1.5}, {"lr_warmup": 0.6, "lr_decay": 0.6}])
def test_impossible_schedules_are_refused(fields):
    with pytest.raises(InputError):
        Schedule(**fields)


def test_rows_are_counted_beyond_int32():
    seen = jnp.array([5000, 999_000], jnp.int32)
    assert total_rows(count_rows(seen, jnp.array(4096, jnp.int32))) == 5_000_999_000 + 4096
