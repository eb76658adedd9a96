"""Least squares from moments against NumPy's on the tokens."""

import numpy as np
import pytest
from scipy import sparse

from sparse_jax.connectors.linear_path import LinearMaps, linear_path
from sparse_jax.connectors.linear_refit import dense_linear, refit_linear
from sparse_jax.connectors.moments import moments
from sparse_jax.errors import InputError
from tests.connectors.random_pairs import dense_sides, linear_pair, random_pair


def least_squares(x, y, with_bias):
    ones = np.ones((len(x), 1)) if with_bias else np.zeros((len(x), 0))
    found = np.linalg.lstsq(np.concatenate([x, ones], axis=1), y, rcond=None)[0]
    return found[: x.shape[1]], (found[-1] if with_bias else 0 * found[0])


@pytest.mark.parametrize("with_bias", [True, False])
def test_on_the_support(with_bias):
    pair, _ = linear_pair(noise=1.0)
    given = moments(pair, dtype=np.float64, method="sparse")
    path = linear_path(given, [0.4, 0.05], with_bias=with_bias)
    made = refit_linear(path, given, with_bias=with_bias)
    x, y = dense_sides(pair)
    np.testing.assert_array_equal(made.nonzeros, path.nonzeros)
    assert path.nonzeros.min() == 0 or path.nonzeros.min() < path.nonzeros.max()
    for point, W in enumerate(made.weights):
        W = W.toarray()
        for j in range(y.shape[1]):
            support = np.flatnonzero(path.weights[point].toarray()[:, j])
            due, bias = least_squares(x[:, support], y[:, j], with_bias)
            np.testing.assert_allclose(W[support, j], due, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(made.bias[point, j], bias, rtol=1e-5, atol=1e-6)
            assert np.count_nonzero(W[:, j]) == len(support)
    assert not np.allclose(made.weights[0].toarray(), path.weights[0].toarray(), rtol=0.1), "the path is shrunk"


def test_dependent_inputs_share_the_weight():
    pair, _ = linear_pair()
    twin = np.where(pair.inputs.indices == 1, 0, pair.inputs.indices)  # feature 1 is merged into 0, then copied
    inputs = pair.inputs.dense(slice(None))
    inputs[:, 1] = inputs[:, 0]
    values, indices = inputs, np.broadcast_to(np.arange(20, dtype=np.int32), inputs.shape)
    assert twin.shape == pair.inputs.indices.shape
    copied = type(pair)(type(pair.inputs)("in.0", 20, values, indices), pair.targets, pair.tokens)
    W = np.zeros((20, 6), np.float32)
    W[[0, 1, 2]] = 1
    made = refit_linear(LinearMaps((sparse.csc_array(W),), np.zeros((1, 6))), moments(copied, dtype=np.float64))
    x, y = dense_sides(copied)
    due, _ = least_squares(x[:, [0, 2]], y, True)
    found = made.weights[0].toarray()
    np.testing.assert_allclose(found[0], due[0] / 2, rtol=1e-3)
    np.testing.assert_allclose(found[1], due[0] / 2, rtol=1e-3)
    np.testing.assert_allclose(found[2], due[1], rtol=1e-3)


def test_dense():
    pair, _ = linear_pair(noise=1.0)
    given = moments(pair, dtype=np.float64, method="sparse")
    x, y = dense_sides(pair)
    due, bias = least_squares(x, y, True)
    made = dense_linear(given, ridge=0)
    np.testing.assert_allclose(made.weights[0].toarray(), due, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.bias[0], bias, rtol=1e-4)
    # By rows that stand for the penalty: x / norm has one more row sqrt(N ridge) for each input.
    norm = np.sqrt((x**2).mean(axis=0))[:-1]
    centred = (x - x.mean(axis=0))[:, :-1] / norm
    more = np.sqrt(len(x) * 0.3) * np.eye(19)
    due, _ = least_squares(
        np.concatenate([centred, more]), np.concatenate([y - y.mean(axis=0), 0 * more[:, :6]]), False
    )
    np.testing.assert_allclose(dense_linear(given, 0.3).weights[0].toarray()[:-1], due / norm[:, None], rtol=1e-5)


def test_silent_codes():
    made = dense_linear(moments(random_pair()))
    W = made.weights[0].toarray()
    assert np.isfinite(W).all()
    assert not W[-1].any()
    assert not W[:, -1].any()


def test_what_cannot_be():
    given = moments(linear_pair()[0])
    with pytest.raises(InputError, match="ridge"):
        dense_linear(given, -1)
    with pytest.raises(InputError, match="those of one pair"):
        refit_linear(LinearMaps((sparse.csc_array(np.ones((3, 3))),), np.zeros((1, 3))), given)
