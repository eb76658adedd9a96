"""Ensembles: what forms a group, and that each member is the run it would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import DICTIONARIES, L1, PCA, BatchTopK, JumpReLU, Lp, MatchingPursuit, MultiTopK, TopK
from sparse_jax.errors import InputError
from sparse_jax.training import (
    Member,
    Schedule,
    adam,
    group,
    init_ensemble,
    init_state,
    make_ensemble_step,
    make_step,
    member_state,
    settings_for,
    with_member,
)
from sparse_jax.training.ensemble import trained

D, ROWS, TOTAL = 8, 64, 20
TRAINED = [kind for kind in DICTIONARIES if kind not in ("pca", "neurons", "random")]
WEIGHT = jnp.ones(ROWS).at[5:9].set(0)


def member(dictionary, name="a", site="resid_post.0", seed=0, rate=1e-2, target=None):
    dictionary = dictionary if dictionary.d_in else dictionary.sized(D)
    return Member(site, dictionary, settings_for(dictionary, adam(rate), target), seed, name)


def normaliser():
    return Normaliser(jnp.full(D, 3.0), jnp.array(2.0))


def batch(i):
    return 3 + 2 * jax.random.normal(jax.random.key(i), (ROWS, D))


def alone(of, steps=6, dead_window=100):
    """(state, metrics) of the single run with a member's dictionary, settings and seed."""
    step = make_step(of.dictionary, adam(7.0), Schedule(), TOTAL, dead_window)
    state = init_state(of.dictionary, adam(7.0).transform, normaliser(), of.seed, of.settings)
    for i in range(steps):
        state, metrics = step(state, batch(i), WEIGHT)
    return state, metrics


def together(of, way, steps=6, dead_window=100):
    step = make_ensemble_step(of, adam(7.0), Schedule(), TOTAL, dead_window, way=way)
    states = init_ensemble(of, adam(7.0).transform, normaliser(), way)
    for i in range(steps):
        states, metrics = step(states, batch(i), WEIGHT)
    return states, metrics


def numbers(tree):
    """Leaves as NumPy arrays, keys as their data."""
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def assert_same(one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert a.dtype == b.dtype
        if tolerance and a.dtype == np.float32:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


# What forms a group


def test_members_that_differ_only_in_what_is_traced_form_a_group():
    members = [
        member(L1(l1=1.0), "a"),
        member(L1(l1=2.0), "b", seed=3, rate=1e-3),
        member(TopK(k=3), "c"),
        member(L1(l1=1.0), "d", target=4.0),
        member(TopK(k=5, aux_coefficient=0.5), "e"),
        member(L1(l1=1.0, tied=True), "f"),
        member(L1(l1=1.0, n_features=24), "g"),
        member(L1(l1=1.0), "h", site="resid_post.1"),
        member(TopK(k=4), "i"),
    ]
    groups = group(members)
    assert [[m.name for m in of.members] for of in groups] == [["a", "b", "d"], ["c", "e", "i"], ["f"], ["g"], ["h"]]
    assert groups[1].dictionary.k == 5
    assert [of.site for of in groups] == [*["resid_post.0"] * 4, "resid_post.1"]
    assert groups[0].members[1] is members[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TopK(k=3), BatchTopK(k=3)),
        (Lp(p=0.5), Lp(p=1.0)),  # does not anneal
        (Lp(p=0.5, hold_strength=False), Lp(p=1.0, hold_strength=False)),
        (TopK(k=3), TopK(k=3, anneal_from=6)),
        (TopK(k=2, n_features=512), TopK(k=8, n_features=512)),  # a sparse and a dense gradient
        (TopK(k=3, aux_k=2), TopK(k=3, aux_k=3)),
        (MatchingPursuit(k=3), MatchingPursuit(k=2)),
        (JumpReLU(penalty="quadratic", target_l0=3.0), JumpReLU(penalty="quadratic", target_l0=4.0)),
    ],
)
def test_what_changes_the_program_makes_another_group(one, other):
    assert len(group([member(one, "a"), member(other, "b")])) == 2


@pytest.mark.parametrize("kind", TRAINED)
def test_the_fields_of_coefficients_are_those_that_give_their_values(kind):
    dictionary = DICTIONARIES[kind]().sized(D)
    assert set(dictionary.coefficient_fields) <= set(dictionary.coefficients)
    for name, field in dictionary.coefficient_fields.items():
        value = 7 if field == "k" else 0.75
        assert dataclasses.replace(dictionary, **{field: value}).coefficients[name] == value


def test_what_cannot_be_grouped_is_said():
    with pytest.raises(InputError, match="several members are called 'a', 'b'"):
        group([member(L1(l1=value), name) for value, name in ((1.0, "b"), (2.0, "a"), (3.0, "a"), (1.0, "b"))])
    with pytest.raises(InputError, match="at least one"):
        group([])
    with pytest.raises(InputError, match="member 'x' has no size"):
        group([Member("resid_post.0", L1(), settings_for(L1(), adam(1e-3)), 0, "x")])
    other = dataclasses.replace(member(TopK(k=3), "x"), settings=settings_for(TopK(k=4), adam(1e-3)))
    with pytest.raises(InputError, match="k 3 in its dictionary and 4 in its settings"):
        group([other])
    with pytest.raises(InputError, match=r"'scan'.*give loop or vmap"):
        init_ensemble(group([member(L1())])[0], adam(1e-3).transform, normaliser(), "scan")
    with pytest.raises(InputError, match="pca dictionary has no sparsity coefficient"):
        member(PCA(n_features=4), target=3.0)


