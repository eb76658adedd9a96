"""Floors of every evaluation, fitted on training activations: PCA, neurons, random dictionary, token mean."""

import jax
import jax.numpy as jnp

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.activations.statistics import Statistics
from sparse_jax.dictionaries.baselines import PCA, Neurons, RandomDictionary
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.metrics.evaluate import Reconstructor
from sparse_jax.metrics.token_mean import token_mean
from sparse_jax.numerics import safe_norm


def reconstructor(trained: Normalised) -> Reconstructor:
    """A trained dictionary as the metrics want it."""
    return Reconstructor(_encode, _decode, trained)


def _encode(trained, x, tokens):
    return trained.encode(x)


def _decode(trained, codes, x, tokens):
    return trained.decode(codes, x), safe_norm(trained.directions())


def fit_floors(statistics: Statistics, x: jax.Array, k: int, n_features: int, seed: int) -> dict[str, Reconstructor]:
    """The floors by name.

    Args:
        statistics: of training activations.
        x: `[rows, d]` raw training activations that count, for the random dictionary's gain.
        k: how many coefficients PCA, neurons and the random dictionary keep: the L0 they are to be compared at.
        n_features: size of the random dictionary.
        seed: of the random dictionary.
    """
    d = x.shape[1]
    mean = jnp.array(statistics.mean, jnp.float32)
    sized = {"n_features": d, "d_in": d, "d_out": d, "k": k}
    pca, neurons = PCA(**sized), Neurons(**sized)
    random = RandomDictionary(**{**sized, "n_features": n_features})
    identity = Normaliser(jnp.zeros(d, jnp.float32), jnp.ones((), jnp.float32))
    fitted = {
        "pca": (pca, pca.fit(mean, jnp.array(statistics.covariance, jnp.float32))),
        "neurons": (neurons, neurons.fit(mean)),
        "random": (random, random.fit(jax.random.key(seed), mean, x)),
    }
    floors = {name: reconstructor(Normalised(floor, params, identity)) for name, (floor, params) in fitted.items()}
    return {**floors, "token_mean": token_mean(jnp.array(statistics.token_mean))}
