"""Clusters of the tokens that fire a unit: planted ways come back; silhouettes as by plain counting."""

import numpy as np
import pytest
from scipy import sparse

from sparse_jax.connectors.clusters import cut, silhouette, unit_clusters
from sparse_jax.errors import InputError

A, B, STOP = 3, 8, 5


def planted(n=400, seed=0):
    """Codes `[tokens, 12]` and a unit: A large with B small, B large with A small, and either stopped by STOP.

    The unit is ReLU(A + B - 3 STOP - 0.5); inputs 0 and 1 are noise without weight.
    """
    rng = np.random.default_rng(seed)
    way = np.repeat(np.arange(4), n)  # the last: silent
    codes = np.zeros((len(way), 12), np.float32)
    for number, (a, b, stop) in enumerate([(0.9, 0.25, 0), (0.25, 0.9, 0), (0.9, 0.25, 1)]):
        at = way == number
        for feature, level in ((A, a), (B, b), (STOP, stop)):
            codes[at, feature] = (level * rng.uniform(0.85, 1.1, n)) if level else 0
    codes[:, :2] = rng.random((len(way), 2)) * (rng.random((len(way), 2)) < 0.5)
    weights = np.zeros(12)
    weights[[A, B, STOP]] = 1, 1, -3
    order = rng.permutation(len(way))
    codes, way = codes[order], way[order]
    unit = np.maximum(codes @ weights - 0.5, 0)
    return sparse.csc_array(codes), weights, sparse.csc_array(np.stack([np.zeros_like(unit), unit], axis=1)), way


def test_planted_ways_are_found():
    codes, weights, fires, way = planted()
    found = unit_clusters(codes, weights, fires, 1, bias=-0.5)
    assert (found.firing, found.stopped, found.sampled) == (800, 400, 1200)
    # STOP, with the weight -3, is the strongest.
    assert sorted(found.inputs) == [A, STOP, B]
    assert found.inputs[0] == STOP
    np.testing.assert_array_equal(found.weights, weights[found.inputs])
    names = [f"IF {i}" for i in found.inputs]
    words = {cluster.words(names) for cluster in found.clusters}
    assert words == {"IF 3 large with IF 8 small", "IF 8 large with IF 3 small", "IF 5 and IF 3 large with IF 8 small"}
    for cluster in found.clusters:
        assert len(np.unique(way[cluster.tokens])) == 1
        assert len(cluster.tokens) == 400
        assert cluster.fires == (0 if way[cluster.tokens[0]] == 2 else 1)
        its = fires.toarray()[cluster.tokens, 1]
        assert (np.diff(its) <= 0).all()
        assert cluster.activation == pytest.approx(its.mean())
    assert found.clusters[-1].fires == 0
    assert found.silhouette > 0.7
    a, b = (list(found.inputs).index(i) for i in (A, B))
    assert found.correlation[a, b] < -0.8


def test_what_is_stopped_is_what_the_negative_inputs_stop():
    codes, weights, fires, _ = planted()
    found = unit_clusters(codes, weights, fires, 1, bias=-5.0)
    # With a bias that nothing overcomes the positive inputs would not have fired it.
    assert found.stopped == 0
    assert not any(cluster.fires == 0 for cluster in found.clusters)


def test_one_way_is_one_cluster():
    rng = np.random.default_rng(1)
    codes = np.zeros((600, 4), np.float32)
    codes[:, :2] = rng.uniform(0.4, 1, (600, 2))
    found = unit_clusters(sparse.csc_array(codes), np.array([1.0, 1.0, 0, 0]), sparse.csc_array(codes[:, :1]), 0)
    (cluster,) = found.clusters
    assert found.silhouette is None
    assert len(cluster.tokens) == 600
    assert cluster.words(["IF 0", "IF 1"]) in ("IF 0 and IF 1 large", "IF 1 and IF 0 large")


def test_one_input_is_one_way():
    codes = sparse.csc_array(np.random.default_rng(1).uniform(0.1, 1, (600, 1)).astype(np.float32))
    assert len(unit_clusters(codes, np.ones(1), codes, 0).clusters) == 1


def test_a_unit_that_never_fires_has_none():
    codes, weights, fires, _ = planted(n=30)
    found = unit_clusters(codes, np.abs(weights), fires, 0, bias=-100)
    assert (found.clusters, found.firing, found.silhouette) == ((), 0, None)


def test_tokens_are_drawn():
    codes, weights, fires, _ = planted()
    found = unit_clusters(codes, weights, fires, 1, bias=-0.5, tokens=90)
    assert (found.sampled, found.firing, found.stopped) == (180, 800, 400)
    drawn = np.concatenate([cluster.tokens for cluster in found.clusters])
    assert len(set(drawn.tolist())) == 180
    again = unit_clusters(codes, weights, fires, 1, bias=-0.5, tokens=90)
    np.testing.assert_array_equal(np.concatenate([cluster.tokens for cluster in again.clusters]), drawn)


def test_silhouette_by_hand():
    # Points 0, 1 | 4: a = 1, 1, alone; b = 4, 3: (3/4 + 2/3 + 0) / 3.
    points = np.array([0.0, 1.0, 4.0])
    value = silhouette(np.abs(points[:, None] - points), np.array([1, 1, 2]))
    assert value == pytest.approx((3 / 4 + 2 / 3) / 3)


@pytest.mark.torch
def test_silhouette_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    points, groups = rng.normal(size=(60, 3)), rng.integers(0, 4, 60)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    assert silhouette(distances, groups) == pytest.approx(metrics.silhouette_score(points, groups))


def test_small_clusters_are_not_cut_off():
    rng = np.random.default_rng(2)
    points = np.concatenate([rng.normal(0, 0.1, (50, 2)), rng.normal(3, 0.1, (50, 2)), rng.normal(9, 0.1, (5, 2))])
    for smallest, sizes in ((20, [50, 55]), (5, [5, 50, 50])):
        groups, _ = cut(points, most=5, smallest=smallest)
        assert sorted(np.bincount(groups)[1:]) == sizes


def test_equal_points_are_one_cluster():
    groups, value = cut(np.ones((100, 3)), most=4, smallest=10)
    assert (len(np.unique(groups)), value) == (1, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"weights": np.ones(5)}, "weights"), ({"unit": 2}, "unit 2"), ({"strongest": 0}, "strongest 0")],
)
def test_input_that_does_not_fit_is_refused(change, said):
    codes, weights, fires, _ = planted(n=30)
    given = {"inputs": codes, "weights": weights, "fires": fires, "unit": 1} | change
    with pytest.raises(InputError, match=said):
        unit_clusters(**given)
