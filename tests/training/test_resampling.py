"""Resampling: which features, from which inputs, to what; moments and biases; dead features come back to life."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, PCA
from sparse_jax.errors import InputError
from sparse_jax.training import Schedule, adam, init_state, make_step, settings_for
from sparse_jax.training.resampling import ENCODER_SHARE, Resampling, feature_axis, make_resample

D, N = 8, 12
DEAD = np.isin(np.arange(N), [1, 4, 5, 11])


def trained(dictionary=None, steps=3, rate=1e-2):
    """A state after some steps, with four features silent for long and moments in the optimiser."""
    dictionary = dictionary or L1(n_features=N).sized(D)
    optimisation = adam(rate)
    normaliser = Normaliser(jnp.full(D, 3.0), jnp.array(2.0))
    state = init_state(dictionary, optimisation.transform, normaliser, 0, settings_for(dictionary, optimisation))
    step = make_step(dictionary, optimisation, Schedule(), 100, dead_window=500)
    for i in range(steps):
        state, _ = step(state, raw(i), jnp.ones(64))
    return dictionary, replace(state, age=jnp.where(jnp.array(DEAD), 501, 500))


def raw(seed, rows=64):
    return 3 + 2 * jnp.array(np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32))


def copied(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize("tied", [False, True])
def test_only_dead_features_change_and_how(tied):
    dictionary, state = trained(L1(n_features=N, tied=tied).sized(D))
    before, x = copied(state.params), raw(9)
    after, count = make_resample(dictionary, 500)(state, x, jnp.ones(64))
    params = copied(after.params)
    assert int(count) == DEAD.sum()
    for name in before:
        axis = feature_axis(dictionary, name, before[name].shape)
        if axis is None:
            np.testing.assert_array_equal(params[name], before[name])
            continue
        kept = np.compress(~DEAD, before[name], axis)
        np.testing.assert_array_equal(np.compress(~DEAD, params[name], axis), kept)
    # Each new decoder row is the direction of one input from the decoder bias, none used twice.
    inputs = (np.asarray(x) - 3) / 2 - before["b_dec"]
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    similarity = params["W_dec"][DEAD] @ inputs.T
    np.testing.assert_allclose(similarity.max(1), 1, atol=1e-5)
    assert len(set(similarity.argmax(1))) == DEAD.sum()
    assert (params["b_enc"][DEAD] == 0).all()
    np.testing.assert_array_equal(after.age, np.where(DEAD, 0, 500))
    if not tied:
        alive = np.linalg.norm(before["W_enc"].T[~DEAD], axis=1).mean()
        np.testing.assert_allclose(params["W_enc"].T[DEAD], ENCODER_SHARE * alive * params["W_dec"][DEAD], rtol=1e-4)


def test_moments_of_dead_features_are_zero_and_no_others():
    dictionary, state = trained()
    before = jax.tree_util.tree_flatten_with_path(copied(state.opt_state))[0]
    after = make_resample(dictionary, 500)(state, raw(9), jnp.ones(64))[0]
    checked = 0
    for (path, old), new in zip(before, jax.tree.leaves(copied(after.opt_state)), strict=True):
        names = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        axis = feature_axis(dictionary, names[-1], old.shape) if names else None
        if axis is None:
            np.testing.assert_array_equal(new, old)
            continue
        checked += 1
        np.testing.assert_array_equal(np.compress(~DEAD, new, axis), np.compress(~DEAD, old, axis))
        assert (np.compress(DEAD, new, axis) == 0).all()
        assert (np.compress(~DEAD, old, axis) != 0).any()
    assert checked == 6  # first and second moments of W_enc, b_enc, W_dec


def test_inputs_are_drawn_by_their_squared_loss():
    """Two kinds of inputs, of which the second has three times the loss: nine times as likely."""
    dictionary, state = trained()
    zero = jax.tree.map(jnp.zeros_like, state.params)  # reconstructs 0: the loss is the squared length
    state = replace(state, params=zero, age=jnp.full(N, 501).at[1:].set(0))
    lengths = np.sqrt([1.0, 3.0])
    axes = np.eye(D)[np.arange(40) % 2] * lengths[np.arange(40) % 2][:, None]
    x, resample = jnp.array(3 + 2 * axes, jnp.float32), make_resample(dictionary, 500)
    seconds = 0
    for i in range(400):
        fresh = jax.tree.map(jnp.copy, replace(state, key=jax.random.key(i)))
        seconds += float(resample(fresh, x, jnp.ones(40))[0].params["W_dec"][0, 1]) > 0.99
    assert seconds / 400 == pytest.approx(0.9, abs=0.05)


def test_masked_inputs_are_never_drawn():
    dictionary, state = trained()
    weight = jnp.arange(64) < 2
    x = jnp.where(weight[:, None], raw(9), 1e15)
    after = make_resample(dictionary, 500)(state, x, weight.astype(jnp.float32))[0]
    assert len(np.unique(np.asarray(after.params["W_dec"])[DEAD].round(4), axis=0)) == 2
    assert np.isfinite(np.asarray(after.params["W_dec"])).all()


def test_where_nothing_counts_or_nothing_is_dead_nothing_changes():
    dictionary, state = trained()
    for weight, age in ((jnp.zeros(64), state.age), (jnp.ones(64), jnp.zeros(N, jnp.int32))):
        given = jax.tree.map(jnp.copy, replace(state, age=age))
        before = copied((given.params, given.opt_state, given.age))
        after, count = make_resample(dictionary, 500)(given, raw(9), weight)
        assert int(count) == 0
        jax.tree.map(np.testing.assert_array_equal, copied((after.params, after.opt_state, after.age)), before)


def test_features_dead_by_construction_fire_after_resampling():
    """A fifth of the encoders can never fire; after one resampling and some steps at least half of them do."""
    dictionary, state = trained(L1(n_features=40, l1=0.3).sized(D), steps=0, rate=3e-3)
    dead = jnp.arange(40) < 8
    params = {**state.params, "b_enc": jnp.where(dead, -1e6, state.params["b_enc"])}
    state = replace(state, params=params, age=jnp.zeros(40, jnp.int32))
    step = make_step(dictionary, adam(3e-3), Schedule(), 500, dead_window=500)
    fired = np.zeros(40)
    for i in range(500):
        state, _ = step(state, raw(i), jnp.ones(64))
        if i == 60:
            assert (np.asarray(state.age)[:8] > 500).all()
            state, count = make_resample(dictionary, 500)(state, raw(1000, 256), jnp.ones(256))
            assert int(count) >= 8
        if i > 400:
            fired += np.asarray(state.age) == 0
    assert (fired[:8] > 0).sum() >= 4


def test_when_and_what_cannot_be_resampled():
    assert Resampling().steps(200_000) == {25_000, 50_000, 75_000, 100_000}
    assert Resampling((0.5,)).steps(1) == {1}
    with pytest.raises(InputError, match="shares of the run between 0 and 1"):
        Resampling((1.5,))
    with pytest.raises(InputError, match="positive"):
        Resampling(rows=0)
    with pytest.raises(InputError, match="cannot be resampled"):
        make_resample(L1(n_features=4).sized(D, 3), 10)
    assert PCA(n_features=4).sized(D)  # its rows could be, but it is never trained
