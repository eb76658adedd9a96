"""Data of a known dictionary: what is held out stays out of training, and all else is as promised."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.coding.compositional import compose, draw, draw_x, held_out_pairs, width
from sparse_jax.errors import InputError

N, D, K, ROWS = 20, 9, 3, 4000


@pytest.fixture(scope="module")
def composition():
    return compose(jax.random.key(0), N, D, K, noise=0.0)


@pytest.fixture(scope="module", params=[False, True], ids=["allowed", "held-out"])
def drawn(request, composition):
    x, z = draw(jax.random.key(1), composition, ROWS, request.param)
    return request.param, np.asarray(x), np.asarray(z)


def pairs_in(z):
    """`[n, n]` on how many rows two features are active together; 0 on the diagonal."""
    active = (z != 0).astype(np.int64)
    together = active.T @ active
    np.fill_diagonal(together, 0)
    return together


def test_training_never_sees_a_held_out_pair_and_every_other_row_has_one(composition, drawn):
    held_out, _, z = drawn
    pairs = np.asarray(composition.held_out)
    active = z != 0
    has_one = np.array([pairs[np.ix_(row, row)].any() for row in active])
    assert has_one.all() if held_out else not has_one.any()
    if not held_out:
        assert pairs_in(z)[pairs].sum() == 0


def test_k_are_active_and_every_latent_is_seen(drawn):
    _, _, z = drawn
    np.testing.assert_array_equal((z != 0).sum(1), K)
    assert (z != 0).any(0).all()
    assert z[z != 0].min() >= 0.5
    assert z[z != 0].max() <= 1.5


def test_x_is_made_of_the_dictionary(composition, drawn):
    _, x, z = drawn
    np.testing.assert_allclose(x, z @ np.asarray(composition.W), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(composition.W, axis=1), 1, rtol=1e-5)


def test_pairs_are_symmetric_and_hold_out_the_share_of_supports():
    pairs = held_out_pairs(jax.random.key(3), N, K, 0.5)
    np.testing.assert_array_equal(pairs, pairs.T)
    assert not pairs.diagonal().any()
    shares = [pairs[np.ix_(support, support)].any() for support in itertools.combinations(range(N), K)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)


def test_supports_are_uniform_among_those_of_their_kind():
    small = compose(jax.random.key(5), 6, 4, 2, held_out=0.3)
    _, z = draw(jax.random.key(6), small, 12_000)
    rows, columns = np.triu_indices(6, 1)
    counts = pairs_in(np.asarray(z))[rows, columns]
    allowed = ~np.asarray(small.held_out)[rows, columns]
    assert not counts[~allowed].any()
    expected = 12_000 / allowed.sum()
    np.testing.assert_allclose(counts[allowed], expected, atol=5 * np.sqrt(expected))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "k"), [(12, 2), (13, 3), (30, 10)])
def test_every_feature_keeps_an_allowed_support(n, k, seed):
    """Even where as many pairs are held out as can be: those of its group."""
    allowed = ~held_out_pairs(jax.random.key(seed), n, k, 0.6)
    _, z = draw(jax.random.key(7), compose(jax.random.key(seed), n, n, k, held_out=0.6), 3000)
    assert (allowed.sum(1) >= k).all()
    assert (np.asarray(z) != 0).any(0).all()


def test_seeds_and_noise(composition):
    same, other = (draw(jax.random.key(seed), composition, 50)[1] for seed in (1, 2))
    np.testing.assert_array_equal(same, draw(jax.random.key(1), composition, 50)[1])
    assert np.any(same != other)
    again = compose(jax.random.key(0), N, D, K, noise=0.5)
    np.testing.assert_array_equal(again.held_out, composition.held_out)
    assert np.any(compose(jax.random.key(1), N, D, K).held_out != composition.held_out)
    x, z = draw(jax.random.key(1), again, 4000)
    assert float(jnp.std(x - z @ again.W)) == pytest.approx(0.5, rel=0.05)


def test_half_normal_values():
    made = compose(jax.random.key(0), N, D, K, values="half-normal")
    _, z = draw(jax.random.key(1), made, 4000)
    active = np.asarray(z)[np.asarray(z) != 0]
    assert active.min() > 0
    assert active.mean() == pytest.approx(np.sqrt(2 / np.pi), rel=0.05)


def test_rows_in_blocks(composition, monkeypatch):
    monkeypatch.setattr("sparse_jax.coding.compositional._ROWS_TOGETHER", 40)
    x = draw_x(jax.random.key(1), composition, 100)
    assert x.shape == (100, D)
    assert len(np.unique(np.asarray(x)[:, 0])) == 100


def test_width():
    assert width(100, 10) == 47  # 20 ln 10 = 46.05
    assert width(4, 2, 5.0) == 4
    assert width(4, 2, 0.1) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 1}, "1 active features of 20: give at least 2"),
        ({"k": 11}, "11 active features of 20"),
        ({"d": 0}, "rows of 0 numbers"),
        ({"held_out": 1.0}, "held-out share 1.0"),
        ({"held_out": 0.9999}, "holds out .* pairs, of .* that may be"),
        ({"values": "cauchy"}, "uniform or half-normal"),
        ({"noise": -1.0}, "noise -1.0"),
    ],
)
def test_what_cannot_be_made(changes, message):
    given = {"n": N, "d": D, "k": K} | changes
    with pytest.raises(InputError, match=message):
        compose(jax.random.key(0), **given)
