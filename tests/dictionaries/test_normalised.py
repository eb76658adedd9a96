"""A dictionary behind its normaliser works in raw units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, PCA, Normalised


@pytest.fixture
def trained():
    dictionary = L1(n_features=6).sized(4)
    generator = np.random.default_rng(0)
    params = {
        name: value + jnp.array(0.2 * generator.normal(size=value.shape), jnp.float32)
        for name, value in dictionary.init(jax.random.key(0)).items()
    }
    return Normalised(dictionary, params, Normaliser(jnp.array([5.0, -3.0, 0.0, 100.0]), jnp.float32(2.5)))


@pytest.fixture
def x(trained):
    noise = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)
    return trained.normaliser.centre + 2.5 * noise


def test_encode_and_decode_by_hand(trained, x):
    params = {name: np.asarray(value) for name, value in trained.params.items()}
    centre, scale = np.asarray(trained.normaliser.centre), 2.5
    inner = (np.asarray(x) - centre) / scale
    codes = np.maximum((inner - params["b_dec"]) @ params["W_enc"] + params["b_enc"], 0)
    x_hat = (codes @ params["W_dec"] + params["b_dec"]) * scale + centre
    np.testing.assert_allclose(trained.encode(x), codes, atol=1e-4)
    np.testing.assert_allclose(trained.decode(jnp.array(codes), x), x_hat, atol=1e-4)
    np.testing.assert_allclose(trained.reconstruct(x), x_hat, atol=1e-4)
    np.testing.assert_allclose(trained.directions(), params["W_dec"] * scale, rtol=1e-6)


def test_ablating_a_feature_takes_away_its_code_times_its_direction(trained, x):
    """x - c_f d_f in raw units, whatever the error term is: the normaliser's centre and b_dec drop out."""
    codes, directions = trained.encode(x), trained.directions()
    assert np.count_nonzero(codes) > 20
    for feature in range(6):
        without = trained.decode(codes.at[:, feature].set(0))
        np.testing.assert_allclose(
            trained.decode(codes) - without, codes[:, feature, None] * directions[feature], atol=1e-4
        )


def test_the_normaliser_undoes_itself(trained, x):
    np.testing.assert_allclose(trained.normaliser.undo(trained.normaliser.apply(x)), x, rtol=1e-5)


def test_a_full_rotation_in_other_units_is_still_exact(trained, x):
    rotation = PCA(k=4, n_features=4).sized(4)
    inner = trained.normaliser.apply(x)
    params = rotation.fit(inner.mean(0), jnp.cov(inner.T))
    np.testing.assert_allclose(Normalised(rotation, params, trained.normaliser).reconstruct(x), x, rtol=1e-5, atol=1e-4)


def test_it_passes_through_jit_as_a_pytree(trained, x):
    np.testing.assert_allclose(jax.jit(Normalised.encode)(trained, x), trained.encode(x), atol=1e-5)
    assert len(jax.tree.leaves(trained)) == len(trained.params) + 2
