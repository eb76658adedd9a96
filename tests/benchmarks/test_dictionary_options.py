"""Figures of dictionaries at another L0 than they were measured at."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks.dictionary_options import interpolated, with_penalty
from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries import Fista, Normalised


@pytest.mark.parametrize("l0", [25.0, 33.0, 36.0, 38.0, 50.0])
def test_a_power_law_is_met_everywhere(l0):
    points = [{"l0": at, "fvu": 3 * at**-1.5} for at in (40.0, 30.0, 36.0)]
    assert interpolated(points, l0, "fvu") == pytest.approx(3 * l0**-1.5, rel=1e-12)


def test_the_two_points_around_it_decide():
    points = [{"l0": 10.0, "fvu": 0.3}, {"l0": 20.0, "fvu": 0.2}, {"l0": 40.0, "fvu": 0.19}]
    far = [*points[:2], {"l0": 40.0, "fvu": 0.01}]
    assert interpolated(points, 14.0, "fvu") == interpolated(far, 14.0, "fvu") != pytest.approx(0.2)
    assert interpolated(points, 30.0, "fvu") > interpolated(far, 30.0, "fvu")


def test_a_larger_penalty_leaves_fewer_features():
    dictionary = Fista(n_features=32, d_in=8, d_out=8, l1=0.5)
    identity = Normaliser(jnp.zeros(8, jnp.float32), jnp.ones((), jnp.float32))
    coder = Normalised(dictionary, dictionary.init(jax.random.key(0)), identity)
    x = jax.random.normal(jax.random.key(1), (64, 8))
    counts = [int(jnp.sum(with_penalty(coder, factor).encode(x) > 0)) for factor in (1.0, 2.0)]
    assert counts[1] < counts[0]
    assert float(coder.params["penalty"]) == 0.5, dataclasses.asdict(dictionary)
