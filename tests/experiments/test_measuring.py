"""Measuring members: one that has diverged does not decide where the floors stand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.data import load_data
from experiments.measuring import measure_members
from experiments.sweep import Flags
from sparse_jax.activations import Blocks, collect_statistics, fit_normaliser
from sparse_jax.dictionaries import L1, Normalised, TopK
from sparse_jax.errors import InputError


@pytest.fixture(scope="module")
def measured(model, text):
    """(members by name -> `measure_members`, two members of L0 2 and 4, one of which every code is NaN)."""
    flags = Flags(
        TopK(),
        model=str(model),
        text=str(text),
        context=32,
        holdout=0.2,
        eval_tokens=256,
        compute_dtype="float32",
        bos="none",
    )
    (data,) = load_data(flags, "resid_post.0")
    blocks = Blocks(data.lm, data.train, data.site, 0, 16)
    statistics = collect_statistics(blocks, 1)
    normaliser = fit_normaliser("centre-scale", statistics.mean, statistics.variance)

    def member(dictionary):
        sized = dictionary.sized(data.width)
        return Normalised(sized, sized.init(jax.random.key(0)), normaliser)

    def measure(members):
        return measure_members(data, members, statistics, blocks[0], eval_tokens=256, seed=0, drop=False)

    two, four = (member(TopK(n_features=32, k=k)) for k in (2, 4))
    return measure, {"two": two, "four": four}, diverged(member(L1(n_features=32)))


def diverged(trained):
    nothing = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), trained.params)
    return dataclasses.replace(trained, params=nothing)


def test_a_member_that_diverged_does_not_move_the_floors(measured):
    measure, members, lost = measured
    found, floors = measure({**members, "lost": lost})
    assert sorted({floor["k"] for floor in floors if floor["floor"] != "token_mean"}) == [2, 4]
    assert math.isnan(found.figures["lost"]["fvu"])
    assert all(math.isfinite(found.figures[name]["fvu"]) for name in members)


def test_members_that_all_diverged_are_said(measured):
    measure, members, _ = measured
    with pytest.raises(InputError, match=r"all 2 dictionaries of resid_post\.0 have diverged"):
        measure({name: diverged(member) for name, member in members.items()})
