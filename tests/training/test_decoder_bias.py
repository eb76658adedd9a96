"""Where the decoder bias starts: the geometric median against known answers, masks, and which dictionaries have one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import DICTIONARIES, L1, PCA, JumpReLU, TopK
from sparse_jax.errors import InputError
from sparse_jax.training.decoder_bias import (
    centre_of_rows,
    check_bias_start,
    first_counted,
    geometric_median,
    start_decoder_bias,
    weighted_row_mean,
    with_decoder_bias,
)

TRAINABLE = sorted(set(DICTIONARIES) - {"pca", "neurons", "random"})


def median_of(points, weight=None, dtype=jnp.float64, **options) -> np.ndarray:
    x = jnp.array(points, dtype)
    weight = jnp.ones(len(x), dtype) if weight is None else jnp.array(weight, dtype)
    made = geometric_median(x, weight, **options)
    assert (made.dtype, made.shape) == (dtype, x.shape[1:])
    return np.asarray(made)


def mean_distance(y, x, weight) -> np.ndarray:
    """Of points `y [..., d]` from rows `x`."""
    distances = np.linalg.norm(y[..., None, :] - x, axis=-1)
    return distances @ weight / weight.sum()


def lowest_on_grids(x, weight) -> np.ndarray:
    """The minimiser in the plane by brute force: ever finer grids about the best point so far (f is convex)."""
    centre, reach = x.mean(0), np.ptp(x)
    for _ in range(60):
        steps = np.linspace(-reach, reach, 21)
        grid = centre + np.stack(np.meshgrid(steps, steps, indexing="ij"), -1)
        values = mean_distance(grid, x, weight)
        centre = grid[np.unravel_index(values.argmin(), values.shape)]
        reach *= 0.6
    return centre


FERMAT = (3 - np.sqrt(3)) / 6
KNOWN = {
    "corners of a square": ([[1, 1], [-1, 1], [1, -1], [-1, -1]], [0, 0]),
    "corners and the middle": ([[3, 1], [1, 1], [3, -1], [1, -1], [2, 0]], [2, 0]),
    "Fermat point of a right triangle": ([[0, 0], [1, 0], [0, 1]], [FERMAT, FERMAT]),
    "the obtuse corner": ([[0, 0], [1, 0], [-np.sqrt(0.75), 0.5]], [0, 0]),  # 150 degrees: above 120 it is the corner
    "one row": ([[4, -7]], [4, -7]),
    "the same row often": ([[4, -7]] * 5, [4, -7]),
    "most rows at one place": ([[4, -7]] * 4 + [[0, 0], [5, 5], [9, 9]], [4, -7]),
    "the mean is a row, the median another": ([[0], [1], [2], [3], [4], [5], [20]], [3]),
    "the same on a slanted line": ([[i, 2 * i] for i in (0, 1, 2, 3, 4, 5, 20)], [3, 6]),
    "the mean is three rows, none the median": ([[i] for i in (0, 1, 2, 3, 4, 6, 6, 6, 26)], [4]),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_medians(case, x64):
    points, expected = KNOWN[case]
    np.testing.assert_allclose(median_of(points, tolerance=1e-12, max_iterations=500), expected, atol=1e-9)


@pytest.mark.parametrize("case", KNOWN)
def test_known_medians_in_float32(case):
    points, expected = KNOWN[case]
    np.testing.assert_allclose(median_of(points, dtype=jnp.float32), expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_on_a_line_it_is_the_median(seed, x64):
    x = np.random.default_rng(seed).lognormal(sigma=2, size=(51, 1))
    np.testing.assert_allclose(median_of(x, tolerance=1e-9, max_iterations=2000), [np.median(x)], rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_minimiser_that_brute_force_finds(seed, x64):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_t(2, size=(20, 2)), rng.uniform(0.1, 2, 20)
    made = median_of(x, weight, tolerance=1e-12, max_iterations=2000)
    np.testing.assert_allclose(made, lowest_on_grids(x, weight), atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_in_many_dimensions_nothing_leads_down(shift):
    """Float32, also far from zero, as raw residual streams are; the slope is NumPy's, in float64."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 16)) * rng.lognormal(size=(500, 1)) + shift).astype(np.float32)
    made = median_of(x, dtype=jnp.float32).astype(np.float64)
    difference = x - made
    slope = (difference / np.linalg.norm(difference, axis=1, keepdims=True)).mean(0)
    assert np.linalg.norm(slope) < (2e-5 if shift == 0 else 2e-4)
    assert np.linalg.norm(made - x.mean(0, dtype=np.float64)) > 0.01  # the mean is another point


