"""Planted connections are what they say they are: targets rebuilt from the inputs by plain formulas."""

import numpy as np
import pytest

from sparse_jax.connectors.synthetic import KINDS, LINEAR_KINDS, planted_connections
from sparse_jax.errors import InputError


@pytest.fixture(scope="module")
def planted():
    return planted_connections(tokens=30_000, n_inputs=64, n_targets=48, seed=3)


@pytest.fixture(scope="module")
def inputs(planted):
    return planted.pair.inputs.dense(slice(None)).astype(np.float64)


def test_densities_lie_in_the_stated_range(planted, inputs):
    # Events cluster in documents, so that what is drawn differs from what is expected by some fifteenth.
    density = (inputs > 0).mean(axis=0)
    assert 0.004 < density.min() < 0.008
    assert 0.012 < density.max() < 0.024
    density = (planted.clean > 0).mean(axis=0)
    assert density.min() > 0.002
    assert density.max() < 0.05


def test_inputs_of_a_group_are_correlated_and_others_are_not(inputs):
    correlation = np.corrcoef(inputs.T)
    same = np.arange(64)[:, None] // 4 == np.arange(64) // 4
    of_group = correlation[same & ~np.eye(64, dtype=bool)]
    assert of_group.min() > 0.15
    assert np.median(of_group) > 0.3
    assert np.abs(correlation[~same]).max() < 0.06


def test_subset_pairs_fire_inside_each_other_with_one_multiple(planted, inputs):
    assert len(planted.subsets) == 16
    for a, b in planted.subsets:
        fires = inputs[:, b] > 0
        assert 50 < fires.sum() < 0.65 * (inputs[:, a] > 0).sum()
        assert (inputs[fires, a] > 0).all()
        ratio = inputs[fires, b] / inputs[fires, a]
        assert np.ptp(ratio) < 1e-5


def test_firing_of_documents_differs_more_than_chance(planted, inputs):
    document = planted.pair.tokens.document
    counts = np.stack([np.bincount(document, inputs[:, i] > 0) for i in range(0, 64, 4)])
    expected = counts.sum(axis=1, keepdims=True) * np.bincount(document) / len(document)
    assert ((counts - expected) ** 2 / expected).mean() > 1.5  # 1 for independent tokens


def test_linear_kinds_are_their_weights_and_others_are_not_linear(planted, inputs):
    design = np.c_[inputs, np.ones(len(inputs))]
    best = design @ np.linalg.solve(design.T @ design, design.T @ planted.clean)
    for j in range(48):
        used = np.flatnonzero(planted.support[:, j])
        assert 1 <= len(used) <= 3
        error = planted.clean[:, j] - inputs @ planted.weights[:, j]
        unexplained = (error**2).mean() / planted.clean[:, j].var()
        assert planted.linear[j] == (planted.kind[j] in LINEAR_KINDS)
        if planted.linear[j]:
            assert unexplained < 1e-10
            assert (planted.weights[used, j] != 0).all()
        else:
            assert ((planted.clean[:, j] - best[:, j]) ** 2).mean() / planted.clean[:, j].var() > 0.15


def test_kinds_do_what_their_names_say(planted, inputs):
    fires = planted.clean > 0
    for j in range(48):
        used = np.flatnonzero(planted.support[:, j])
        on, target, kind = inputs[:, used] > 0, fires[:, j], planted.kind[j]
        if kind == "or":
            np.testing.assert_array_equal(target, on.any(axis=1))
        elif kind in ("and", "product"):
            np.testing.assert_array_equal(target, on.all(axis=1))
        elif kind == "and-not":
            np.testing.assert_array_equal(target, on[:, 0] & ~on[:, 1])
            assert planted.weights[used[0], j] > 0 > planted.weights[used[1], j]
        elif kind == "xor":
            np.testing.assert_array_equal(target, on[:, 0] != on[:, 1])
        elif kind == "weighted sum":
            np.testing.assert_array_equal(target, on[:, 0])
        else:
            beyond = inputs[:, used[0]] - np.median(inputs[on[:, 0], used[0]])
            expected = np.maximum(beyond, 0) if kind == "threshold" else np.where(on[:, 0], np.maximum(-beyond, 0), 0)
            ratio = planted.clean[expected > 1e-6, j] / expected[expected > 1e-6]
            assert np.ptp(ratio) < 1e-3 * ratio.mean()
            assert not planted.clean[expected == 0, j].any()
    assert set(planted.kind) == set(KINDS)
    patterned = np.isin(planted.kind, ("weighted sum", "or", "and", "and-not"))
    np.testing.assert_array_equal(planted.label, np.where(patterned, planted.kind, ""))


def test_noise_has_its_share_of_the_variance_and_stands_where_the_target_fires(planted):
    noisy = planted.pair.targets.dense(slice(None))
    assert not noisy[planted.clean == 0].any()
    assert noisy.min() >= 0
    share = ((noisy - planted.clean) ** 2).mean(axis=0) / planted.clean.var(axis=0)
    np.testing.assert_allclose(share, 0.05, atol=0.015)
    lost = (noisy == 0)[planted.clean > 0].mean()
    assert lost < 0.05
    exact = planted_connections(tokens=2000, n_inputs=64, n_targets=8, noise=0)
    np.testing.assert_array_equal(exact.pair.targets.dense(slice(None)), exact.clean)


def test_a_seed_gives_the_same_again_and_another_does_not():
    one, same, other = (planted_connections(tokens=500, n_inputs=16, n_targets=8, seed=seed) for seed in (1, 1, 2))
    for part in ("values", "indices"):
        np.testing.assert_array_equal(getattr(one.pair.targets, part), getattr(same.pair.targets, part))
    assert one.clean.shape == other.clean.shape
    assert not np.array_equal(one.clean, other.clean)


def test_tokens_stand_in_rows_and_documents(planted):
    tokens = planted.pair.tokens
    np.testing.assert_array_equal(128 * tokens.row + tokens.position, np.arange(30_000))
    lengths = np.bincount(tokens.document)[:-1]
    assert (np.diff(tokens.document) >= 0).all()
    assert lengths.min() >= 200
    assert lengths.max() <= 602


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n_inputs": 18}, "multiple of 4"),
        ({"kinds": ("or", "nor")}, "nor"),
        ({"kinds": ()}, "none"),
        ({"density": (0.01, 0.015)}, "low"),
        ({"noise": 0.6}, "noise"),
        ({"tokens": 0}, "0 tokens"),
    ],
)
def test_what_cannot_be_is_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        planted_connections(**wrong)
