"""Labels from patterns of firing: every rule on counts made by hand, and on planted connections."""

import numpy as np
import pytest
from scipy import sparse

from sparse_jax.connectors.code_columns import code_columns
from sparse_jax.connectors.labels import CONDITIONS, FAILS, HOLDS, NEGATIVE, POSITIVE, UNTESTED, label_targets
from sparse_jax.connectors.synthetic import planted_connections
from sparse_jax.errors import InputError


def blocks(*rows):
    """Inputs `[tokens, n]` and one target, of rows (inputs that are on, tokens, firings of the target)."""
    n = 1 + max((i for on, _, _ in rows for i in on), default=0)
    inputs = np.concatenate([np.repeat([[float(i in on) for i in range(n)]], tokens, axis=0) for on, tokens, _ in rows])
    fires = np.concatenate([np.arange(tokens) < fired for _, tokens, fired in rows])
    shuffled = np.random.default_rng(0).permutation(len(fires))
    return sparse.csc_array(inputs[shuffled].astype(np.float32)), sparse.csc_array(
        fires[shuffled, None].astype(np.float32)
    )


def labelled(weights, *rows, **options):
    inputs, fires = blocks(*rows)
    return label_targets(inputs, fires, np.array(weights, float)[:, None], **options)


NONE = ((), 1000, 50)


@pytest.mark.parametrize(
    ("rows", "label", "status"),
    [
        ([((0,), 50, 40), ((1,), 50, 40), NONE], "OR", HOLDS),
        ([((0,), 50, 39), ((1,), 50, 40), NONE], "weighted sum", FAILS),
        # 49 tokens are no P, whatever they say.
        ([((0,), 49, 49), ((1,), 50, 40), NONE], "weighted sum", UNTESTED),
        ([((0,), 50, 40), ((1,), 50, 40), ((), 1000, 51)], "weighted sum", FAILS),
        # Tokens with both are of no account.
        ([((0,), 50, 40), ((1,), 50, 40), ((0, 1), 500, 0), NONE], "OR", HOLDS),
        # Three inputs of which two suffice.
        ([((0,), 60, 60), ((1,), 60, 0), ((2,), 60, 60), NONE], "OR", HOLDS),
    ],
)
def test_or(rows, label, status):
    found = labelled([1, 1, 1][: 1 + max(i for on, _, _ in rows for i in on)], *rows)
    assert (found.label[0], found.status[0, 0]) == (label, status)
    assert ("OR" in found.note(0)) == (status == UNTESTED)


@pytest.mark.parametrize(
    ("rows", "label", "status"),
    [
        ([((0,), 50, 10), ((1,), 50, 10), ((0, 1), 50, 40), NONE], "AND", HOLDS),
        ([((0,), 50, 11), ((1,), 50, 10), ((0, 1), 50, 40), NONE], "weighted sum", FAILS),
        ([((0,), 50, 10), ((1,), 50, 10), ((0, 1), 50, 39), NONE], "weighted sum", FAILS),
        ([((0,), 50, 10), ((1,), 50, 10), ((0, 1), 49, 49), NONE], "weighted sum", UNTESTED),
        ([((0,), 50, 10), ((1,), 49, 0), ((0, 1), 50, 50), NONE], "weighted sum", UNTESTED),
        # What fails with what was counted is not untested.
        ([((0,), 50, 10), ((1,), 49, 0), ((0, 1), 50, 0), NONE], "weighted sum", FAILS),
    ],
)
def test_and(rows, label, status):
    found = labelled([1, 1], *rows)
    assert (found.label[0], found.status[0, 1]) == (label, status)


def test_and_of_three():
    singles = [((i,), 60, 0) for i in range(3)]
    pairs = [((i, j), 60, 0) for i, j in ((0, 1), (0, 2), (1, 2))]
    found = labelled([3, 2, 1], *singles, *pairs, ((0, 1, 2), 60, 60), NONE)
    assert found.label[0] == "AND"
    together = [test for test in found.evidence(0) if test.condition == "together"]
    assert [(test.positive, test.tokens, test.fired) for test in together] == [((0, 1, 2), 60, 60)]


def test_what_comes_with_the_one_that_matters_is_no_and():
    # 1 and 2 are on together where 0 is, which suffices.
    rows = [((0,), 60, 60), ((1,), 60, 0), ((2,), 60, 0), ((0, 1, 2), 60, 60), ((1, 2), 60, 0), NONE]
    assert labelled([3, 1, 1], *rows).status[0, 1] == FAILS


@pytest.mark.parametrize(
    ("rows", "label", "status"),
    [
        ([((0,), 50, 40), ((0, 1), 50, 10), NONE], "AND-NOT", HOLDS),
        ([((0,), 50, 39), ((0, 1), 50, 10), NONE], "weighted sum", FAILS),
        ([((0,), 50, 40), ((0, 1), 50, 11), NONE], "weighted sum", FAILS),
        ([((0,), 50, 40), ((0, 1), 49, 0), NONE], "weighted sum", UNTESTED),
        ([((0,), 49, 49), ((0, 1), 49, 49), NONE], "weighted sum", UNTESTED),
    ],
)
def test_and_not(rows, label, status):
    found = labelled([1, -1], *rows)
    assert (found.label[0], found.status[0, 2]) == (label, status)


def test_evidence_of_an_and_not():
    found = labelled([1, -1], ((0,), 50, 40), ((0, 1), 60, 6), ((1,), 140, 7), NONE)
    assert found.overlap(0) == 60 / 200
    counts = {(t.condition, t.positive, t.negative): (t.tokens, t.fired, t.enough) for t in found.evidence(0)}
    assert counts == {
        ("none", (), ()): (1140, 57, True),
        ("exactly", (0,), ()): (110, 46, True),
        ("not", (0,), (1,)): (50, 40, True),
        ("and", (0,), (1,)): (60, 6, True),
        ("input", (), (1,)): (200, 13, True),
    }


