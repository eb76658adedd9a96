"""Adam's proximal step: the optimum of the penalised problem, not of another one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax.connectors.proximal import B1, EPS, init_adam, proximal_adam, soft

ALPHA = 0.3


@pytest.fixture
def problem():
    """A lasso problem in which three of twelve inputs matter: mean of (x w - y)^2 + alpha |w|_1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)) * np.exp(rng.normal(size=12))
    w = np.zeros(12)
    w[[1, 4, 7]] = 1.0, -2.0, 0.7
    y = x @ w + 0.1 * rng.normal(size=400)
    return x.T @ x / 400, x.T @ y / 400


def lasso_by_coordinates(gram, cross, sweeps=3000):
    w = np.zeros(len(cross))
    for _ in range(sweeps):
        for i in range(len(w)):
            rest = cross[i] - gram[i] @ w + gram[i, i] * w[i]
            w[i] = np.sign(rest) * max(abs(rest) - ALPHA / 2, 0) / gram[i, i]
    return w


def descend(gram, cross, take, steps=4000):
    """Weights after steps at a falling rate; the gradient is noisy, as that of batches is."""
    gram, cross = jnp.array(gram, jnp.float32), jnp.array(cross, jnp.float32)
    noise = jnp.linspace(0.01, 2, len(cross), dtype=jnp.float32)

    def body(i, carry):
        w, state = carry
        count = (i + 1).astype(jnp.float32)
        g = 2 * (gram @ w["w"] - cross)
        g = g + noise * jax.random.normal(jax.random.fold_in(jax.random.key(0), i), g.shape)
        falling = (1 - count / (steps + 1)) ** 2
        b1 = 1 - (1 - B1) * jnp.maximum(falling, 400 / steps)
        return take(w, {"w": g}, state, count, 0.02 * falling, b1)

    start = {"w": jnp.zeros(len(cross), jnp.float32)}
    return np.asarray(jax.lax.fori_loop(0, steps, body, (start, init_adam(start)))[0]["w"], np.float64)


def proper(w, g, state, count, rate, b1):
    return proximal_adam(w, g, state, count, rate, {"w": jnp.float32(ALPHA)}, b1)


def plain(w, g, state, count, rate, b1):
    """The wrong step: lr x alpha for each weight."""
    moved, state = proximal_adam(w, g, state, count, rate, {}, b1)
    return {"w": soft(moved["w"], rate * ALPHA)}, state


def test_it_rests_at_the_lasso_optimum(problem):
    best = lasso_by_coordinates(*problem)
    found = descend(*problem, proper)
    np.testing.assert_allclose(found, best, atol=0.02)
    g = 2 * (problem[0] @ found - problem[1])
    on = found != 0
    np.testing.assert_array_equal(on, best != 0)  # exact zeros, where they belong
    np.testing.assert_allclose(g[on], -ALPHA * np.sign(found[on]), atol=0.08)
    assert np.all(np.abs(g[~on]) <= ALPHA * 1.02)


def test_a_plain_threshold_solves_another_problem(problem):
    best = lasso_by_coordinates(*problem)
    assert np.abs(descend(*problem, plain) - best).max() > 0.1


def test_without_a_penalty_it_is_adam():
    rng = np.random.default_rng(1)
    w = {"a": jnp.array(rng.normal(size=(3, 2)), jnp.float32), "b": jnp.array(rng.normal(size=2), jnp.float32)}
    ours, state = w, init_adam(w)
    adam = optax.adam(0.01, eps=EPS)
    theirs, opt_state = w, adam.init(w)
    for i in range(5):
        g = jax.tree.map(lambda a: jnp.array(rng.normal(size=a.shape), jnp.float32), w)
        ours, state = proximal_adam(ours, g, state, jnp.float32(i + 1), jnp.float32(0.01), {})
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = adam.update(g, opt_state)
            theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
