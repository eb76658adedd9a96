"""What runs that train dictionaries have in common."""

import dataclasses

import jax.numpy as jnp
import pytest

from experiments.training_run import warn_of_missed_l0
from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1
from sparse_jax.training import adam, init_state, settings_for


@pytest.mark.parametrize(
    ("wished", "reached", "warned"), [(32.0, 29.0, True), (32.0, 35.0, True), (32.0, 33.5, False), (None, 3.0, False)]
)
def test_a_missed_l0_is_told(wished, reached, warned, capsys):
    dictionary, optimisation = L1(n_features=4).sized(3), adam(1e-3)
    settings = settings_for(dictionary, optimisation, wished)
    state = init_state(dictionary, optimisation.transform, Normaliser(jnp.zeros(3), jnp.ones(())), 0, settings)
    state = dataclasses.replace(state, control=state.control._replace(l0=jnp.float32(reached)))
    warn_of_missed_l0(state, "the l1 dictionary")
    printed = capsys.readouterr().out
    assert ("warning: the l1 dictionary ended at L0" in printed) == warned
    assert (f"not at --target-l0 {wished}" in printed.replace("32:", "32.0:")) == warned
