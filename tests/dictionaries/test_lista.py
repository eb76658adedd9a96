"""LISTA: one step is a ReLU autoencoder, fixed weights are ISTA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding import ista, spectral_bound
from sparse_jax.dictionaries import L1, Lista
from sparse_jax.errors import InputError

D, N = 8, 24


def test_one_step_is_a_relu_autoencoder():
    dictionary = Lista(n_features=N, steps=1).sized(D)
    params = dictionary.init(jax.random.key(0)) | {"b_dec": jnp.linspace(-1, 1, D)}
    x = jax.random.normal(jax.random.key(1), (5, D))
    same = {
        "W_enc": params["W_enc"],
        "b_enc": -params["thresholds"][0],
        "W_dec": params["W_dec"],
        "b_dec": params["b_dec"],
    }
    np.testing.assert_allclose(
        dictionary.encode(params, x), L1(n_features=N).sized(D).encode(same, x), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("steps", [2, 5])
def test_with_the_weights_of_ista_it_is_ista(steps):
    dictionary = Lista(n_features=N, steps=steps).sized(D)
    params = dictionary.init(jax.random.key(0))
    L = 2 * spectral_bound(params["W_dec"])
    params |= {"W_enc": 2 * params["W_dec"].T / L, "thresholds": jnp.full((steps, N), 0.6) / L}
    x = jax.random.normal(jax.random.key(1), (5, D))
    np.testing.assert_allclose(dictionary.encode(params, x), ista(x, params["W_dec"], 0.6, steps), rtol=1e-5, atol=1e-6)


def test_thresholds_stay_where_they_shrink():
    dictionary = Lista(n_features=N).sized(D)
    params = dictionary.init(jax.random.key(0)) | {"thresholds": jnp.full((3, N), -1.0)}
    assert np.all(dictionary.project(params)["thresholds"] == 0)


def test_flags_that_cannot_be():
    with pytest.raises(InputError, match="--steps 0"):
        Lista(steps=0)
    with pytest.raises(InputError, match="--l1 -1"):
        Lista(l1=-1)
