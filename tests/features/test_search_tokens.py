"""Search by tokens and regular expressions: the planted feature comes first, and every figure is plain counting."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations.blocks import activations
from sparse_jax.errors import InputError
from sparse_jax.features.counted_codes import chosen_firings, count_firings, counted_codes
from sparse_jax.features.search_tokens import TargetSums, regex_target, target_sums, token_target
from sparse_jax.features.target_scores import ranking, scores_of
from tests.features import planted as p


@pytest.fixture(scope="module")
def made():
    return p.planted()


def run(made, target, numbers=None, **options):
    numbers = np.arange(200) if numbers is None else numbers
    return target_sums(made.lm, made.coder, p.SITE, made.rows, numbers, target, **options)


def plain(made, numbers, max_norm=np.inf):
    """(tokens, codes with 0 where a place does not count, which places count), straight from the model."""
    tokens, _, mask, _ = made.rows[numbers]
    x = np.asarray(activations(made.lm, jnp.array(tokens[: len(tokens) // 8 * 8]), p.SITE))
    codes = np.asarray(made.coder.encode(x.reshape(-1, p.D))).reshape(*x.shape[:2], -1)
    counted = mask & (np.linalg.norm(x, axis=-1) <= max_norm)
    return tokens, np.maximum(codes, 0) * counted[..., None], counted


@pytest.mark.parametrize("by", ["f1", "correlation", "firing_correlation"])
@pytest.mark.parametrize(
    ("feature", "target"),
    [
        (p.TOKEN, token_target([p.token(" king")])),
        (p.TOKEN, regex_target(" k(ing)", p.strings())),
        (p.BIGRAM, regex_target(r"New York", p.strings(), ends=True)),
        (p.QUOTES, regex_target(r" “[^”]*", p.strings())),
        (p.WRONG, token_target([p.token(" is")])),
        (p.POSITION, lambda tokens: np.broadcast_to(np.arange(p.CONTEXT)[:, None] == 7, (*tokens.shape, 1))),
    ],
)
def test_the_planted_feature_is_first(made, feature, target, by):
    scores = run(made, target).scores()
    assert ranking(getattr(scores, by)[:, 0])[0] == feature
    assert scores.f1[feature, 0] == 1
    assert scores.firing_correlation[feature, 0] == pytest.approx(1)


def test_every_sum_is_plain_counting(made):
    """Masked places, outliers and the rows that fill a batch up count for nothing."""
    numbers = np.random.default_rng(0).permutation(200)[:48]
    kings, words = token_target([p.token(" king")]), token_target(range(40, 120))
    both = lambda tokens: np.concatenate([kings(tokens), words(tokens)], axis=-1)  # noqa: E731
    max_norm = 2.0  # less than where the MLP has written an answer
    tokens, codes, counted = plain(made, numbers, max_norm)
    assert 10 < (made.rows[numbers].mask & ~counted).sum() < 100
    sums = run(made, both, numbers, max_norm=max_norm, batch_rows=32)
    holds = both(tokens) & counted[..., None]
    assert sums.places == counted.sum()
    np.testing.assert_array_equal(sums.target, holds.sum(axis=(0, 1)))
    np.testing.assert_array_equal(sums.fired, (codes > 0).sum(axis=(0, 1)))
    np.testing.assert_array_equal(sums.hits, np.einsum("rpf,rpt->ft", codes > 0, holds.astype(int)))
    np.testing.assert_allclose(sums.sums, codes.sum(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(sums.squares, (codes.astype(float) ** 2).sum(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(sums.hit_sums, np.einsum("rpf,rpt->ft", codes, holds), rtol=1e-5, atol=1e-5)
    # And the scores, feature by feature.
    scores, c = sums.scores(), codes[counted].astype(float)
    for feature in range(p.N_FEATURES):
        fires = c[:, feature] > 0
        for t in range(2):
            y = holds[counted][:, t]
            got = [float(figure[feature, t]) for figure in scores]
            if not fires.any():
                assert np.isnan(got[0])
                continue
            precision, recall = y[fires].mean(), fires[y].mean()
            f1 = 0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
            due = [precision, recall, f1, np.corrcoef(c[:, feature], y)[0, 1], np.corrcoef(fires, y)[0, 1]]
            np.testing.assert_allclose(got, due, rtol=1e-4, atol=1e-6)


def test_parts_add_up(made):
    target = token_target([p.token(" is")])
    whole = run(made, target)
    parts = run(made, target, np.arange(70)).merge(run(made, target, np.arange(70, 200)))
    for name, a, b in zip(TargetSums._fields, whole, parts):
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)
    assert whole.fired.dtype == whole.hits.dtype == np.int64


def test_scores_by_hand():
    """c = [2, 0, 1, 0], y = [1, 1, 0, 0]: see the head of `target_scores`."""
    scores = scores_of(4, 2, 2, 3.0, 5.0, 1, 2.0)
    np.testing.assert_allclose(scores[:3], 0.5)
    np.testing.assert_allclose(scores.correlation, 0.125 / np.sqrt(0.6875 * 0.25))
    np.testing.assert_allclose(scores.firing_correlation, 0, atol=1e-12)
    silent = scores_of(4, 2, 0, 0.0, 0.0, 0, 0.0)
    assert np.isnan(silent.precision)
    assert np.isnan(silent.correlation)
    assert (silent.recall, silent.f1) == (0, 0)
    assert np.isnan(scores_of(4, 0, 2, 3.0, 5.0, 0, 0.0).recall)


def test_ranking():
    np.testing.assert_array_equal(ranking(np.array([1, np.nan, 3, 1, -np.inf])), [2, 0, 3, 4, 1])
    np.testing.assert_array_equal(ranking(np.array([1, 2, 3.0]), 2), [2, 1])


@pytest.mark.parametrize(
    ("pattern", "ends", "due"),
    [
        ("b", False, [1, 0, 0, 0]),
        ("bc", False, [1, 1, 0, 0]),
        ("bc", True, [0, 1, 0, 0]),
        ("cd e", False, [0, 1, 1, 0]),
        ("cd e", True, [0, 0, 1, 0]),
        ("d", False, [0, 1, 0, 0]),
        ("x*", False, [0, 0, 0, 0]),
        (".+", False, [1, 1, 1, 1]),
        ("^ab|.$", False, [1, 0, 0, 1]),
        ("e.f", False, [0, 0, 1, 1]),
    ],
)
def test_matches_and_tokens_by_hand(pattern, ends, due):
    strings = ["", "ab", "cd", " e", "\nf"]
    holds = regex_target(pattern, strings, ends=ends)(np.array([[1, 2, 3, 4]]))
    np.testing.assert_array_equal(holds[0, :, 0], np.array(due, bool))
    # A token that stands for no text is in no match.
    holds = regex_target("bc", strings)(np.array([[1, 0, 2, 3]]))
    assert holds[0, :, 0].tolist()[0::2] == [True, True]


def test_matches_against_characters(made):
    """A token is hit where one of its characters lies inside a match."""
    pattern, tokens = r"[a-c]\w+ [A-Z]", made.rows[np.arange(30)].tokens
    holds = regex_target(pattern, p.strings())(tokens)[..., 0]
    assert 0.02 < holds.mean() < 0.9
    for row, found in zip(tokens, holds):
        pieces = [p.strings()[i] for i in row]
        inside = {i for match in re.finditer(pattern, "".join(pieces)) for i in range(*match.span())}
        owner = np.repeat(np.arange(len(row)), [len(piece) for piece in pieces])
        np.testing.assert_array_equal(found, np.isin(np.arange(len(row)), owner[sorted(inside)]))


def test_a_bad_expression():
    with pytest.raises(InputError, match=r"regular expression '\(a'"):
        regex_target("(a", ["a"])


# Firings


def test_firings_are_the_codes_above_zero(made):
    numbers, features = np.array([5, 190, 7, 60, 61, 62, 63, 64, 65, 3, 2]), [42, 3, 17]
    tokens, codes, _ = plain(made, np.concatenate([numbers, numbers[:5]]))
    codes, found, start = codes[: len(numbers)], {}, 0
    due = {(r, at, f): codes[r, at, f] for r, at, f in np.argwhere(codes > 0) if f in features}
    for batch in chosen_firings(made.lm, made.coder, p.SITE, made.rows, numbers, features):
        np.testing.assert_array_equal(batch.rows.tokens[:3], tokens[start : start + 3])
        for r, position, f, value in zip(batch.row, batch.position, batch.feature, batch.value):
            assert batch.counted[r, position]
            found[r + start, position, features[f]] = value
        start += 8
    assert found.keys() == due.keys()
    assert len(due) > 20
    np.testing.assert_allclose([found[key] for key in due], list(due.values()), rtol=1e-4, atol=1e-5)
    fired, places = count_firings(made.lm, made.coder, p.SITE, made.rows, numbers)
    np.testing.assert_array_equal(fired, (codes > 0).sum(axis=(0, 1)))
    assert places == made.rows[numbers].mask.sum()


def test_one_program_for_all_batches(made):
    before = counted_codes._cache_size()
    for features in ([1, 2], [3, 4]):
        list(chosen_firings(made.lm, made.coder, p.SITE, made.rows, np.arange(21), features, max_norm=5.0))
    assert counted_codes._cache_size() - before <= 1
