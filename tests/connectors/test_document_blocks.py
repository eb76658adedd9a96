"""Blocks of documents and what a bootstrap draws of them."""

import numpy as np
import pytest

from sparse_jax.connectors.document_blocks import bootstrap_weights, document_blocks, interval
from sparse_jax.errors import InputError


def test_documents_stay_whole_and_blocks_are_even():
    generator = np.random.default_rng(0)
    document = np.sort(generator.integers(500, 900, size=10_000))
    block = document_blocks(document, 8, seed=1)
    assert set(block) == set(range(8))
    for number in np.unique(document):
        assert len(set(block[document == number])) == 1
    counts = np.bincount(block)
    assert counts.min() > 0.9 * 1250
    assert counts.max() < 1.1 * 1250
    assert not np.array_equal(block, document_blocks(document, 8, seed=2))


def test_fewer_documents_than_blocks():
    assert document_blocks(np.array([7, 7, 3, 9]), 10).tolist() == [1, 1, 0, 2]


def test_a_long_document_takes_blocks_of_others():
    block = document_blocks(np.repeat([0, 1, 2, 3], [1000, 1, 1, 1]), 3)
    assert set(block) == set(range(block.max() + 1)), "no block is empty"


def test_weights_are_those_of_draws_with_replacement():
    weights = bootstrap_weights(6, 4000, seed=0)
    assert np.all(weights.sum(axis=1) == 6)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.05)
    np.testing.assert_allclose(weights.var(axis=0), 5 / 6, atol=0.06)


def test_interval():
    made = interval(3.0, np.r_[np.arange(1000.0), np.nan])
    assert (made.value, made.low, made.high) == (3.0, 25.0, 974.0)
    assert interval(1.0, np.array([1.0, np.inf, np.inf])).high == np.inf
    assert np.isnan(interval(1.0, np.array([np.nan])).low)


def test_what_cannot_be():
    with pytest.raises(InputError, match="at least one"):
        document_blocks(np.array([], int), 2)
    with pytest.raises(InputError, match="at least one"):
        document_blocks(np.array([1]), 0)
    with pytest.raises(InputError, match="needs 2 blocks"):
        bootstrap_weights(1, 10)
