"""Correlations against NumPy and by hand, means with errors, and judged texts counted by hand."""

import math

import numpy as np
import pytest

from sparse_jax.features.explain import Example, detection, fuzzing, judging
from sparse_jax.features.explain.judging import Item
from sparse_jax.features.explain.requests import Reply
from sparse_jax.features.explain.scores import correlation, mean_and_error, simulation_scores


def example(activations, counts=None, tokens=None):
    activations = np.asarray(activations, np.float32)
    tokens = tokens or tuple(f" w{i}" for i in range(len(activations)))
    counts = np.ones(len(activations), bool) if counts is None else np.asarray(counts, bool)
    return Example(tuple(tokens), activations, counts, 0, 0, "document")


def test_correlation():
    assert correlation([0, 1, 2], [0, 1, 5]) == pytest.approx(5 / math.sqrt(28))
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 50))
    assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert correlation(3 * a + 1, a) == pytest.approx(1)
    assert correlation(np.ones(3), [0, 1, 2]) == 0.0
    assert correlation([0, 1, 2], np.ones(3)) is None
    assert correlation([], []) is None


def test_scores_are_over_all_tokens_of_the_fragments_that_count():
    generator = np.random.default_rng(1)
    examples = [example(generator.random(8), generator.random(8) < 0.7) for _ in range(5)]
    simulated = [generator.random(8) for _ in examples]
    pairs = list(zip(examples, simulated))
    found = simulation_scores(pairs[:2], pairs[2:])

    def by_hand(part):
        a = [s[i] for e, s in part for i in range(8) if e.counts[i]]
        b = [e.activations[i] for e, s in part for i in range(8) if e.counts[i]]
        return np.corrcoef(a, b)[0, 1]

    assert found["top"] == pytest.approx(by_hand(pairs[:2]))
    assert found["random"] == pytest.approx(by_hand(pairs[2:]))
    assert found["both"] == pytest.approx(by_hand(pairs))
    assert found["both"] != pytest.approx((found["top"] + found["random"]) / 2, abs=1e-3)


def test_means_and_errors():
    found = mean_and_error([1.0, 2.0, None, 6.0])
    assert found == {"mean": 3.0, "error": pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3)), "n": 3}
    assert mean_and_error([2.0]) == {"mean": 2.0, "error": None, "n": 1}
    assert mean_and_error([None]) == {"mean": None, "error": None, "n": 0}


def test_levels_and_marks():
    shown = example([0, 10.0, 0.4, 5.0, 0.6], tokens=["It", " was", " so", "\n", "."])
    np.testing.assert_array_equal(shown.levels(10.0), [0, 10, 0, 5, 1])
    np.testing.assert_array_equal(shown.active(10.0), [False, True, False, True, True])
    assert shown.marked(shown.active(10.0)) == "It[[ was]] so[[\n.]]"
    # Where all rounds to nothing, the strongest.
    np.testing.assert_array_equal(shown.active(1000.0), [False, True, False, False, False])
    assert not example([0, 0]).active(1.0).any()


def test_balanced_accuracy_by_hand():
    items = [Item("a", True), Item("b", True), Item("c", True), Item("d", False), Item("e", False)]
    batches = [items[:3], items[3:]]
    # a found, b missed, c not answered; d refused, e taken.
    found = judging.read([Reply("1\t1\n2\t0"), Reply("1\t0\n2\t1")], batches)
    assert found.accuracy == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found.unanswered == 1
    for text in ("1\t1\n2\t1\n3\t1", "1\t0\n2\t0\n3\t0"):
        assert judging.read([Reply(text), Reply(text)], batches).accuracy == 0.5
    # Nobody is right by saying nothing.
    assert judging.read([Reply("no"), Reply("no")], batches).accuracy == 0.0


def test_detection_asks_for_every_text_once():
    active, silent = [example([1.0], tokens=[f"yes{i}"]) for i in range(10)], []
    silent = [example([0.0], tokens=[f"no{i}"]) for i in range(10)]
    items = detection.items(active, silent)
    batches = judging.batches(items, (0, 1))
    assert [len(batch) for batch in batches] == [10, 10]
    assert sorted(item for batch in batches for item in batch) == sorted(items)
    assert all(item.truth == item.text.startswith("yes") for item in items)
    assert {sum(item.truth for item in judging.batches(items, (0, seed))[0]) for seed in range(30)} > {4, 5, 6}
    request = detection.request("the token", batches[0])
    assert all(f'\t"{item.text}"\n' in request.user for item in batches[0])


def test_fuzzing_marks_the_right_and_as_many_wrong_tokens():
    generator = np.random.default_rng(2)
    examples = []
    for i in range(10):
        activations = np.where(generator.random(24) < 0.25, generator.random(24), 0)
        activations[i] = 1.0
        counts = np.arange(24) > 0
        activations[~counts] = 0
        activations[1] = 0.7
        examples.append(example(activations, counts, [f"<{i}.{j}>" for j in range(24)]))
    batches = fuzzing.batches(examples, 1.0, (3, 4))
    assert [len(batch) for batch in batches] == [10, 10]
    assert [sum(item.truth for item in batch) for batch in batches] == [5, 5]
    text_of = {e.text: e for e in examples}
    seen = []
    for batch in batches:
        plain = [item.text.replace("[[", "").replace("]]", "") for item in batch]
        assert len(set(plain)) == len(batch)
        for item, text in zip(batch, plain):
            e = text_of[text]
            inside = "".join(part.split("]]")[0] for part in item.text.split("[[")[1:])
            where = np.array([token in inside for token in e.tokens])
            seen.append((text, item.truth))
            assert where.sum() == e.active(1.0).sum()
            if item.truth:
                np.testing.assert_array_equal(where, e.active(1.0))
            else:
                assert not (e.activations[where] > 0).any()
                assert e.counts[where].all()
    assert len(set(seen)) == 20


def test_texts_that_could_not_be_marked_wrongly_are_left_out():
    everywhere = example([1.0, 0.5])
    usual = example([1.0, 0.0], tokens=[" x", " y"])
    assert fuzzing.batches([everywhere], 1.0, (0,)) == []
    batches = fuzzing.batches([everywhere, usual], 1.0, (0,))
    assert sorted(item for batch in batches for item in batch) == [Item(" x[[ y]]", False), Item("[[ x]] y", True)]