def test_a_positive_weight_makes_no_and_not():
    found = labelled([1, 1], ((0,), 60, 60), ((0, 1), 60, 0), NONE)
    assert found.label[0] == "weighted sum"
    assert found.overlap(0) is None


def test_or_comes_first():
    # 1 stops 0, but with 2 it is an OR as well: the label is the first that holds, the status tells of both.
    rows = [((0,), 500, 500), ((2,), 60, 60), ((0, 1), 60, 0), NONE]
    found = labelled([1, -1, 1], *rows)
    assert found.label[0] == "OR"
    assert found.status[0].tolist() == [HOLDS, FAILS, HOLDS]
    assert found.note(0) == ""


def test_no_inputs():
    found = labelled([0, 0], ((0, 1), 60, 60), NONE)
    assert found.label[0] == "no inputs"
    assert [(t.condition, t.tokens, t.fired) for t in found.evidence(0)] == [("none", 1060, 110)]


def test_conditions_are_those_of_plain_counting():
    rng = np.random.default_rng(0)
    inputs = rng.random((3000, 30)) * (rng.random((3000, 30)) < 0.3)
    targets = rng.random((3000, 7)) * (rng.random((3000, 7)) < 0.4)
    W = rng.normal(size=(30, 7)) * (rng.random((30, 7)) < 0.5)
    found = label_targets(sparse.csc_array(inputs.astype(np.float32)), sparse.csc_array(targets), W)
    mean = inputs.sum(axis=0) / (inputs > 0).sum(axis=0)
    on, fires = inputs > 0, targets > 0
    for j in range(7):
        strength = np.abs(W[:, j]) * mean
        order = np.argsort(-strength)
        positive = [i for i in order if W[i, j] > 0][:POSITIVE]
        negative = [i for i in order if W[i, j] < 0][:NEGATIVE]
        assert found.positive[j][: len(positive)].tolist() == positive
        assert found.negative[j][: len(negative)].tolist() == negative
        for c, (kind, some, stop) in enumerate(CONDITIONS):
            if max(some, default=-1) >= len(positive) or max(stop, default=-1) >= len(negative):
                continue
            its = [positive[i] for i in some]
            others = [i for i in positive if i not in its]
            met = on[:, its].all(axis=1)
            if kind in ("none", "exactly", "together"):
                met &= ~on[:, others].any(axis=1)
            if kind in ("and", "input"):
                met &= on[:, negative[stop[0]]]
            if kind == "not":
                met &= ~on[:, negative[stop[0]]]
            assert (found.tokens[j, c], found.fired[j, c]) == (met.sum(), (met & fires[:, j]).sum()), (kind, some, stop)


def test_strength_chooses_inputs():
    weights = np.full(8, 1.0)
    rows = [((i,), 60, 60) for i in range(8)]
    assert labelled(weights, *rows, NONE).positive[0].tolist() == [0, 1, 2, 3, 4, 5]
    strengths = np.arange(8.0)
    assert labelled(weights, *rows, NONE, strengths=strengths).positive[0].tolist() == [7, 6, 5, 4, 3, 2]


def test_min_tokens():
    rows = [((0,), 30, 30), ((1,), 30, 30), NONE]
    assert labelled([1, 1], *rows).label[0] == "weighted sum"
    assert labelled([1, 1], *rows, min_tokens=30).label[0] == "OR"


@pytest.fixture(scope="module")
def planted():
    return planted_connections(tokens=60_000, n_inputs=64, n_targets=48, density=(0.01, 0.04), seed=3)


@pytest.mark.parametrize("which", ["true", "least squares", "thresholded"])
def test_planted_labels_come_back(planted, which):
    train, held_out = planted.pair.split(0.5)
    W = planted.weights
    if which != "true":
        X, Y = (side.dense(slice(None)).astype(np.float64) for side in (train.inputs, train.targets))
        X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
        W = np.linalg.lstsq(X, Y, rcond=None)[0]
        if which == "thresholded":
            W = np.where(np.abs(W) * X.std(axis=0)[:, None] > 0.05 * Y.std(axis=0), W, 0)
    found = label_targets(held_out.inputs, held_out.targets, W)
    known = planted.label != ""
    right = np.char.lower(found.label[known].astype(str)) == planted.label[known]
    assert known.sum() == 24
    assert right.mean() >= 0.9


def test_codes_by_feature_are_those_of_the_tokens(planted):
    site = planted.pair.targets.__class__("s", 4, np.array([[0.5, 0, 2], [0, 0, -1]]), np.array([[3, 3, 1], [0, 0, 2]]))
    np.testing.assert_array_equal(code_columns(site).toarray(), [[0, 2, 0, 0.5], [0, 0, 0, 0]])
    dense = planted.pair.inputs.dense(slice(None))
    columns = code_columns(planted.pair.inputs)
    np.testing.assert_array_equal(columns.toarray(), dense)
    assert all((np.diff(columns.indices[a:b]) > 0).all() for a, b in zip(columns.indptr, columns.indptr[1:]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"W": np.zeros((3, 1))}, "W"),
        ({"targets": sparse.csc_array(np.zeros((4, 1)))}, "tokens"),
        ({"strengths": np.ones(3)}, "strengths"),
        ({"min_tokens": 0}, "min_tokens 0"),
    ],
)
def test_input_that_does_not_fit_is_refused(change, said):
    inputs, fires = blocks(((0, 1), 60, 60), NONE)
    with pytest.raises(InputError, match=said):
        label_targets(**({"inputs": inputs, "targets": fires, "W": np.ones((2, 1))} | change))
