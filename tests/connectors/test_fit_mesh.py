"""A connector trained over eight fake devices is the one trained on one."""

import numpy as np
import pytest

from sparse_jax.connectors.fit import FitOptions, Member, fit
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.mlp import MLP
from sparse_jax.errors import InputError
from sparse_jax.training.mesh import MeshShape, make_mesh
from tests.connectors.small_pairs import pair_of, sparse_inputs

OPTIONS = FitOptions(tokens=1600, batch=32, learning_rate=0.01, log_every=10)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    x = sparse_inputs(rng, 1600, 32)
    W = np.where(rng.random((32, 16)) < 0.1, 1, 0) * rng.normal(size=(32, 16))
    return pair_of(x, np.maximum(x @ W, 0) + 0.01 * x[:, :16])


def check(connector, pair, shape):
    members = [Member({"alpha": 0.05}), Member({"alpha": 0.2})]
    alone = fit(connector, pair, OPTIONS, members)
    spread = fit(connector, pair, OPTIONS, members, mesh=make_mesh(MeshShape.parse(shape)))
    assert alone.steps == spread.steps == 50
    for ours, theirs in zip(spread.history, alone.history):
        assert ours["reconstruction"] == pytest.approx(theirs["reconstruction"], rel=1e-5)
    for ours, theirs in zip(spread.trained, alone.trained):
        for name, value in theirs.params.items():
            assert np.linalg.norm(ours.params[name] - value) <= 1e-5 * np.linalg.norm(value), name
        np.testing.assert_array_equal(ours.params["W_dec"] == 0, theirs.params["W_dec"] == 0)


@pytest.mark.parametrize("connector", [Linear(), MLP(n_features=24)])
def test_fifty_steps_are_those_of_one_device(connector, pair):
    check(connector, pair, "data=2,features=4")


@pytest.mark.matrix
@pytest.mark.parametrize("shape", ["data=8", "data=4,features=2", "features=8"])
@pytest.mark.parametrize("connector", [Linear(), MLP(n_features=24)])
def test_fifty_steps_on_every_mesh(connector, pair, shape):
    check(connector, pair, shape)


def test_a_batch_that_the_mesh_does_not_divide(pair):
    with pytest.raises(InputError, match="--batch 33 over data=8 devices: give a batch that is a multiple"):
        fit(Linear(), pair, FitOptions(batch=33), mesh=make_mesh(MeshShape(8)))
