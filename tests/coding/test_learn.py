"""Learners: one update by hand, and the dictionary that made the data is found again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_jax.coding import objective
from sparse_jax.coding.learn import Learner, gradient, online, quadratic, refresh
from sparse_jax.coding.learn_dictionary import learn_dictionary
from tests.coding import problems
from tests.coding.test_fista import arrays

ROWS, D, N = 2000, 16, 24


@pytest.fixture(scope="module")
def made():
    """Rows of 3 active features each, of a known dictionary."""
    generator = np.random.default_rng(0)
    truth = problems.unit(generator.normal(size=(N, D)))
    codes = np.zeros((ROWS, N))
    for row in codes:
        row[generator.choice(N, 3, replace=False)] = generator.uniform(0.5, 1.5, 3)
    return truth, jnp.array(codes @ truth + 0.01 * generator.normal(size=(ROWS, D)), jnp.float32)


def mean_max_cosine(one, other):
    return np.mean(np.max(np.asarray(one) @ np.asarray(other).T, axis=1))


@pytest.mark.parametrize(
    ("learner", "steps"),
    [(quadratic(0.5), 300), (online(10.0), 250), (gradient(optax.adam(1e-2)), 600)],
    ids=["quadratic", "online", "gradient"],
)
def test_known_features_are_recovered(made, learner, steps):
    truth, x = made
    start = jnp.array(problems.unit(np.random.default_rng(1).normal(size=(N, D))), jnp.float32)
    learned = learn_dictionary(x, start, 0.2, learner, steps, batch=100, key=jax.random.key(0), refresh_every=40)
    np.testing.assert_allclose(np.linalg.norm(learned.W, axis=1), 1, atol=1e-5)
    assert mean_max_cosine(truth, start) < 0.7
    assert mean_max_cosine(truth, learned.W) > 0.98
    assert mean_max_cosine(learned.W, truth) > 0.95
    assert np.mean(learned.objective[-10:]) < 0.4 * learned.objective[0]
    assert learned.l0.shape == (steps,)


def test_quadratic_by_hand():
    """A first batch: the average is corrected to the batch's own mean of squares, 2.5 and 0."""
    learner = quadratic(rate=1.0, history=10, lowest=0.5)
    W = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    x, codes = jnp.array([[1.0, 1.0], [2.0, 2.0]]), jnp.array([[1.0, 0.0], [2.0, 0.0]])
    (average, count), moved = learner.update(learner.init(W), W, x, codes, jnp.ones(2))
    np.testing.assert_allclose(average, [0.25, 0.0], rtol=1e-6)
    assert count == 1
    # Residuals (0, 1) and (0, 2): mean of c r is (0, 2.5), over 2.5 + 0.5; then back to norm 1.
    np.testing.assert_allclose(moved[0], np.array([1, 2.5 / 3]) / np.hypot(1, 2.5 / 3), rtol=1e-6)
    np.testing.assert_array_equal(moved[1], W[1])


def test_online_is_coordinate_descent_on_all_batches(x64):
    """Many passes on two batches, nothing forgotten, reach the atoms that are best on unit spheres one by one."""
    generator = np.random.default_rng(0)
    W = jnp.array(problems.unit(generator.normal(size=(4, 6))))
    batches = [arrays(generator.normal(size=(20, 6)), np.abs(generator.normal(size=(20, 4)))) for _ in range(2)]
    learner = online(rho=0.0, passes=200)
    state = learner.init(W)
    for x, codes in batches:
        state, W = learner.update(state, W, x, codes, jnp.ones(20))
    A, B = (sum(terms) for terms in zip(*((c.T @ c, c.T @ x) for x, c in batches)))
    np.testing.assert_allclose(state[0], A)
    np.testing.assert_allclose(state[1], B)
    for j in range(4):  # no atom can be moved alone
        best = B[j] - A[j] @ W + A[j, j] * W[j]
        np.testing.assert_allclose(W[j], best / jnp.linalg.norm(best), atol=1e-8)


