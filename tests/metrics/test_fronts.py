"""Fronts by hand: what is averaged with what, and in which order."""

import pytest

from sparse_jax.errors import InputError
from sparse_jax.metrics.fronts import fronts, ks_between, spread


def member(sparsity, seed, l0, fvu, ce=0.1, site="resid_post.1", n_features=64, rate=1e-3):
    return {
        "site": site, "n_features": n_features, "learning_rate": rate, "sparsity": sparsity, "seed": seed,
        "l0": l0, "fvu": fvu, "ce_increase": ce, "dead_fraction": 0.0, "name": "not averaged",
    }  # fmt: skip


def test_spread_by_hand():
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "sd": pytest.approx(7**0.5), "low": 1.0, "high": 6.0, "count": 3}
    assert spread([0.5]) == {"mean": 0.5, "sd": None, "low": 0.5, "high": 0.5, "count": 1}


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_a_spread_of_nothing_is_refused(values):
    with pytest.raises(InputError, match="finite"):
        spread(values)


def test_seeds_are_averaged_and_nothing_else():
    """Two coefficients x two seeds at one place, and one member each that differs in site, width or rate."""
    members = [
        member(1.0, 0, l0=40.0, fvu=0.10),
        member(4.0, 0, l0=10.0, fvu=0.30),
        member(1.0, 1, l0=44.0, fvu=0.12),
        member(4.0, 1, l0=12.0, fvu=0.20),
        member(4.0, 0, l0=9.0, fvu=0.5, site="resid_post.2"),
        member(4.0, 0, l0=8.0, fvu=0.6, n_features=128),
        member(4.0, 0, l0=7.0, fvu=0.7, rate=1e-4),
    ]
    made = fronts(members)
    places = [(front["site"], front["n_features"], front["learning_rate"]) for front in made]
    assert places == [
        ("resid_post.1", 64, 1e-3), ("resid_post.2", 64, 1e-3), ("resid_post.1", 128, 1e-3), ("resid_post.1", 64, 1e-4)
    ]  # fmt: skip
    assert [len(front["points"]) for front in made] == [2, 1, 1, 1]
    sparser, denser = made[0]["points"]  # the smaller L0 first, though it was given second
    assert (sparser["sparsity"], sparser["seeds"], denser["sparsity"]) == (4.0, [0, 1], 1.0)
    assert sparser["l0"]["mean"] == 11.0
    assert denser["l0"]["mean"] == 42.0
    assert denser["l0"]["sd"] == pytest.approx(8**0.5)
    assert sparser["fvu"]["mean"] == pytest.approx(0.25)
    assert sparser["fvu"]["sd"] == pytest.approx(0.005**0.5)
    assert (sparser["fvu"]["low"], sparser["fvu"]["high"]) == (0.2, 0.3)
    assert "name" not in sparser


def test_a_seed_that_is_there_twice_is_refused():
    with pytest.raises(InputError, match="same seed"):
        fronts([member(1.0, 0, 10.0, 0.1), member(1.0, 0, 11.0, 0.2)])


def test_floors_stand_at_few_sparsities():
    assert ks_between([8.2, 7.9, 15.6, 0.3], most=4) == [1, 8, 16]
    assert ks_between([float(i) for i in range(8, 129)], most=5) == [8, 16, 32, 64, 128]
    with pytest.raises(InputError):
        ks_between([], most=4)
