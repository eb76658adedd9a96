"""The search that brings every trainer to a wished L0, on made-up trainers whose law is known."""

import math

import pytest

from benchmarks.quality_search import (
    Point,
    at_target,
    best_sparsity,
    exponent,
    moved,
    near,
    next_sparsity,
    score,
    search,
)


def trainer(constant, power, s=0.5):
    """L0 = constant / sparsity^power, FVU = L0^-s."""

    def trial(sparsity):
        l0 = constant / sparsity**power
        return Point(sparsity, l0, l0**-s)

    return trial


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("constant", [10.0, 32.0, 100.0])
def test_three_trials_bracket_the_target_and_find_it(constant, power):
    points = search(trainer(constant, power), 1.0, False, 32.0)
    assert len(points) == 3
    assert min(p.l0 for p in points) <= 32 * (1 + 1e-9)
    assert max(p.l0 for p in points) >= 32 * (1 - 1e-9)
    assert trainer(constant, power)(best_sparsity(points, 32.0)).l0 == pytest.approx(32, rel=0.02)
    assert exponent(points) == pytest.approx(0.5)
    assert score(points, 0.5, 32.0) == pytest.approx(32**-0.5)


@pytest.mark.parametrize("share", [0.7, 0.98, 1.4])
def test_a_trainer_that_misses_the_l0_it_is_told_is_told_another(share):
    points = search(lambda told: Point(told, share * told, 0.1), 32.0, True, 32.0)
    assert len(points) == (1 if share == 0.98 else 3)
    assert share * best_sparsity(points, 32.0) == pytest.approx(32, rel=0.03)


def test_the_coefficient_of_a_longer_run_is_moved_along_the_trials_line():
    points = search(trainer(50.0, 2.0), 1.0, False, 32.0)
    longer = trainer(35.0, 2.0)
    chosen = best_sparsity(points, 32.0)
    assert not near(longer(chosen).l0, 32.0, 0.05)
    assert longer(moved(chosen, longer(chosen).l0, points, 32.0)).l0 == pytest.approx(32, rel=1e-3)


def test_an_exponent_out_of_bounds_is_no_exponent():
    assert exponent([Point(1.0, 20.0, 0.1), Point(2.0, 40.0, 0.2)]) is None


def test_a_knob_that_is_l0_needs_one_trial():
    points = search(lambda k: Point(k, k, 0.1), 16.0, True, 16.0)
    assert [p.sparsity for p in points] == [16.0]
    assert best_sparsity(points, 16.0) == 16.0
    assert exponent(points) is None


def test_a_step_is_bounded_where_nothing_fires():
    assert next_sparsity([Point(1.0, 0.0, 1.0)], 32.0) == pytest.approx(1 / 8)
    assert math.isfinite(best_sparsity([Point(1.0, 0.0, 1.0), Point(0.125, 1.0, 0.9)], 32.0))


def test_a_figure_moves_along_the_law():
    # FVU ~ L0^-0.5: at four times the L0 half the FVU.
    assert at_target(128.0, 0.05, 0.5, 32.0) == pytest.approx(0.1)
