"""Tables of tokens, rules and entropies: plain counting, worked examples, and rules that are planted."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations.blocks import activations
from sparse_jax.features.rules import KINDS, PATTERNS, find_rules, pattern_table
from sparse_jax.features.target_scores import Scores
from sparse_jax.features.token_entropy import (
    base_entropy,
    commonest_shares,
    entropies,
    entropies_of_draws,
    evenly_spaced,
)
from sparse_jax.features.token_table import FiringList, Tables, read_tables, table_of
from tests.features import planted as p


@pytest.fixture(scope="module")
def made():
    return p.planted()


def read(made, numbers, features=range(p.N_FEATURES), **options):
    return read_tables(made.lm, made.coder, p.SITE, made.rows, numbers, list(features), p.VOCAB, **options)


@pytest.fixture(scope="module")
def halves(made):
    return read(made, np.arange(100)), read(made, np.arange(100, 200))


def plain(made, numbers, max_norm=np.inf):
    """`[places]` token and token before (VOCAB: none), and codes `[places, features]`, of the places that count."""
    tokens, _, mask, _ = made.rows[numbers]
    x = np.asarray(activations(made.lm, jnp.array(tokens), p.SITE))
    codes = np.asarray(made.coder.encode(x.reshape(-1, p.D))).reshape(*tokens.shape, -1)
    counted = mask & (np.linalg.norm(x, axis=-1) <= max_norm)
    before = np.array([[p.VOCAB, *row[:-1]] for row in tokens])
    return tokens[counted], before[counted], np.maximum(codes[counted], 0).astype(float)


# Tables


def test_tables_are_plain_counting(made):
    numbers, features, max_norm = np.arange(40), [3, p.TOKEN, 60, 7], 2.0
    here, before, codes = plain(made, numbers, max_norm)
    assert len(here) < made.rows[numbers].mask.sum()
    tables = read(made, numbers, features, max_norm=max_norm)
    assert tables.places == len(here)
    np.testing.assert_array_equal(tables.fired, (codes[:, features] > 0).sum(axis=0))
    np.testing.assert_allclose(tables.sums, codes[:, features].sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(tables.squares, (codes[:, features] ** 2).sum(axis=0), rtol=1e-5)
    for table, ids in ((tables.here, here), (tables.before, before)):
        np.testing.assert_array_equal(table.totals, np.bincount(ids, minlength=p.VOCAB + 1))
        counts = {}
        for column, feature in enumerate(features):
            for token, value in zip(ids, codes[:, feature]):
                if value > 0:
                    count, total = counts.get((column, token), (0, 0.0))
                    counts[column, token] = count + 1, total + value
        assert sorted(counts) == list(zip(table.features, table.tokens))
        np.testing.assert_array_equal(table.counts, [counts[key][0] for key in sorted(counts)])
        np.testing.assert_allclose(table.sums, [counts[key][1] for key in sorted(counts)], rtol=1e-5)
        found = table.at([0, 1, 1], [p.token(" is"), p.token(" king"), p.token(" New")])
        due = [counts.get((f, p.token(t)), (0, 0.0)) for f, t in ((0, " is"), (1, " king"), (1, " New"))]
        np.testing.assert_allclose(np.transpose(found), due, rtol=1e-5)
    assert len(tables.firings.value) == tables.fired.sum()


def test_the_first_position_has_no_token_before(made):
    rows = np.arange(8)
    everywhere = type("All", (), {"__getitem__": lambda _, i: made.rows[i]._replace(mask=np.ones((8, 32), bool))})()
    tables = read_tables(made.lm, made.coder, p.SITE, everywhere, rows, [3], p.VOCAB)
    assert tables.before.totals[p.VOCAB] == 8
    assert tables.here.totals[p.VOCAB] == 0
    assert tables.places == 8 * 32


def test_halves_add_up(made, halves):
    whole, parts = read(made, np.arange(200)), halves[0].merge(halves[1])
    assert whole.places == parts.places
    for name in ("fired", "sums", "squares"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-9)
    for name in ("here", "before"):
        for a, b in zip(getattr(whole, name), getattr(parts, name)):
            np.testing.assert_allclose(a, b, rtol=1e-9)
    for a, b in zip(whole.firings, parts.firings):
        np.testing.assert_allclose(a, b, rtol=1e-4)


# Rules


@pytest.mark.parametrize("by", ["correlation", "f1"])
def test_planted_rules_are_found(halves, by):
    rules = find_rules(*halves, p.strings(), by)
    words = {feature: rules.words(feature, p.strings()) for feature in (p.TOKEN, p.WRONG, p.ANSWER)}
    assert words[p.TOKEN] == "the token: ' king'"
    assert words[p.WRONG] == "the token: ' is'"
    assert words[p.ANSWER] == "the token before: ' Anna'"
    for feature in words:
        assert getattr(rules.scores, by)[feature] > 0.9
    # A conjunction and a stretch are no such rules.
    assert rules.scores.f1[p.BIGRAM] < 0.9
    assert rules.scores.f1[p.QUOTES] < 0.5


@pytest.mark.parametrize("by", ["correlation", "f1"])
def test_the_best_rule_is_the_best_of_all(made, by):
    """Every rule tried on the first half by plain NumPy; the winner scored on the second."""
    fit, test = np.arange(64), np.arange(64, 128)
    rules = find_rules(read(made, fit), read(made, test), p.strings(), by)
    table = np.concatenate([pattern_table(p.strings()), np.zeros((1, len(PATTERNS)), bool)])

    def score(y, c):
        if y.any() and (c > 0).any() and c.std() > 0:
            f1 = 2 * (y & (c > 0)).sum() / (y.sum() + (c > 0).sum())
            return f1 if by == "f1" else np.corrcoef(c, y)[0, 1]
        return -np.inf

    (a_here, a_before, a_codes), (b_here, b_before, b_codes) = plain(made, fit), plain(made, test)
    for feature in (3, 7, 11, 20, 21, p.TOKEN, p.BIGRAM, p.QUOTES, p.POSITION):
        winners = {}
        for kind in KINDS:
            ids, others = (a_before, b_before) if kind.endswith("before") else (a_here, b_here)
            if kind.startswith("token"):
                fires = a_codes[:, feature] > 0
                every = {t: score(ids == t, a_codes[:, feature]) for t in np.unique(ids[fires])}
                holds = lambda t, others=others: others == t  # noqa: E731
            else:
                every = {r: score(table[ids, r], a_codes[:, feature]) for r in range(len(PATTERNS))}
                holds = lambda r, others=others: table[others, r]  # noqa: E731
            rule = int(rules.found[kind].rule[feature])
            assert every[rule] == pytest.approx(max(every.values()), abs=1e-5)
            assert rules.found[kind].fitted[feature] == pytest.approx(every[rule], abs=1e-5)
            winners[kind] = every[rule]
            y, c = holds(rule), b_codes[:, feature]
            due = [y[c > 0].mean(), (c > 0)[y].mean() if y.any() else np.nan]
            np.testing.assert_allclose([f[feature] for f in rules.found[kind].scores[:2]], due, atol=1e-6)
            if y.any():
                got = rules.found[kind].scores.correlation[feature]
                assert got == pytest.approx(np.corrcoef(c, y)[0, 1], abs=1e-4)
        best = KINDS[rules.best[feature]]
        assert winners[best] == pytest.approx(max(winners.values()), abs=1e-5)
        for name in Scores._fields:
            chosen = getattr(rules.found[best].scores, name)[feature]
            np.testing.assert_equal(getattr(rules.scores, name)[feature], chosen)


def tables_by_hand(here, values, vocab=4):
    """Tables of one feature; the token before is the one before in the list."""
    here, values = np.array(here), np.array(values, float)
    before = np.append(vocab, here[:-1])
    at, tables = np.flatnonzero(values), []
    for ids in (here, before):
        totals = np.bincount(ids, minlength=vocab + 1)
        tables.append(table_of(np.zeros(len(at), int), ids[at], values[at], totals, vocab + 1))
    listed = FiringList(np.zeros(len(at), int), values[at], here[at], before[at])
    return Tables(
        len(here), np.array([len(at)]), np.array([values.sum()]), np.array([(values**2).sum()]), *tables, listed
    )


def test_a_rule_by_hand():
    """Fires on token 1, most on 2 by activation: chosen on the first half, scored on the second."""
    strings = ["a", " B", "c1", "."]
    fit = tables_by_hand([0, 1, 1, 2, 3, 0], [0, 1, 1, 9, 0, 0])
    test = tables_by_hand([2, 2, 0, 1, 3], [4, 0, 0, 1, 0])
    rules = find_rules(fit, test, strings)
    # Token 2 alone (and so the pattern "digits", which it alone matches) tells the activation best.
    assert rules.found["token"].rule[0] == 2
    assert list(PATTERNS)[rules.found["regex"].rule[0]] == "digits"
    assert rules.words(0, strings) == "the token: 'c1'"
    scores = rules.scores
    np.testing.assert_allclose([scores.precision[0], scores.recall[0], scores.f1[0]], 0.5)
    due = np.corrcoef([4, 0, 0, 1, 0], [1, 1, 0, 0, 0])[0, 1]
    np.testing.assert_allclose(scores.correlation[0], due)
    # By F1 it is token 1: two of its places, three firings, F1 0.8; " B" is the only capital.
    rules = find_rules(fit, test, strings, "f1")
    assert rules.found["token"].rule[0] == 1
    assert rules.found["token"].fitted[0] == pytest.approx(0.8)


def test_a_silent_feature_has_no_rule():
    silent = tables_by_hand([0, 1, 2], [0, 0, 0])
    firing = tables_by_hand([0, 1, 2], [0, 1, 0])
    rules = find_rules(silent, firing, ["a", "b", "c", "d"])
    assert rules.words(0, ["a", "b", "c", "d"]) == "no rule"
    assert np.isnan(rules.scores.f1[0])
    rules = find_rules(firing, silent, ["a", "b", "c", "d"])
    assert rules.scores.f1[0] == 0
    assert np.isnan(rules.scores.correlation[0])


@pytest.mark.parametrize(
    ("string", "names"),
    [
        (" King", {"begins with a space", "begins with a capital"}),
        (" NASA", {"begins with a space", "begins with a capital", "all capitals"}),
        (" running", {"begins with a space", "lower case", "-ing"}),
        ("ing", {"no space before it", "lower case", "-ing"}),
        (" 1984", {"begins with a space", "digits", "four digits"}),
        ("\n\n", {"newline", "white space"}),
        (".", {"no space before it", "punctuation", "ends a sentence"}),
        (" a", {"begins with a space", "lower case", "one letter"}),
        ("'s", {"no space before it", "contraction"}),
        ("\\xe2", {"no space before it", "not ASCII"}),
        (" walked", {"begins with a space", "lower case", "-ed"}),
        (",", {"no space before it", "punctuation", "comma, semicolon, colon"}),
        ("”", {"no space before it", "punctuation", "quotation mark", "not ASCII"}),
        ("", set()),
    ],
)
def test_patterns(string, names):
    assert {name for name, matches in zip(PATTERNS, pattern_table([string])[0]) if matches} == names


# Entropies


def test_entropies_by_hand():
    """Feature 0: a, a, b, c with 2, 1, 1: H = 1.5 log 2. Feature 1: one token. Feature 2 never fires."""
    table = table_of([0, 0, 0, 0, 1, 1], [5, 5, 2, 3, 7, 7], np.ones(6), np.array([1, 0, 2, 1, 0, 4, 0, 2]), 8)
    np.testing.assert_allclose(entropies(table, 3), [1.5 * np.log(2), 0, np.nan], atol=1e-12)
    share = np.array([1, 2, 1, 4, 2]) / 10
    assert base_entropy(table) == pytest.approx(-(share * np.log(share)).sum())


def test_entropies_of_draws():
    """Equally many firings for all: a feature that fires everywhere and one that fires rarely come out equal."""
    generator = np.random.default_rng(0)
    feature = np.repeat([0, 1, 2], [5000, 80, 30])
    here = np.concatenate([generator.integers(0, 20, 5080), np.full(30, 3)])
    firings = FiringList(feature, np.ones(5110), here, here[::-1].copy())
    token, before = (
        np.array(values) for values in zip(*(entropies_of_draws(firings, 3, 30, seed) for seed in range(40)))
    )
    assert token[:, 0].mean() == pytest.approx(token[:, 1].mean(), abs=0.05)
    assert token[:, 0].mean() < np.log(20) - 0.1
    np.testing.assert_array_equal(token[:, 2], 0)
    assert before[:, 2].std() < 0.5 < before[:, 2].mean()
    assert len(np.unique(token[:, 0])) > 5
    assert np.isnan(entropies_of_draws(firings, 3, 81)[0][1:]).all()
    # All of a feature's firings: the entropy itself.
    whole = entropies(table_of(feature, here, np.ones(5110), np.zeros(20), 20), 3)
    assert entropies_of_draws(firings, 3, 80)[0][1] == pytest.approx(whole[1])


@pytest.mark.parametrize(
    ("values", "levels", "due"),
    [
        ([1.0, 0.9, 0.2, 0.1], 2, [1, 2]),
        ([1.0, 0.1, 0.1, 0.1], 2, [0, 1]),
        ([0.5, 0.5, 0.5], 3, [0, 1, 2]),
        ([4, 1, 3, 2], 4, [0, 2, 1, 3]),
        ([8, 0.1, 0.2, 0.3, 0.4, 7], 4, [5, 0, 4, 3]),
    ],
)
def test_evenly_spaced_by_hand(values, levels, due):
    np.testing.assert_array_equal(evenly_spaced(np.array(values), levels), due)


def test_evenly_spaced_against_a_plain_search():
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = np.round(generator.exponential(size=generator.integers(6, 40)) + 0.05, 1)
        free, due = list(range(len(values))), []
        for level in values.max() * (np.arange(6)[::-1] + 0.5) / 6:
            due.append(min(free, key=lambda i, level=level: (round(abs(values[i] - level), 9), i)))
            free.remove(due[-1])
        found = evenly_spaced(values, 6)
        np.testing.assert_allclose(
            np.abs(values[found] - values.max() * (np.arange(6)[::-1] + 0.5) / 6),
            np.abs(values[due] - values.max() * (np.arange(6)[::-1] + 0.5) / 6),
            atol=1e-6,
        )
        assert len(set(found)) == 6


def test_commonest_shares():
    here = np.array([9, 8, 9, 9, 1, 2])
    firings = FiringList(np.array([0, 0, 0, 0, 1, 1]), np.array([1, 0.9, 0.2, 0.1, 3, 1]), here, here)
    np.testing.assert_allclose(commonest_shares(firings, 3, levels=2), [0.5, 0.5, np.nan])
    np.testing.assert_allclose(commonest_shares(firings, 3, levels=4), [0.75, np.nan, np.nan])


def test_planted_features_are_narrow(halves):
    """A token's feature has entropy 0 and share 1; one of quotations is as broad as the text."""
    tables = halves[0]
    token, before = entropies(tables.here, p.N_FEATURES), entropies(tables.before, p.N_FEATURES)
    share = commonest_shares(tables.firings, p.N_FEATURES, levels=10)
    assert (token[p.TOKEN], share[p.TOKEN], before[p.ANSWER]) == (0, 1, 0)
    assert token[p.QUOTES] > 4
    assert share[p.QUOTES] < 0.5
    assert before[p.TOKEN] > 3
    assert 5 < base_entropy(tables.here) < np.log(p.VOCAB)