# Each member is the run that it would be alone


def varied(kind):
    """Members of one group that differ in all they may."""
    dictionary = DICTIONARIES[kind]
    k = "k" in dictionary().coefficient_fields.values()
    changes = [{"k": 2}, {"k": 5}, {"k": 3}] if k else [{}, {}, {}]
    fields = [field for field in dictionary().coefficient_fields.values() if field not in ("k", "p")]
    small = {"n_features": 20} | ({"k": 3} if "k" in dictionary.__dataclass_fields__ else {})
    for change, value in zip(changes, (0.05, 0.3, 1.5)):
        change |= dict.fromkeys(fields, value)
    targets = (None, 4.0, 9.0) if dictionary().sparsity_coefficient else (None, None, None)
    return [
        member(dictionary(**(small | change)), f"{kind} {i}", seed=seed, rate=rate, target=target)
        for i, (change, seed, rate, target) in enumerate(zip(changes, (0, 1, 0), (1e-2, 3e-3, 3e-3), targets))
    ]


@pytest.mark.parametrize("kind", TRAINED)
def test_in_a_loop_each_member_is_its_single_run(kind):
    (of,) = group(varied(kind))
    states, metrics = together(of, "loop")
    for i, each in enumerate(of.members):
        state, single = alone(each)
        # Where the largest k bounds the shapes, XLA may add up in another order.
        tolerance = {} if each.dictionary == of.dictionary or "k" not in vars(each.dictionary) else TOLERANCE
        assert_same(member_state(states, i), state, **tolerance)
        assert set(metrics) == set(single)
        for name, value in single.items():
            np.testing.assert_allclose(metrics[name][i], value, rtol=1e-5, atol=1e-6)
    assert len({np.asarray(member_state(states, i).params["W_dec"]).tobytes() for i in range(3)}) == 3


def test_a_larger_k_does_not_change_the_form_of_a_members_step():
    """TopK's gradient is sparse where k is small among the features, and dense elsewhere."""
    groups = group([member(TopK(k=k, n_features=768), f"k {k}") for k in (2, 8, 1, 3, 6)])
    assert [[m.dictionary.k for m in of.members] for of in groups] == [[2, 3], [8, 6], [1]]
    for of in groups:
        states, _ = together(of, "loop")
        for i, each in enumerate(of.members):
            assert_same(member_state(states, i), alone(each)[0])


def test_a_form_that_does_not_depend_on_k_makes_no_group():
    for kind in (BatchTopK, MultiTopK):
        assert len(group([member(kind(k=k, n_features=512), str(k)) for k in (2, 8)])) == 1


TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("kind", ["l1", "topk", "batch-topk", "jump-relu"])
def test_both_ways_are_equal(kind):
    (of,) = group(varied(kind))
    looped, metrics = together(of, "loop")
    stacked, same = together(of, "vmap")
    for i in range(3):
        assert_same(member_state(stacked, i), member_state(looped, i), **TOLERANCE)
    assert jax.tree.map(jnp.shape, metrics) == jax.tree.map(jnp.shape, same)
    assert metrics["loss"].shape == (3,)


def test_vmap_multiplies_in_bfloat16_too():
    (of,) = group([member(L1(l1=value).sized(D, compute_dtype="bfloat16"), str(value)) for value in (0.1, 0.5)])
    stacked, looped = together(of, "vmap")[0], together(of, "loop")[0]
    assert_same(member_state(stacked, 1), member_state(looped, 1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_group_compiles_once_and_consumes_its_states(way, monkeypatch):
    traced, gradient = [], L1.value_and_grad
    monkeypatch.setattr(L1, "value_and_grad", lambda *args: traced.append(1) or gradient(*args))
    (of,) = group(varied("l1"))
    step = make_ensemble_step(of, adam(7.0), Schedule(), TOTAL, 100, way=way)
    states = init_ensemble(of, adam(7.0).transform, normaliser(), way)
    before = states
    for i in range(3):
        states, _ = step(states, batch(i), WEIGHT)
    assert len(traced) == 1
    assert member_params_deleted(before)


def member_params_deleted(states):
    leaves = jax.tree.leaves([state.params for state in states] if isinstance(states, tuple) else states.params)
    return all(leaf.is_deleted() for leaf in leaves)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_members_are_taken_out_and_put_back(way):
    (of,) = group(varied("topk"))
    states, _ = together(of, way, steps=2)
    x = batch(50)
    for i, each in enumerate(of.members):
        one = trained(of, states, i)
        assert one.dictionary == each.dictionary
        assert np.count_nonzero(one.encode(x), axis=1).max() <= each.dictionary.k
    assert np.count_nonzero(trained(of, states, 1).encode(x), axis=1).max() > 3
    kept = numbers([member_state(states, i) for i in (0, 2)])
    changed = dataclasses.replace(member_state(states, 1), age=jnp.full(20, 77, jnp.int32))
    states = with_member(states, 1, changed)
    assert_same(member_state(states, 1), changed)
    for a, b in zip(kept, numbers([member_state(states, i) for i in (0, 2)]), strict=True):
        np.testing.assert_array_equal(a, b)