@pytest.mark.parametrize("learner", [quadratic(), online(), gradient(optax.sgd(0.1))], ids=["q", "o", "g"])
def test_masked_rows_change_nothing(learner: Learner):
    generator = np.random.default_rng(0)
    W = jnp.array(problems.unit(generator.normal(size=(4, 6))), jnp.float32)
    x, codes = arrays(generator.normal(size=(8, 6)), np.abs(generator.normal(size=(8, 4))), dtype=jnp.float32)
    weight = jnp.array([1.0, 1, 1, 1, 1, 0, 0, 0])
    made = learner.update(learner.init(W), W, x, codes, weight)
    other = learner.update(learner.init(W), W, x.at[5:].set(7.0), codes.at[5:].set(3.0), weight)
    jax.tree.map(np.testing.assert_array_equal, made, other)
    assert np.any(made[1] != W)


def test_the_gradient_with_codes_fixed_is_that_of_the_minimum(x64):
    """Danskin: a small step along it lowers the solved objective at the rate that its length says."""
    from sparse_jax.coding import fista_until

    x, W = problems.coherent(rows=20, d=6, n=9)
    W = problems.unit(W)

    def least(W):
        given = arrays(x, W, 0.3)
        return float(jnp.mean(objective(*given, fista_until(*given, 1e-13, measure="kkt").codes)))

    given = arrays(x, W, 0.3)
    codes = fista_until(*given, 1e-13, measure="kkt").codes
    grad = np.asarray(2 * codes.T @ (codes @ given[1] - given[0]) / 20)
    direction = np.random.default_rng(3).normal(size=W.shape)
    slope = (least(W + 1e-6 * direction) - least(W - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(np.sum(grad * direction), slope, rtol=1e-6)


def test_dead_atoms_become_what_is_left():
    W = jnp.eye(3)
    x = jnp.array([[1.0, 0.0, 0.0], [0.0, 3.0, 3.0], [0.0, 0.0, 5.0], [9.0, 9.0, 9.0]])
    codes = jnp.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 5.0], [0, 0, 0]])
    dead, weight = jnp.array([False, True, False]), jnp.array([1.0, 1, 1, 0])
    made = refresh(W, dead, x, codes, weight, jax.random.key(0))
    np.testing.assert_allclose(made[1], np.array([0, 1, 1]) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_array_equal(made[jnp.array([0, 2])], W[jnp.array([0, 2])])
    np.testing.assert_array_equal(refresh(W, dead, x, codes, jnp.zeros(4), jax.random.key(0)), W)


@pytest.mark.parametrize("learner", [quadratic(), online(), gradient(optax.adam(0.1))], ids=["q", "o", "g"])
def test_what_is_known_of_an_atom_can_be_forgotten(learner: Learner):
    generator = np.random.default_rng(0)
    W = jnp.array(problems.unit(generator.normal(size=(4, 6))), jnp.float32)
    x, codes = arrays(generator.normal(size=(8, 6)), 1 + generator.random((8, 4)), dtype=jnp.float32)
    state, _ = learner.update(learner.init(W), W, x, codes, jnp.ones(8))
    which = jnp.array([False, True, False, False])
    for before, after in zip(*map(jax.tree.leaves, (state, learner.reset(state, which)))):
        if before.ndim == 2:  # statistics or moments
            assert np.all(after[1] == 0)
            assert np.all(before[1] != 0)
            others = jnp.array([0, 2, 3]), jnp.array([0, 2, 3])
            np.testing.assert_array_equal(after[others], before[others])
        elif before.ndim == 1:  # curvature: the mean of the others'
            np.testing.assert_allclose(after[1], np.mean(before[jnp.array([0, 2, 3])]), rtol=1e-6)
        if before.shape == (4, 4):  # products of two atoms' codes
            assert np.all(after[:, 1] == 0)
