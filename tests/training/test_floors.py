"""The floors as they are handed to the evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser, Statistics
from sparse_jax.dictionaries import L1, Normalised
from sparse_jax.training import fit_floors, reconstructor

D, VOCAB, K, N_FEATURES = 10, 15, 3, 40


@pytest.fixture(scope="module")
def x():
    generator = np.random.default_rng(0)
    return (generator.normal(size=(500, D)) @ generator.normal(size=(D, D)) + 4).astype(np.float32)


@pytest.fixture(scope="module")
def tokens():
    """No token is 0 or above 11."""
    return np.random.default_rng(1).integers(1, 12, 500).astype(np.int32)


@pytest.fixture(scope="module")
def statistics(x, tokens):
    sums, exact = np.zeros((VOCAB, D)), x.astype(np.float64)
    np.add.at(sums, tokens, exact)
    return Statistics(
        tokens=500,
        mean=exact.mean(0),
        covariance=np.cov(exact.T, bias=True),
        median_norm=float(np.median(np.linalg.norm(exact, axis=1))),
        token_sum=sums.astype(np.float32),
        token_count=np.bincount(tokens, minlength=VOCAB),
    )


@pytest.fixture(scope="module")
def floors(statistics, x):
    return fit_floors(statistics, jnp.array(x), K, N_FEATURES, seed=0)


def rebuilt(floor, x, tokens):
    codes = floor.encode(floor.params, x, tokens)
    x_hat, lengths = floor.decode(floor.params, codes, x, tokens)
    return np.asarray(codes), np.asarray(x_hat), np.asarray(lengths)


def test_names_and_sizes(floors, x, tokens):
    widths = {name: rebuilt(floor, x, tokens)[0].shape[1] for name, floor in floors.items()}
    assert widths == {"pca": D, "neurons": D, "random": N_FEATURES, "token_mean": 1}


@pytest.mark.parametrize("name", ["pca", "neurons", "random"])
def test_each_token_uses_k_features_of_unit_length(floors, x, tokens, name):
    codes, x_hat, lengths = rebuilt(floors[name], x, tokens)
    np.testing.assert_array_equal(np.count_nonzero(codes, axis=1), K)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    assert x_hat.shape == x.shape


def test_more_coefficients_than_dimensions(statistics, x, tokens):
    """A dictionary with a large L0 is compared with floors that keep everything they have."""
    floors = fit_floors(statistics, jnp.array(x), 25, N_FEATURES, seed=0)
    for name in ("pca", "neurons"):
        np.testing.assert_allclose(rebuilt(floors[name], x, tokens)[1], x, atol=1e-3)
    assert np.all(np.count_nonzero(rebuilt(floors["random"], x, tokens)[0], axis=1) == 25)


def test_errors_are_in_the_order_they_must_be(floors, x, tokens):
    errors = {name: np.sum((rebuilt(floor, x, tokens)[1] - x) ** 2) for name, floor in floors.items()}
    nothing = np.sum((x - x.mean(0)) ** 2)
    assert errors["pca"] < errors["neurons"] < nothing
    assert errors["random"] < nothing
    # On the tokens they were fitted on, means by token explain a little of anything.
    assert 0.9 * nothing < errors["token_mean"] < nothing


def test_the_random_dictionary_follows_the_seed(statistics, x, tokens):
    codes = [
        rebuilt(fit_floors(statistics, jnp.array(x), K, N_FEATURES, seed)["random"], x, tokens)[0] for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert np.any(codes[0] != codes[2])


def test_token_means(floors, statistics, x, tokens):
    codes, x_hat, lengths = rebuilt(floors["token_mean"], x, tokens)
    np.testing.assert_array_equal(codes, 1)
    np.testing.assert_array_equal(lengths, 1)
    for token in range(1, 12):
        np.testing.assert_allclose(
            x_hat[tokens == token], np.tile(x[tokens == token].mean(0), (np.sum(tokens == token), 1)), rtol=1e-4
        )
    # Tokens that were never seen get the mean of all.
    unseen = np.array([0, 12, 14], np.int32)
    _, x_hat, _ = rebuilt(floors["token_mean"], x[:3], unseen)
    np.testing.assert_allclose(x_hat, np.tile(statistics.mean, (3, 1)), rtol=1e-5)


def test_a_trained_dictionary_as_the_metrics_want_it(x, tokens):
    dictionary = L1(n_features=12).sized(D)
    params = dictionary.init(jax.random.key(0))
    params["W_dec"] = params["W_dec"].at[4].set(0)
    trained = Normalised(dictionary, params, Normaliser(jnp.array(x.mean(0)), jnp.float32(2.5)))
    codes, x_hat, lengths = rebuilt(reconstructor(trained), x, tokens)
    np.testing.assert_array_equal(codes, trained.encode(x))
    np.testing.assert_array_equal(x_hat, trained.reconstruct(x))
    # Raw lengths: unit rows behind a scale of 2.5, and a zero row.
    np.testing.assert_allclose(lengths, np.where(np.arange(12) == 4, 0, 2.5), rtol=1e-5)
