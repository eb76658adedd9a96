"""A connector trained over eight fake devices is the one trained on one."""

import numpy as np
import pytest

from sparse_jax.connectors.fit import FitOptions, fit
from sparse_jax.connectors.linear import Linear
from sparse_jax.errors import InputError
from sparse_jax.training.mesh import MeshShape, make_mesh
from tests.connectors.fifty_steps import CONNECTORS, connected, pair


def check(connector, shape):
    alone, spread = connected(connector), connected(connector, shape)
    assert alone.steps == spread.steps == 50
    for ours, theirs in zip(spread.history, alone.history):
        assert ours["reconstruction"] == pytest.approx(theirs["reconstruction"], rel=1e-5)
    for ours, theirs in zip(spread.trained, alone.trained):
        for name, value in theirs.params.items():
            assert np.linalg.norm(ours.params[name] - value) <= 1e-5 * np.linalg.norm(value), name
        np.testing.assert_array_equal(ours.params["W_dec"] == 0, theirs.params["W_dec"] == 0)


@pytest.mark.parametrize("connector", CONNECTORS.values())
def test_fifty_steps_are_those_of_one_device(connector):
    check(connector, "data=2,features=4")


@pytest.mark.matrix
@pytest.mark.parametrize("shape", ["data=8", "data=4,features=2", "features=8"])
@pytest.mark.parametrize("connector", CONNECTORS.values())
def test_fifty_steps_on_every_mesh(connector, shape):
    check(connector, shape)


def test_a_batch_that_the_mesh_does_not_divide():
    with pytest.raises(InputError, match="--batch 33 over data=8 devices: give a batch that is a multiple"):
        fit(Linear(), pair(), FitOptions(batch=33), mesh=make_mesh(MeshShape(8)))