def test_an_outlier_moves_the_mean_and_hardly_the_median():
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    far = np.concatenate([x, np.full((2, 8), 1e5, np.float32)])
    ones = jnp.ones(402)
    assert np.linalg.norm(weighted_row_mean(jnp.array(far), ones)) > 1000
    assert np.linalg.norm(median_of(far, dtype=jnp.float32)) < 0.2
    assert np.linalg.norm(median_of(far, dtype=jnp.float32) - median_of(x, dtype=jnp.float32)) < 0.05


def test_one_iteration_is_weiszfelds():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    pull = 1 / np.linalg.norm(x - x.mean(0), axis=1)
    made = median_of(x, dtype=jnp.float32, max_iterations=1)
    np.testing.assert_allclose(made, pull @ x / pull.sum(), atol=1e-6)
    assert np.abs(median_of(x, dtype=jnp.float32) - made).max() > 1e-4


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_one_iteration_from_a_row_is_vardi_and_zhangs(scale):
    """The mean is the row of 5 (up to rounding, with a scale of 1 / 3); five rows pull down, one up, itself holds."""
    x = np.array([0, 1, 2, 3, 4, 5, 20.0])
    others = np.delete(x, 5)
    pull = 1 / np.abs(others - 5)
    expected = 5 + (1 - 1 / 4) * (pull @ others / pull.sum() - 5)
    made = median_of(scale * x[:, None], dtype=jnp.float32, max_iterations=1)
    np.testing.assert_allclose(made, [scale * expected], rtol=1e-5)


def test_rows_close_by_are_told_apart():
    x = np.linspace(0, 1, 10_001) ** 3
    np.testing.assert_allclose(median_of(x[:, None], dtype=jnp.float32), [0.125], atol=2e-4)


