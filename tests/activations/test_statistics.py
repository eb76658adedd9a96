"""Streamed statistics against NumPy in float64 on all blocks at once."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Blocks, Statistics, collect_statistics, fit_normaliser
from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, Site, add, put

SITE = Site("resid_post", 1)


def far_away(tokens):
    """Activations with a mean about a thousand times their spread, as real residual streams have in some directions."""
    return (Edit(SITE, add, (jnp.linspace(-3000.0, 3000.0, 16), jnp.float32(1))),)


def always_the_same(tokens):
    return (Edit(SITE, put, (jnp.broadcast_to(jnp.linspace(0.1, 0.7, 16), (*tokens.shape, 16)),)),)


def blocks(lm, rows, **options):
    return Blocks(lm, rows, **{"site": SITE, "seed": 5, "block_rows": 8, **options})


@pytest.fixture(scope="module", params=[None, far_away], ids=["as it is", "far from zero"])
def both(request, lm, rows):
    """Streamed statistics of 3 blocks, and all counted activations in float64 with their token ids."""
    cut = blocks(lm, rows, edits_for=request.param)
    three = [cut[i] for i in range(3)]
    counted = [np.asarray(block.weight) > 0 for block in three]
    x = [np.asarray(block.x, np.float64)[where] for block, where in zip(three, counted)]
    tokens = np.concatenate([np.asarray(block.token)[where] for block, where in zip(three, counted)])
    return collect_statistics(cut, 3), x, tokens


def test_mean_and_covariance(both):
    statistics, x, _ = both
    x = np.concatenate(x)
    covariance = np.cov(x.T, bias=True)
    assert statistics.tokens == len(x)
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64
    spread = np.sqrt(np.trace(covariance))
    # Relative to the spread, not to the mean: nothing may cancel.
    np.testing.assert_allclose(statistics.mean, x.mean(0), atol=1e-6 * spread)
    np.testing.assert_allclose(statistics.covariance, covariance, atol=1e-5 * np.trace(covariance))
    np.testing.assert_allclose(statistics.variance, np.sum((x - x.mean(0)) ** 2) / len(x), rtol=1e-5)


def test_mean_over_std(both):
    statistics, x, _ = both
    x = np.concatenate(x)
    expected = np.linalg.norm(x.mean(0)) / np.sqrt(np.mean(np.sum((x - x.mean(0)) ** 2, axis=1)))
    np.testing.assert_allclose(statistics.mean_over_std, expected, rtol=1e-4)
    by_hand = dataclasses.replace(statistics, mean=np.array([3.0, 4.0]), covariance=np.diag([1.5, 2.5]))
    assert by_hand.mean_over_std == pytest.approx(2.5)
    assert dataclasses.replace(by_hand, covariance=np.diag([0.0, -1e-9])).mean_over_std == float("inf")


def test_the_median_norm_is_that_of_the_first_block(both):
    statistics, x, _ = both
    np.testing.assert_allclose(statistics.median_norm, np.median(np.linalg.norm(x[0], axis=1)), rtol=1e-5)


def test_token_means(both):
    statistics, x, tokens = both
    x = np.concatenate(x)
    expected = np.tile(x.mean(0), (50, 1))
    for token in np.unique(tokens):
        expected[token] = x[tokens == token].mean(0)
    assert statistics.token_mean.dtype == np.float32
    np.testing.assert_allclose(statistics.token_mean, expected, rtol=2e-6, atol=1e-5)
    np.testing.assert_array_equal(statistics.token_count, np.bincount(tokens, minlength=50))
    unseen = np.flatnonzero(statistics.token_count == 0)
    assert {0, 45, 49} <= set(unseen)
    for token in unseen:
        np.testing.assert_array_equal(statistics.token_mean[token], statistics.mean.astype(np.float32))


def test_masked_tokens_do_not_enter(lm, make_rows):
    """However large they are: as if they were not there."""

    def planted(tokens):
        where = jnp.where(tokens == 7, 1e6, 0.0)[..., None]
        return (Edit(SITE, add, (where * jnp.ones(16), jnp.float32(1))),)

    rows = make_rows(masked_ids=(0, 7))
    plain, under = (collect_statistics(blocks(lm, rows, edits_for=edits), 2) for edits in (None, planted))
    by_norm = collect_statistics(blocks(lm, make_rows(), edits_for=planted, max_norm=1e5), 2)
    for statistics in (under, by_norm):
        assert statistics.tokens == plain.tokens
        np.testing.assert_allclose(statistics.covariance, plain.covariance, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(statistics.token_sum, plain.token_sum, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(both, tmp_path):
    statistics = both[0]
    statistics.save(tmp_path / "statistics.npz")
    again = Statistics.load(tmp_path / "statistics.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]
    for name in Statistics.__dataclass_fields__:
        one, other = getattr(statistics, name), getattr(again, name)
        assert type(one) is type(other)
        np.testing.assert_array_equal(one, other)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype


def test_a_mask_that_drops_everything(lm, make_rows):
    rows = make_rows(masked_ids=tuple(range(50)))
    with pytest.raises(InputError, match="drops every token"):
        collect_statistics(blocks(lm, rows), 1)


@pytest.mark.parametrize("rule", ["centre-scale", "scale"])
def test_normalised_activations_have_power_d(both, rule):
    statistics, x, _ = both
    normaliser = fit_normaliser(rule, statistics.mean, statistics.variance)
    inner = np.asarray(normaliser.apply(jnp.array(np.concatenate(x), jnp.float32)), np.float64)
    np.testing.assert_allclose(np.mean(np.sum(inner**2, axis=1)), 16, rtol=1e-4)
    if rule == "centre-scale":
        np.testing.assert_allclose(inner.mean(0), 0, atol=1e-3)
    else:
        np.testing.assert_array_equal(normaliser.centre, 0)
    assert normaliser.centre.dtype == normaliser.scale.dtype == jnp.float32


def test_the_rule_none_is_the_identity(both):
    normaliser = fit_normaliser("none", both[0].mean, both[0].variance)
    x = np.concatenate(both[1]).astype(np.float32)
    np.testing.assert_array_equal(normaliser.apply(x), x)


@pytest.mark.parametrize("rule", ["centre-scale", "scale", "none"])
def test_activations_that_do_not_vary_are_refused(lm, rows, rule):
    statistics = collect_statistics(blocks(lm, rows, edits_for=always_the_same), 2)
    with pytest.raises(InputError, match="same on every token"):
        fit_normaliser(rule, statistics.mean, statistics.variance)
    # Rounding can leave a little of either sign, or nothing.
    for mean, variance in (
        (np.zeros(4), 0.0),
        (np.full(4, 30.0), 3e-12),
        (np.full(4, 30.0), -3e-12),
        (np.ones(4), np.nan),
    ):
        with pytest.raises(InputError, match="same on every token"):
            fit_normaliser(rule, mean, variance)


def test_small_activations_are_not_constant_ones():
    normaliser = fit_normaliser("centre-scale", np.full(4, 1e-3), 4e-12)
    np.testing.assert_allclose(normaliser.scale, 1e-6, rtol=1e-6)


def test_an_unknown_rule():
    with pytest.raises(InputError, match="choose centre-scale, scale or none"):
        fit_normaliser("whiten", np.zeros(4), 1.0)
