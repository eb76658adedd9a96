"""Annealed dictionary learning: penalties by hand, the same atoms as `learn_dictionary`, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax.coding.annealed import learn_annealed, penalties
from sparse_jax.coding.learn import gradient, learn_dictionary, online, quadratic
from sparse_jax.errors import InputError
from sparse_jax.metrics import hungarian_mean_cosine
from tests.coding import problems

ROWS, D, N = 1600, 16, 24


def adam(steps):
    return gradient(optax.adam(optax.cosine_decay_schedule(3e-2, steps)))


@pytest.fixture(scope="module")
def made():
    """Rows of 4 active features each, of a known dictionary, and atoms to begin with."""
    generator = np.random.default_rng(0)
    truth, start = (problems.unit(generator.normal(size=(N, D))) for _ in range(2))
    codes = np.zeros((ROWS, N))
    for row in codes:
        row[generator.choice(N, 4, replace=False)] = generator.uniform(0.5, 1.5, 4)
    return truth, jnp.array(codes @ truth, jnp.float32), jnp.array(start, jnp.float32)


def test_penalties_by_hand():
    np.testing.assert_allclose(penalties(4.0, 1.0, 0.5, 8), [4, 4**0.75, 2, 4**0.25, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(penalties(4.0, 1.0, 0.0, 3), [4, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(penalties(0.3, 0.3, 0.6, 5), 0.3, rtol=1e-6)


@pytest.mark.parametrize("learner", [quadratic(0.1), online(10.0)], ids=["quadratic", "online"])
def test_a_constant_penalty_is_plain_dictionary_learning(made, learner):
    _, x, start = made
    options = {"batch": 64, "key": jax.random.key(0), "refresh_every": 5}
    plain = learn_dictionary(x, start, 0.4, learner, 60, **options)
    scanned = learn_annealed(x, start, jnp.full(60, 0.4), learner, **options)
    for a, b in zip(plain, scanned):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_features_are_recovered_one_to_one(made):
    truth, x, start = made
    learned = learn_annealed(
        x, start, penalties(1.0, 0.1, 0.6, 300), adam(300), batch=100, key=jax.random.key(0), refresh_every=50
    )
    assert hungarian_mean_cosine(truth, np.asarray(start)) < 0.7
    assert hungarian_mean_cosine(truth, np.asarray(learned.W)) > 0.98
    assert learned.objective.shape == learned.l0.shape == (300,)


def test_rows_over_devices(made):
    _, x, start = made
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"batch": 64, "key": jax.random.key(0), "refresh_every": 5}
    one, several = (
        learn_annealed(x, start, penalties(1.0, 0.3, 0.5, 20), online(10.0), mesh=mesh, **options)
        for mesh in (None, mesh)
    )
    assert several.W.sharding.is_fully_replicated
    # Which rows share a group of the solver is another matter on each, and codes are those of a tolerance.
    np.testing.assert_allclose(one.W, several.W, atol=1e-2)
    np.testing.assert_allclose(one.objective, several.objective, rtol=1e-3)
    with pytest.raises(InputError, match="batch 62 on 4 devices"):
        learn_annealed(x, start, jnp.ones(2), online(), batch=62, key=jax.random.key(0), mesh=mesh)


def test_what_is_refused(made):
    _, x, start = made
    with pytest.raises(InputError, match=f"batch 9999 of {ROWS} rows"):
        learn_annealed(x, start, jnp.ones(2), online(), batch=9999, key=jax.random.key(0))
    with pytest.raises(InputError, match="penalties from 0"):
        penalties(0.0, 1.0, 0.5, 3)
    with pytest.raises(InputError, match=r"share 1\.5"):
        penalties(1.0, 1.0, 1.5, 3)
    assert learn_annealed(x, start, jnp.ones(0), online(), batch=9, key=jax.random.key(0)).objective.shape == (0,)