@pytest.mark.parametrize("centre", [weighted_row_mean, geometric_median])
def test_masked_rows_do_not_enter(centre):
    """Whatever they hold."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    counts = rng.random(60) < 0.6
    poisoned = np.where(counts[:, None], x, np.where(rng.random((60, 1)) < 0.5, np.nan, np.inf)).astype(np.float32)
    made = centre(jnp.array(poisoned), jnp.array(counts, jnp.float32))
    alone = centre(jnp.array(x[counts]), jnp.ones(counts.sum()))
    np.testing.assert_allclose(made, alone, atol=1e-5)
    assert np.abs(alone - centre(jnp.array(x), jnp.ones(60))).max() > 1e-2
    np.testing.assert_array_equal(centre(jnp.array(poisoned), jnp.zeros(60)), np.zeros(5))


@pytest.mark.parametrize("centre", [weighted_row_mean, geometric_median])
def test_a_weight_counts_as_so_many_rows(centre):
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    times = np.random.default_rng(1).integers(0, 4, 20)
    repeated = np.repeat(x, times, axis=0)
    made = centre(jnp.array(x), jnp.array(times, jnp.float32))
    np.testing.assert_allclose(made, centre(jnp.array(repeated), jnp.ones(len(repeated))), atol=1e-5)


def test_the_mean_keeps_its_digits_where_it_is_large():
    x = (3000 + np.random.default_rng(0).normal(size=(16_000, 256))).astype(np.float32)
    made = weighted_row_mean(jnp.array(x), jnp.ones(len(x)))
    np.testing.assert_allclose(made, x.mean(0, dtype=np.float64), atol=3e-4)  # float32 has steps of 2.4e-4 there


def test_the_first_rows_that_count():
    x, weight = jnp.arange(24.0).reshape(12, 2), jnp.array([0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 1], jnp.float32)
    rows, ones = first_counted(x, weight, 4)
    np.testing.assert_array_equal(rows[:, 0] / 2, [1, 2, 5, 6])
    np.testing.assert_array_equal(ones, np.ones(4))
    assert len(first_counted(x, weight)[0]) == 7
    assert len(first_counted(jnp.zeros((20_000, 1)), jnp.ones(20_000))[0]) == 16_384


# What becomes of a dictionary


@pytest.mark.parametrize("kind", TRAINABLE)
@pytest.mark.parametrize("rule", ["mean", "geometric-median"])
def test_every_architecture_starts_there_and_nothing_else_changes(kind, rule):
    dictionary = DICTIONARIES[kind](n_features=12).sized(6)
    check_bias_start(DICTIONARIES[kind](), rule)
    params = dictionary.init(jax.random.key(0))
    x = jnp.array(np.random.default_rng(0).lognormal(size=(50, 6)).astype(np.float32))
    weight = jnp.ones(50).at[:7].set(0)
    started = start_decoder_bias(dictionary, params, x, weight, rule)
    wished = x[7:].mean(0) if rule == "mean" else median_of(x[7:], dtype=jnp.float32)
    np.testing.assert_allclose(started["b_dec"], wished, atol=1e-5)
    assert started.keys() == params.keys()
    assert all(started[name] is params[name] for name in params if name != "b_dec")
    assert started["b_dec"].dtype == params["b_dec"].dtype


def test_at_zero_the_parameters_are_as_they_were():
    dictionary = TopK(n_features=12).sized(6)
    params = dictionary.init(jax.random.key(0))
    assert start_decoder_bias(dictionary, params, jnp.ones((5, 6)), jnp.ones(5), "zero") is params
    np.testing.assert_array_equal(centre_of_rows(jnp.ones((5, 6)), jnp.ones(5), "zero"), np.zeros(6))


WITHOUT = (L1(decoder_bias=False), L1(decoder_bias=False).sized(8), JumpReLU(decoder_bias=False), PCA())


@pytest.mark.parametrize("dictionary", WITHOUT, ids=lambda d: f"{d.kind}-{d.d_in}")
def test_a_dictionary_without_a_decoder_bias_is_refused(dictionary):
    check_bias_start(dictionary, "zero")
    for rule in ("mean", "geometric-median"):
        with pytest.raises(InputError, match=f"--decoder-bias-start {rule}: this {dictionary.kind} dictionary has no"):
            check_bias_start(dictionary, rule)
    sized = dictionary.sized(8)
    with pytest.raises(InputError, match="no decoder bias"):
        start_decoder_bias(sized, sized.init(jax.random.key(0)), jnp.ones((4, 8)), jnp.ones(4), "mean")


def test_what_cannot_be_is_refused():
    dictionary = TopK(n_features=12).sized(6)
    params = dictionary.init(jax.random.key(0))
    with pytest.raises(InputError, match="choose zero, mean or geometric-median"):
        check_bias_start(dictionary, "median")
    with pytest.raises(InputError, match="rows of width 5"):
        start_decoder_bias(dictionary, params, jnp.ones((4, 5)), jnp.ones(4), "mean")
    with pytest.raises(InputError, match="drops every row"):
        start_decoder_bias(dictionary, params, jnp.ones((4, 6)), jnp.zeros(4), "geometric-median")


def test_a_centre_that_is_found_already_serves_several_dictionaries():
    centre = jnp.arange(6, dtype=jnp.float32)
    for dictionary in (L1(n_features=12).sized(6), TopK(n_features=8, k=2).sized(6)):
        params = dictionary.init(jax.random.key(0))
        params["b_dec"] = params["b_dec"].astype(jnp.bfloat16)
        started = with_decoder_bias(dictionary, params, centre)
        assert started["b_dec"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(started["b_dec"], centre)
        assert all(started[name] is params[name] for name in params if name != "b_dec")
    params = dictionary.init(jax.random.key(0))
    started = with_decoder_bias(dictionary, params, centre)
    started["b_dec"].delete()  # as a step does that consumes its state
    assert float(centre.sum()) == 15
    with pytest.raises(InputError, match=r"rows of width 5 .* width 6"):
        with_decoder_bias(dictionary, params, centre[:5])
