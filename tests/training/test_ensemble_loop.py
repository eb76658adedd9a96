"""The loop over an ensemble: each member as in the loop alone, one pass, resumed bit for bit, rows by member."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser, SiteBlock
from sparse_jax.dictionaries import L1, TopK
from sparse_jax.errors import InputError
from sparse_jax.lm import Site
from sparse_jax.training import (
    Checkpoints,
    Member,
    Pace,
    Schedule,
    adam,
    group,
    init_ensemble,
    init_state,
    make_ensemble_step,
    make_step,
    member_state,
    run,
    run_ensemble,
    settings_for,
    with_member,
)

D, TOTAL = {"resid_post.0": 6, "mlp_out.1": 4}, 10
PACE = Pace(batch=16, total=TOTAL, log_every=4, checkpoint_every=3)
WAYS = ("loop", "vmap")


class FakeBlocks:
    """Random activations at two sites, 48 tokens in a block; says which blocks were asked for."""

    tokens_per_block = 48
    sites = tuple(map(Site.parse, D))

    def __init__(self):
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        keys = {site: jax.random.fold_in(jax.random.key(d), index) for site, d in D.items()}
        x = {site: jax.random.normal(keys[site], (48, d)) for site, d in D.items()}
        weight = {site: jnp.ones(48).at[: d + index].set(0) for site, d in D.items()}
        return SiteBlock(x, weight, jnp.zeros(48, jnp.int32), jnp.arange(48, dtype=jnp.int32))


class OneSite:
    """The same activations as blocks of one site."""

    tokens_per_block = 48

    def __init__(self, site):
        self.site, self.all = site, FakeBlocks()

    def __getitem__(self, index):
        return self.all[index].at(self.site)


def members(rates=(1e-2, 3e-3)):
    made = []
    for site, d in D.items():
        for dictionary in (L1(n_features=12, l1=0.1), L1(n_features=12, l1=0.3), TopK(n_features=10, k=2)):
            sized, seed = dictionary.sized(d), len(made)
            settings = settings_for(sized, adam(rates[len(made) % 2]), 3.0 if len(made) == 1 else None)
            made.append(Member(site, sized, settings, seed, f"member {len(made)}"))
    return made


def normaliser(site):
    return Normaliser(jnp.full(D[site], 0.1), jnp.array(1.1))


def ensemble(way="loop", given=None):
    groups = group(given or members())
    states = tuple(init_ensemble(of, adam(1.0).transform, normaliser(of.site), way) for of in groups)
    steps = [make_ensemble_step(of, adam(1.0), Schedule(), TOTAL, 40, way=way) for of in groups]
    return groups, states, steps


def go(groups, states, steps, blocks=None, pace=PACE, checkpoints=None, log=lambda row: None, **options):
    blocks = blocks or FakeBlocks()
    return run_ensemble(states, steps, groups, blocks, pace, log=log, checkpoints=checkpoints, **options)


def alone(of, log=lambda row: None):
    state = init_state(of.dictionary, adam(1.0).transform, normaliser(of.site), of.seed, of.settings)
    step = make_step(of.dictionary, adam(1.0), Schedule(), TOTAL, 40)
    return run(state, step, OneSite(of.site), PACE, log=log, checkpoints=None)


def assert_same(one, other, rtol=0.0):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=0.1 * rtol)


@pytest.mark.parametrize("way", WAYS)
def test_each_member_is_as_in_the_loop_alone_and_blocks_are_made_once(way):
    groups, states, steps = ensemble(way)
    assert [len(of.members) for of in groups] == [2, 1, 2, 1]
    blocks, rows, passed = FakeBlocks(), [], []
    states = go(groups, states, steps, blocks, log=rows.append, progress=passed.append)
    assert blocks.asked == [0, 1, 2, 3]
    assert passed == [16] * TOTAL
    for of, each in zip(groups, states):
        for i, member in enumerate(of.members):
            logged = []
            assert_same(member_state(each, i), alone(member, logged.append), rtol=0.0 if way == "loop" else 1e-5)
            mine = [row for row in rows if row["member"] == member.name]
            assert [row["step"] for row in mine] == [1, 4, 8, 10]
            assert [row["tokens"] for row in mine] == [row["tokens"] for row in logged]
            for row, single in zip(mine, logged, strict=True):
                assert set(row) == {*single, "member"}
                np.testing.assert_allclose(row["loss"], single["loss"], rtol=1e-5)
    assert len(rows) == 4 * 6
    # Masks are those of each site.
    assert len({row["tokens"] for row in rows if row["step"] == 1}) == 2


@pytest.mark.parametrize(("way", "stop"), [("loop", 3), ("loop", 7), ("vmap", 4)])
def test_a_resumed_ensemble_is_the_same_bit_for_bit(tmp_path, way, stop):
    groups, states, steps = ensemble(way)
    whole = go(groups, states, steps)
    taken = []
    groups, states, steps = ensemble(way)
    with Checkpoints(tmp_path / "c") as checkpoints:
        options = {"should_stop": lambda: len(taken) == stop, "progress": taken.append}
        go(groups, states, steps, checkpoints=checkpoints, **options)
    groups, states, steps = ensemble(way)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == stop
        states = checkpoints.restore(states)
        rows = []
        assert_same(go(groups, states, steps, checkpoints=checkpoints, log=rows.append), whole)
        assert checkpoints.latest() == TOTAL
    assert rows[0]["step"] == stop + 1


def test_a_checkpoint_can_be_continued_the_other_way(tmp_path):
    groups, states, steps = ensemble("loop")
    with Checkpoints(tmp_path / "c") as checkpoints:
        done = go(groups, states, steps, checkpoints=checkpoints)
        stacked = checkpoints.restore(ensemble("vmap")[1])
    for i, (one, other) in enumerate(zip(done, stacked, strict=True)):
        for j in range(len(groups[i].members)):
            assert_same(member_state(one, j), member_state(other, j))


def test_a_checkpoint_of_another_ensemble_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(ensemble()[1])
        with pytest.raises(InputError, match=r"\(absent\) here"):
            checkpoints.restore(ensemble(given=members()[:5])[1])
        other = [*members()[:5], dataclasses.replace(members()[5], dictionary=TopK(n_features=11, k=2).sized(4))]
        with pytest.raises(InputError, match=r"groups/0003.*shape \(1, 10\) there, \(1, 11\) here"):
            checkpoints.restore(ensemble(given=other)[1])


@pytest.mark.parametrize("way", WAYS)
def test_the_hook_changes_what_is_gone_on_with_and_saved(tmp_path, way):
    groups, states, steps = ensemble(way)
    seen = []

    def after_step(states, block, done):
        seen.append((done, block.x["mlp_out.1"].shape))
        if done != TOTAL:
            return states
        state = member_state(states[2], 1)
        silent = dataclasses.replace(state, params={**state.params, "b_enc": jnp.full(12, -5.0)})
        return (*states[:2], with_member(states[2], 1, silent), states[3])

    with Checkpoints(tmp_path / "c") as checkpoints:
        states = go(groups, states, steps, checkpoints=checkpoints, after_step=after_step)
        saved = checkpoints.restore(ensemble(way)[1])
    assert seen == [(i, (48, 4)) for i in range(1, TOTAL + 1)]
    for found in (states, saved):
        biases = [np.asarray(member_state(found[2], i).params["b_enc"]) for i in range(2)]
        assert (biases[1] == -5).all()
        assert not (biases[0] == -5).any()


def test_one_member_whose_loss_is_not_finite_does_not_stop_the_others():
    given = members()
    wild = given[1].settings._replace(learning_rate=jnp.array(jnp.inf))
    groups, states, steps = ensemble(given=[given[0], dataclasses.replace(given[1], settings=wild), *given[2:]])
    rows = []
    states = go(groups, states, steps, log=rows.append)
    losses = {row["member"]: row["loss"] for row in rows if row["step"] == TOTAL}
    assert {name for name, loss in losses.items() if not math.isfinite(loss)} == {"member 1"}
    assert_same(member_state(states[0], 0), alone(given[0]))


def test_an_ensemble_of_which_nothing_is_left_stops():
    wild = [each.settings._replace(learning_rate=jnp.array(jnp.nan)) for each in members()]
    given = [dataclasses.replace(each, settings=settings) for each, settings in zip(members(), wild)]
    with pytest.raises(InputError, match="the loss is nan at step 4"):
        go(*ensemble(given=given))


def broken(state):
    """The state with parameters that are not numbers: every loss from here on is NaN."""
    return dataclasses.replace(state, params=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.params))


# Logged at steps 1 and 10 alone; a checkpoint at 3 is whole, parameters break after step 4.
FAR_LOGS = dataclasses.replace(PACE, log_every=100)


@pytest.mark.parametrize(("stop", "found_at"), [(None, 6), (5, 5)])
def test_a_loss_that_is_not_finite_between_logs_is_never_saved(tmp_path, stop, found_at):
    """At the next checkpoint, and where the run is asked to stop."""
    of, taken, rows = members()[0], [], []

    def fresh():
        return init_state(of.dictionary, adam(1.0).transform, normaliser(of.site), of.seed, of.settings)

    step = make_step(of.dictionary, adam(1.0), Schedule(), TOTAL, 40)
    options = {
        "after_step": lambda state, block, done: broken(state) if done == 4 else state,
        "progress": taken.append, "should_stop": lambda: len(taken) == stop, "log": rows.append,
    }  # fmt: skip
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(InputError, match=f"the loss is nan at step {found_at}: lower"):
            run(fresh(), step, OneSite(of.site), FAR_LOGS, checkpoints=checkpoints, **options)
        assert checkpoints.latest() == 3
        restored = checkpoints.restore(fresh())
    assert [row["step"] for row in rows] == [1]
    assert_same(run(restored, step, OneSite(of.site), PACE, log=rows.append, checkpoints=None), alone(of))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [0, 1])
def test_an_ensemble_is_saved_while_one_member_is_left(tmp_path, way, kept):
    groups, states, steps = ensemble(way, members()[:2])  # one group

    def after_step(states, block, done):
        (own,) = states
        for i in range(kept, 2) if done == 4 else ():
            own = with_member(own, i, broken(member_state(own, i)))
        return (own,)

    def taken(checkpoints):
        options = {"after_step": after_step, "checkpoints": checkpoints, "pace": FAR_LOGS}
        return go(groups, states, steps, **options)

    with Checkpoints(tmp_path / "c") as checkpoints:
        if kept:
            taken(checkpoints)
            assert checkpoints.latest() == TOTAL
        else:
            with pytest.raises(InputError, match="the loss is nan at step 6"):
                taken(checkpoints)
            assert checkpoints.latest() == 3
        (restored,) = checkpoints.restore(ensemble(way, members()[:2])[1])
    sound = [bool(jnp.isfinite(member_state(restored, i).params["W_dec"]).all()) for i in range(2)]
    assert sound == ([True, False] if kept else [True, True])


def test_a_site_that_is_not_harvested_is_refused_before_anything_is_made():
    given = [*members(), dataclasses.replace(members()[0], site="resid_post.2", name="astray")]
    groups, blocks = group(given), FakeBlocks()
    with pytest.raises(InputError, match=r"resid_post\.2 of astray is not among .*mlp_out\.1"):
        run_ensemble((), (), groups, blocks, PACE, log=print, checkpoints=None)
    assert blocks.asked == []
