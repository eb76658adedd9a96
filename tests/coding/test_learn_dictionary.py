"""Dictionary learning from rows in memory: beside a plain loop, with a penalty that falls, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax.coding import lasso, objective
from sparse_jax.coding.learn import gradient, online, quadratic, refresh
from sparse_jax.coding.learn_dictionary import falling_penalty, learn_dictionary
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
    by_hand = [4, 4**0.75, 2, 4**0.25, 1, 1, 1, 1]
    np.testing.assert_allclose(falling_penalty(4.0, 1.0, 0.5, 8)[:, 0], by_hand, rtol=1e-6)
    np.testing.assert_allclose(falling_penalty(4.0, 1.0, 0.0, 3)[:, 0], [4, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(falling_penalty(0.3, 0.3, 0.6, 5), 0.3, rtol=1e-6)


solved = jax.jit(lambda rows, W, penalty: lasso(rows, W, penalty, 1e-3).codes)


def plain_loop(x, W, penalties, learner, batch, key, refresh_every):
    """What `learn_dictionary` says it does, step by step."""
    state, silent, per_pass, values, counts = learner.init(W), np.zeros(len(W), int), len(x) // batch, [], []
    for i, penalty in enumerate(penalties):
        order = jax.random.permutation(jax.random.fold_in(key, i // per_pass), len(x))
        rows = x[order[i % per_pass * batch :][:batch]]
        codes = solved(rows, W, penalty)
        values.append(float(jnp.mean(objective(rows, W, penalty, codes))))
        counts.append(float(np.mean(np.sum(np.asarray(codes) > 0, axis=1))))
        silent = np.where(np.any(np.asarray(codes) > 0, axis=0), 0, silent + 1)
        state, W = learner.update(state, W, rows, codes, jnp.ones(batch))
        dead = silent >= refresh_every
        if dead.any():
            again = jax.random.fold_in(jax.random.fold_in(key, i), 1)
            W = refresh(W, jnp.array(dead), rows, codes, jnp.ones(batch), again)
            state, silent = learner.reset(state, jnp.array(dead)), np.where(dead, 0, silent)
    return W, values, counts


@pytest.mark.parametrize("learner", [quadratic(0.1), online(10.0)], ids=["quadratic", "online"])
@pytest.mark.parametrize(
    "given", [0.4, np.full(N, 0.4), falling_penalty(1.0, 0.3, 0.5, 60)], ids=["one", "each", "falls"]
)
def test_the_steps_are_those_of_a_plain_loop(made, learner, given):
    _, x, start = made
    given = jnp.array(given, jnp.float32)
    penalties = given if given.ndim == 2 else jnp.broadcast_to(given, (60, given.size))
    penalties = penalties[:, 0] if penalties.shape[1] == 1 else penalties
    options = {"batch": 64, "key": jax.random.key(0), "refresh_every": 5}
    learned = learn_dictionary(x, start, given, learner, 60, **options)
    for a, b in zip(learned, plain_loop(x, start, penalties, learner, **options)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_features_are_recovered_one_to_one(made):
    truth, x, start = made
    penalty, key = falling_penalty(1.0, 0.1, 0.6, 300), jax.random.key(0)
    learned = learn_dictionary(x, start, penalty, adam(300), 300, batch=100, key=key, refresh_every=50)
    assert hungarian_mean_cosine(truth, np.asarray(start)) < 0.7
    assert hungarian_mean_cosine(truth, np.asarray(learned.W)) > 0.98
    assert learned.objective.shape == learned.l0.shape == (300,)


def test_rows_over_devices(made):
    _, x, start = made
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"batch": 64, "key": jax.random.key(0), "refresh_every": 5}
    one, several = (
        learn_dictionary(x, start, falling_penalty(1.0, 0.3, 0.5, 20), online(10.0), 20, mesh=mesh, **options)
        for mesh in (None, mesh)
    )
    assert several.W.sharding.is_fully_replicated
    # Which rows share a group of the solver is another matter on each, and codes are those of a tolerance.
    np.testing.assert_allclose(one.W, several.W, atol=1e-2)
    np.testing.assert_allclose(one.objective, several.objective, rtol=1e-3)
    with pytest.raises(InputError, match="batch 62 on 4 devices"):
        learn_dictionary(x, start, 1.0, online(), 2, batch=62, key=jax.random.key(0), mesh=mesh)


def test_what_is_refused(made):
    _, x, start = made
    key = jax.random.key(0)
    with pytest.raises(InputError, match=f"batch 9999 of {ROWS} rows"):
        learn_dictionary(x, start, 1.0, online(), 2, batch=9999, key=key)
    with pytest.raises(InputError, match="penalties of 3 steps for 2"):
        learn_dictionary(x, start, jnp.ones((3, 1)), online(), 2, batch=9, key=key)
    with pytest.raises(InputError, match="penalties from 0"):
        falling_penalty(0.0, 1.0, 0.5, 3)
    with pytest.raises(InputError, match=r"share 1\.5"):
        falling_penalty(1.0, 1.0, 1.5, 3)
    assert learn_dictionary(x, start, 1.0, online(), 0, batch=9, key=key).objective.shape == (0,)
