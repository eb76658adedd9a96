"""The threshold by noise, against whole passes of the model with the noise put in by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors.noise_threshold import _crossing, _next_scales, noise_threshold
from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, Site, forward, put
from tests.features.tiny_models import CONTEXT, VOCAB, WIDTH, coder, tiny
from tests.texts import joined_rows

SEED = 5
N = 10


@pytest.fixture(scope="module")
def text():
    """12 rows, documents of 20 tokens behind a separator, 0."""
    stream = np.random.default_rng(0).integers(1, VOCAB, 12 * CONTEXT + 1)
    starts = np.arange(0, 12 * CONTEXT, 20)
    return joined_rows(stream, starts, CONTEXT)


def rise_by_hand(lm, trained, site, text, numbers, variance, s):
    """The rise of CE by whole passes from the tokens, with the noise that each row's number gives."""
    rows = text[numbers]
    site = Site.parse(site)
    clean = forward(lm, rows.tokens, capture=[site])
    x = np.asarray(clean.captured[str(site)]).reshape(*rows.tokens.shape, -1)
    codes = np.asarray(trained.encode(jnp.array(x.reshape(-1, x.shape[-1])))).reshape(*rows.tokens.shape, -1)
    draw = lambda number: jax.random.normal(  # noqa: E731
        jax.random.fold_in(jax.random.key(SEED), int(number)), (CONTEXT, N), jnp.float32
    )
    drawn = np.stack([draw(number) for number in numbers])
    added = np.where(codes > 0, s * np.sqrt(variance) * drawn, 0) @ np.asarray(trained.directions())
    value = np.where(rows.mask[..., None], x + added, x).astype(np.float32)
    value = value.reshape(clean.captured[str(site)].shape)
    noisy = forward(lm, rows.tokens, edits=[Edit(site, put, (jnp.array(value),))])
    counted = rows.mask & (rows.targets >= 0)
    loss = []
    for logits in (clean.logits, noisy.logits):
        logits = np.asarray(logits, np.float64)
        target = np.take_along_axis(logits, np.maximum(rows.targets, 0)[..., None], -1)[..., 0]
        loss.append((np.log(np.exp(logits).sum(-1)) - target)[counted].mean())
    return loss[1] - loss[0]


def by_noise(lm, trained, site, text, numbers, variance, **options):
    return noise_threshold(lm, trained, site, text, numbers, variance, seed=SEED, replicates=200, **options)


