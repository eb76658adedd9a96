"""The floors: PCA and neurons against NumPy and scikit-learn, the random dictionary's one fitted number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import PCA, Neurons, RandomDictionary

D = 12


@pytest.fixture(scope="module")
def x():
    """Correlated gaussian data with a mean far from zero."""
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(D, D)) * np.geomspace(3, 0.1, D)[:, None]
    return (generator.normal(size=(2000, D)) @ mixing + 5 * generator.normal(size=D)).astype(np.float32)


@pytest.fixture(scope="module")
def moments(x):
    exact = x.astype(np.float64)
    return jnp.array(exact.mean(0), jnp.float32), jnp.array(np.cov(exact.T, bias=True), jnp.float32)


def sized(architecture, k, n_features=D):
    return architecture(k=k, n_features=n_features).sized(D)


def error(dictionary, params, x):
    return float(jnp.sum((dictionary.decode(params, dictionary.encode(params, x)) - x) ** 2))


def test_pca_directions_are_sorted_principal_components(x, moments):
    dictionary = sized(PCA, 3)
    params = dictionary.fit(*moments)
    W = np.asarray(dictionary.directions(params))
    np.testing.assert_allclose(W @ W.T, np.eye(D), atol=1e-5)
    variances = (x @ W.T).astype(np.float64).var(axis=0)
    assert np.all(np.diff(variances) < 0)
    values, vectors = np.linalg.eigh(np.cov(x.T.astype(np.float64), bias=True))
    np.testing.assert_allclose(variances, values[::-1], rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.sum(W * vectors.T[::-1], axis=1)), 1, atol=1e-4)


@pytest.mark.torch  # with the other peers
def test_pca_is_scikit_learns(x, moments):
    decomposition = pytest.importorskip("sklearn.decomposition")
    theirs = decomposition.PCA().fit(x.astype(np.float64))
    params = sized(PCA, D).fit(*moments)
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(params["W_dec"]) * theirs.components_, axis=1)), 1, atol=1e-4)
    codes = sized(PCA, D).encode(params, x)
    np.testing.assert_allclose(np.abs(codes), np.abs(theirs.transform(x.astype(np.float64))), atol=2e-3)


@pytest.mark.parametrize("k", [D, D + 5])
def test_all_components_reconstruct_exactly(x, moments, k):
    for dictionary, params in (
        (sized(PCA, k), sized(PCA, k).fit(*moments)),
        (sized(Neurons, k), sized(Neurons, k).fit(moments[0])),
    ):
        np.testing.assert_allclose(dictionary.decode(params, dictionary.encode(params, x)), x, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_each_row_keeps_its_k_largest_coefficients_with_their_sign(x, moments, k):
    dictionary = sized(PCA, k)
    params = dictionary.fit(*moments)
    every = sized(PCA, D).encode(params, x)
    codes = np.asarray(dictionary.encode(params, x))
    np.testing.assert_array_equal(np.count_nonzero(codes, axis=1), k)
    np.testing.assert_array_equal(codes, np.where(codes != 0, every, 0))
    dropped = np.abs(np.where(codes != 0, 0, every)).max(axis=1)
    assert np.all(np.where(codes != 0, np.abs(codes), np.inf).min(axis=1) >= dropped)
    assert (codes < 0).any()
    # Components are orthogonal: the error is what was dropped.
    np.testing.assert_allclose(error(dictionary, params, x), np.sum(np.square(every - codes)), rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_pca_beats_neurons_on_correlated_data(x, moments, k):
    pca, neurons = sized(PCA, k), sized(Neurons, k)
    assert error(pca, pca.fit(*moments), x) < 0.8 * error(neurons, neurons.fit(moments[0]), x)


def test_neurons_by_hand():
    dictionary = Neurons(k=1, n_features=2).sized(2)
    params = dictionary.fit(jnp.array([1.0, 1.0]))
    x = jnp.array([[3.0, 0.0], [1.0, -4.0]])
    np.testing.assert_array_equal(dictionary.encode(params, x), [[2, 0], [0, -5]])
    np.testing.assert_array_equal(dictionary.decode(params, dictionary.encode(params, x)), [[3, 1], [1, -4]])


@pytest.mark.parametrize("k", [2, 8])
def test_the_random_gain_is_the_least_squares_one(x, moments, k):
    dictionary = sized(RandomDictionary, k, n_features=40)
    params = dictionary.fit(jax.random.key(0), moments[0], x)
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 1, rtol=1e-5)
    # By another route, in float64: regress x - mean on the reconstruction without a gain.
    plain = {**params, "gain": jnp.ones(())}
    unscaled = np.asarray(dictionary.encode(plain, x) @ params["W_dec"], np.float64)
    centred = x.astype(np.float64) - np.asarray(moments[0], np.float64)
    best = np.linalg.lstsq(unscaled.reshape(-1, 1), centred.reshape(-1), rcond=None)[0][0]
    np.testing.assert_allclose(params["gain"], best, rtol=1e-4)
    here = error(dictionary, params, x)
    for factor in (0.95, 1.05):
        assert error(dictionary, {**params, "gain": params["gain"] * factor}, x) > here
    other = dictionary.fit(jax.random.key(1), moments[0], x)
    assert np.any(other["W_dec"] != params["W_dec"])


def test_nothing_is_trained(x, moments):
    from sparse_jax.dictionaries import Batch, Context

    dictionary = sized(PCA, 3)
    params = dictionary.fit(*moments)
    here = Context({}, jnp.zeros(D, jnp.int32), jax.random.key(0), jnp.int32(0), jnp.int32(1000))
    value, losses, grads = dictionary.value_and_grad(params, Batch(x, x, jnp.ones(len(x))), here)
    assert grads == {}
    np.testing.assert_allclose(value, error(dictionary, params, x) / len(x), rtol=1e-4)
    for name in dictionary.frozen:
        np.testing.assert_array_equal(losses.frozen[name], params[name])
