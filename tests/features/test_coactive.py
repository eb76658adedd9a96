"""Features that fire together, against a dense matrix; and the sample of tokens they are counted on."""

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.features import coactive
from sparse_jax.features.coactive import TokenKeeper
from sparse_jax.features.places import token_priorities

ROWS, POSITIONS, FEATURES = 40, 10, 12


@pytest.fixture(scope="module")
def fires():
    """`[tokens, features]`: 1 and 2 nearly always together, 5 never, 7 always, 3 and 4 never together."""
    generator = np.random.default_rng(0)
    fires = generator.random((ROWS * POSITIONS, FEATURES)) < 0.2
    fires[:, 2] = fires[:, 1] & (generator.random(len(fires)) < 0.9)
    fires[:, 4] &= ~fires[:, 3]
    fires[:, 5], fires[:, 7] = False, True
    return fires


def kept(fires, limit, rows, seed=3, batches=5):
    keeper = TokenKeeper(FEATURES, limit, seed)
    for part in np.array_split(np.asarray(rows), batches):
        row, position = np.repeat(part, POSITIONS), np.tile(np.arange(POSITIONS), len(part))
        here = fires[row * POSITIONS + position]
        keeper.add(token_priorities(seed, row, position), row, position, here.sum(axis=1), np.nonzero(here)[1])
    return keeper.result()


@pytest.mark.parametrize("limit", [1, 50, 1000])
@pytest.mark.parametrize("batches", [1, 8])
def test_the_sample_is_the_tokens_of_lowest_priority(fires, limit, batches):
    sample = kept(fires, limit, range(ROWS), batches=batches)
    row, position = (each.reshape(-1) for each in np.mgrid[:ROWS, :POSITIONS])
    order = np.argsort(token_priorities(3, row, position))[:limit]
    np.testing.assert_array_equal(sample.rows, row[order])
    np.testing.assert_array_equal(sample.positions, position[order])
    np.testing.assert_array_equal(sample.matrix().todense(), fires[order])
    assert sample.tokens == min(limit, ROWS * POSITIONS)


def test_merged_parts_are_the_whole(fires):
    a, b = kept(fires, 60, range(0, ROWS, 2)), kept(fires, 60, range(1, ROWS, 2))
    whole = kept(fires, 60, range(ROWS))
    for merged in (a.merge(b, 3), b.merge(a, 3)):
        for name in ("rows", "positions", "starts", "features"):
            np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


@pytest.mark.parametrize("block", [256, 5])
def test_the_most_co_active(fires, block, monkeypatch):
    monkeypatch.setattr(coactive, "_BLOCK", block)
    sample = kept(fires, 1000, range(ROWS))
    both = fires.T.astype(int) @ fires
    np.testing.assert_array_equal(sample.fired(), np.diag(both))
    np.testing.assert_array_equal(sample.together(np.array([7, 1])), both[[7, 1]])
    with np.errstate(invalid="ignore"):
        cosine = both / np.sqrt(np.outer(np.diag(both), np.diag(both)))
    features, cosines, together = sample.most(20)
    assert features.shape == (FEATURES, 20)
    for f in range(FEATURES):
        others = [g for g in range(FEATURES) if g != f and both[f, g] >= 2]
        expected = sorted(others, key=lambda g: (-np.float32(cosine[f, g]), g))
        found = [g for g in features[f].tolist() if g >= 0]
        assert sorted(found) == sorted(expected)
        np.testing.assert_allclose(cosines[f, : len(found)], cosine[f, expected], rtol=1e-5)
        np.testing.assert_array_equal(together[f, : len(found)], both[f, found])
        assert (features[f, len(found) :] == -1).all()
        assert not cosines[f, len(found) :].any()
    assert (features[5] == -1).all()
    assert features[1, 0] == 2
    assert 4 not in features[3]
    np.testing.assert_array_equal(sample.most(2)[0], features[:, :2])
    rare = sample.most(20, least=30)[2]
    assert rare[rare > 0].min() >= 30


def test_numbers_that_cannot_be(fires):
    sample = kept(fires, 5, range(3))
    with pytest.raises(InputError, match="give at least 1"):
        sample.most(0)


def test_nothing():
    sample = TokenKeeper(FEATURES, 5, 0).result()
    assert sample.tokens == 0
    assert (sample.most(3)[0] == -1).all()