@pytest.mark.parametrize("site", ["mlp_out.1", "attn_out.1", "resid_post.2"])
def test_rises_are_those_of_whole_passes_and_meet_the_levels(site, text):
    lm, trained = tiny("gpt_neox"), coder(WIDTH, N, 1, sparse=0.3)
    numbers, variance = np.arange(11), np.random.default_rng(2).uniform(0.1, 1, N).astype(np.float32)
    found = by_noise(lm, trained, site, text, numbers, variance)
    for at in (0, len(found.tried) // 2, len(found.tried) - 1):
        by_hand = rise_by_hand(lm, trained, site, text, numbers, variance, found.tried[at])
        np.testing.assert_allclose(found.rise[at], by_hand, atol=2e-6, rtol=1e-4)
    assert (np.diff(found.scales) > 0).all()
    for level, s, low, high in zip(found.levels, found.scales, found.low, found.high):
        rise = rise_by_hand(lm, trained, site, text, numbers, variance, s)
        assert abs(rise - level) < 0.03 * level
        assert low <= s <= high
        assert low < high
    assert found.threshold(0.01) == found.scales[1] ** 2
    rows = text[numbers]
    counted = rows.mask & (rows.targets >= 0)
    assert found.predictions == counted.sum()
    assert found.documents == len(np.unique(rows.document[counted]))


def test_batches_do_not_change_the_noise(text):
    lm, trained, variance = tiny("gpt_neox"), coder(WIDTH, N, 1, sparse=0.3), np.full(N, 0.5, np.float32)
    one, other = (
        by_noise(lm, trained, "mlp_out.1", text, np.arange(6), variance, batch_rows=size, levels=(0.01,))
        for size in (8, 4)
    )
    np.testing.assert_allclose(one.scales, other.scales, rtol=1e-3)


def test_silent_features_get_no_noise(text):
    """The last feature never fires: however large its variance is said to be, nothing changes."""
    lm, trained, variance = tiny("gpt_neox"), coder(WIDTH, N, 1, sparse=0.3), np.full(N, 0.5, np.float32)
    loud = variance.copy()
    loud[-1] = 1e6
    one, other = (by_noise(lm, trained, "mlp_out.1", text, np.arange(6), v, levels=(0.01,)) for v in (variance, loud))
    np.testing.assert_array_equal(one.scales, other.scales)
    # Four times the variance: half the s.
    half = by_noise(lm, trained, "mlp_out.1", text, np.arange(6), 4 * variance, levels=(0.01,))
    np.testing.assert_allclose(half.scales, one.scales / 2, rtol=0.02)


def test_where_no_noise_costs_so_much_the_threshold_is_infinite(text):
    lm = tiny("gpt_neox")
    head = lm.params["head"]
    flat = dataclasses.replace(lm, params={**lm.params, "head": jax.tree.map(jnp.zeros_like, head)})
    trained = coder(WIDTH, N, 1, sparse=0.3)
    found = by_noise(flat, trained, "mlp_out.2", text, np.arange(4), np.ones(N, np.float32), levels=(0.01,))
    assert found.scales[0] == np.inf == found.threshold(0.01)
    np.testing.assert_array_equal(found.rise, 0)


# The search alone, on functions that are known.


def searched(function, levels, tolerance=0.02):
    rises = {s: function(s) for s in (0.125, 0.25, 0.5, 1.0)}
    passes = 0
    while more := _next_scales(rises, np.array(levels), tolerance):
        rises |= {s: function(s) for s in more}
        passes += 1
    tried = np.array(sorted(rises))
    rise = np.array([rises[s] for s in tried])
    return [_crossing(tried, rise, level) for level in levels], passes


@pytest.mark.parametrize(
    ("function", "inverse"),
    [
        (lambda s: 0.2 * s**2, lambda r: np.sqrt(r / 0.2)),
        (lambda s: 3e4 * s**2, lambda r: np.sqrt(r / 3e4)),
        (lambda s: 1e-5 * s**2, lambda r: np.sqrt(r / 1e-5)),
        (lambda s: s**4, lambda r: r**0.25),
        (lambda s: np.log1p(s) / 3, lambda r: np.expm1(3 * r)),
    ],
)
def test_the_search_finds_known_thresholds(function, inverse):
    levels = (0.003, 0.01, 0.03)
    found, passes = searched(function, levels)
    for s, level in zip(found, levels):
        assert abs(function(s) - level) < 0.02 * level
        np.testing.assert_allclose(s, inverse(level), rtol=0.03)
    assert passes <= 10


def test_the_largest_scale_within_the_level_counts():
    """A rise that is negative, then above the level, then below it again."""
    tried, rise = np.array([1.0, 2.0, 3.0, 4.0]), np.array([-0.1, 0.02, 0.005, 0.03])
    np.testing.assert_allclose(_crossing(tried, rise, 0.01), np.sqrt(9 + 7 * 0.005 / 0.025))
    assert _crossing(tried, rise, 0.05) == np.inf
    np.testing.assert_allclose(_crossing(tried[1:], rise[1:], 0.001), np.sqrt(4 * 0.001 / 0.02))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"levels": (0.01, 0.003)}, "rising"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"variance": np.ones(3)}, "one of 0 or more for each of 10"),
        ({"variance": np.zeros(N)}, "never fire"),
        ({"numbers": np.array([0, 0])}, "each once"),
        ({"site": "mlp_hidden.1"}, "dictionary takes"),
    ],
)
def test_what_cannot_be_is_refused(wrong, said, text):
    given = {"site": "mlp_out.1", "numbers": np.arange(4), "variance": np.ones(N), **wrong}
    with pytest.raises(InputError, match=said):
        noise_threshold(tiny("gpt_neox"), coder(WIDTH, N, 1), text=text, row_numbers=given.pop("numbers"), **given)


def test_a_level_that_was_not_asked_for_is_refused(text):
    lm, trained = tiny("gpt_neox"), coder(WIDTH, N, 1, sparse=0.3)
    found = by_noise(lm, trained, "mlp_out.1", text, np.arange(4), np.ones(N), levels=(0.01,))
    with pytest.raises(InputError, match=r"no level of 0\.02 nats; there are 0\.01"):
        found.threshold(0.02)
