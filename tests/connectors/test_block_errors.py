"""Errors by blocks and R^2 against plain NumPy, from tokens and from moments."""

from functools import partial

import numpy as np
import pytest
from scipy import sparse

from sparse_jax.connectors import block_errors as module
from sparse_jax.connectors.block_errors import block_errors, moment_errors
from sparse_jax.connectors.document_blocks import document_blocks
from sparse_jax.connectors.linear_path import LinearMaps
from sparse_jax.connectors.moments import moments
from sparse_jax.errors import InputError
from tests.connectors.random_pairs import dense_sides, random_pair


def some_maps(n1=12, n2=9, seed=3):
    generator = np.random.default_rng(seed)
    W = [generator.normal(size=(n1, n2)) * (generator.random((n1, n2)) < share) * 0.2 for share in (0.2, 1)]
    return LinearMaps(tuple(sparse.csc_array(each.astype(np.float32)) for each in W), generator.normal(size=(2, n2)))


def r2_by_numpy(pair, maps, point, rows=slice(None)):
    x, y = (side[rows] for side in dense_sides(pair))
    left = y - x @ maps.weights[point].toarray() - maps.bias[point]
    spread = ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    return 1 - np.divide((left**2).sum(axis=0), spread, out=np.ones(len(spread)), where=spread > 0)


def test_r2(monkeypatch):
    monkeypatch.setattr(module, "document_errors", partial(module.document_errors, chunk_rows=64))
    pair, maps = random_pair(), some_maps()
    made = block_errors(pair, maps, blocks=6)
    assert made.error.shape == (2, 6, 9)
    assert np.isnan(made.r2()[:, -1]).all(), "the last target never fires"
    for point in range(2):
        np.testing.assert_allclose(made.r2()[point, :-1], r2_by_numpy(pair, maps, point)[:-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made.fired.sum(axis=0), (dense_sides(pair)[1] != 0).sum(axis=0))
    block = document_blocks(pair.tokens.document, 6)
    rows = np.concatenate([np.flatnonzero(block == 1)] * 2 + [np.flatnonzero(block == 4)])
    drawn = made.r2(np.array([0, 2, 0, 0, 1, 0]))
    np.testing.assert_allclose(drawn[1, :-1], r2_by_numpy(pair, maps, 1, rows)[:-1], rtol=1e-5, atol=1e-5)


def test_blocks_that_do_not_stand_together():
    pair, maps = random_pair(), some_maps()
    order = np.random.default_rng(0).permutation(len(pair))
    one, two = (block_errors(each, maps, blocks=6) for each in (pair, pair.at(order)))
    for name in ("error", "sum", "square", "fired", "count"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-6)


def test_from_moments():
    pair, maps = random_pair(), some_maps()
    by_tokens = block_errors(pair, maps, blocks=6)
    by_moments = moment_errors(moments(pair, blocks=6, dtype=np.float64, method="sparse"), maps)
    for name in ("error", "sum", "square", "fired", "count"):
        np.testing.assert_allclose(getattr(by_moments, name), getattr(by_tokens, name), rtol=1e-5)


def test_any_predictor_and_joined():
    pair, maps = random_pair(), some_maps()
    mean = dense_sides(pair)[1].mean(axis=0)
    constant = block_errors(pair, [lambda codes: np.broadcast_to(mean, (len(codes.values), 9))], blocks=6)
    np.testing.assert_allclose(constant.r2()[0, :-1], 0, atol=1e-6)
    both = block_errors(pair, maps, blocks=6).joined(constant)
    assert both.r2().shape == (3, 9)
    with pytest.raises(InputError, match="beside each other"):
        both.joined(block_errors(pair, maps, blocks=3))


def test_alive():
    made = block_errors(random_pair(), some_maps())
    fired = made.fired.sum(axis=0)
    least = int(np.median(fired))
    np.testing.assert_array_equal(made.alive(least), fired >= least)
    assert not made.alive(0)[-1], "it does not vary"


def test_what_cannot_be():
    with pytest.raises(InputError, match="at least one predictor"):
        block_errors(random_pair(), [])
