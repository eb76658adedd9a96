"""Two sets of prompts, and a text with and without a pre-prompt: the planted feature first, statistics by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sparse_jax.activations.blocks import activations
from sparse_jax.errors import InputError
from sparse_jax.features.prompt_diff import changed_places, make_suffixes, prompt_diff
from sparse_jax.features.prompts import make_prompts, prompt_batches
from sparse_jax.features.search_prompts import by_prompt, compare
from tests.features import planted as p

WORDS = [s for s in p.strings()[40:] if s.startswith(" ")]


@pytest.fixture(scope="module")
def made():
    return p.planted()


def random_texts(count, seed, before="", after=""):
    generator = np.random.default_rng(seed)
    words = lambda: "".join(generator.choice(WORDS, generator.integers(2, 8)))  # noqa: E731
    return [words() + before + words() + after for _ in range(count)]


def prompts_of(texts):
    return make_prompts(p.Words().encode(texts), longest=p.CONTEXT, length=24)


# Prompts


def test_prompts_by_hand():
    made = make_prompts([[5, 6, 0, 7], [8]], longest=9, bos_id=2, skip_positions=1, masked_ids=(0,))
    np.testing.assert_array_equal(made.tokens, [[2, 5, 6, 0, 7], [2, 8, 0, 0, 0]])
    np.testing.assert_array_equal(made.mask.astype(int), [[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(made.last, [4, 1])
    (numbers, batch), (rest, fill) = prompt_batches(
        dataclasses.replace(made, **{k: np.repeat(v, 2, axis=0) for k, v in vars(made).items()}), 3
    )
    np.testing.assert_array_equal([*numbers, *rest], [0, 1, 2, 3, -1, -1])
    assert batch.mask.sum() == 7
    np.testing.assert_array_equal(fill.mask.sum(axis=1), [1, 0, 0])


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], "no prompts"), ([[3, 4], []], "prompt 2 is empty"), ([[3] * 9], "has 9 tokens: .* room for 8"),
     ([[3, 4], [5]], "prompt 2 has no token that counts")],
)  # fmt: skip
def test_prompts_that_cannot_be(ids, words):
    with pytest.raises(InputError, match=words):
        make_prompts(ids, longest=8)


# Two sets


@pytest.mark.parametrize(
    ("feature", "inserted"), [(p.TOKEN, " king"), (p.BIGRAM, " New York"), (p.QUOTES, " “"), (p.WRONG, " is")]
)
@pytest.mark.parametrize("figure", ["activation", "firing"])
def test_the_planted_feature_is_first(made, feature, inserted, figure):
    a, b = random_texts(20, 0, before=inserted), random_texts(25, 1, before=" York New" if "New" in inserted else "")
    numbers = [getattr(by_prompt(made.lm, made.coder, p.SITE, prompts_of(texts)), figure) for texts in (a, b)]
    found = compare(*numbers, permutations=200)
    assert found.order[0] == feature
    assert found.effect[feature] > 0
    assert found.p_family[feature] == 1 / 201
    assert found.p[feature] < 1e-4
    turned = compare(*numbers[::-1], permutations=0)
    np.testing.assert_allclose(turned.t, -found.t)
    assert np.isnan(turned.p_family).all()


def test_what_a_prompt_gives(made):
    prompts = prompts_of(random_texts(11, 3, before=" king is"))
    x = activations(made.lm, jnp.array(np.concatenate([prompts.tokens, prompts.tokens[:5]])), p.SITE)[:11]
    codes = np.asarray(made.coder.encode(x.reshape(-1, p.D))).reshape(11, 24, -1)
    max_norm = 2.0
    found = by_prompt(made.lm, made.coder, p.SITE, prompts, max_norm=max_norm)
    outliers = 0
    for i in range(11):
        keep = prompts.mask[i] & (np.linalg.norm(x[i], axis=-1) <= max_norm)
        outliers += (prompts.mask[i] & ~keep).sum()
        np.testing.assert_allclose(found.activation[i], np.maximum(codes[i, keep], 0).mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(found.firing[i], (codes[i, keep] > 0).mean(axis=0), atol=1e-6)
    assert outliers >= 11
    assert found.activation.max() > 0.1


def test_statistics_are_the_textbook_ones():
    """Cohen's d and Welch's t against SciPy; a permutation test of one feature against plain dealing."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.8, 1, (9, 40)), generator.normal(0, 3, (13, 40))
    found = compare(a, b, permutations=500)
    welch = stats.ttest_ind(a, b, equal_var=False)
    np.testing.assert_allclose(found.t, welch.statistic, rtol=1e-9)
    np.testing.assert_allclose(found.p, welch.pvalue, rtol=1e-9)
    pooled = np.sqrt((8 * a.var(axis=0, ddof=1) + 12 * b.var(axis=0, ddof=1)) / 20)
    np.testing.assert_allclose(found.effect, (a.mean(axis=0) - b.mean(axis=0)) / pooled, rtol=1e-9)
    np.testing.assert_allclose(found.mean_a, a.mean(axis=0))
    every, largest = np.concatenate([a, b]), []
    for _ in range(500):
        deal = generator.permutation(22)
        largest.append(np.abs(stats.ttest_ind(every[deal[:9]], every[deal[9:]], equal_var=False).statistic).max())
    due = (1 + (np.array(largest)[:, None] >= np.abs(found.t)).sum(axis=0)) / 501
    np.testing.assert_allclose(found.p_family, due, atol=0.08)
    # The largest of 40 is beyond what one alone would be.
    assert (found.p_family >= found.p - 0.03).all()
    assert found.p_family.min() < 0.5 < found.p_family.max()


def test_constant_features():
    """Nothing varies: no effect where nothing differs, an infinite one where something does; larger ones first."""
    a, b = np.tile([0.0, 1.0, 3.0, 0.1], (4, 1)), np.tile([0.0, 1.0, 1.0, 0.0], (5, 1))
    found = compare(a, b, permutations=100)
    np.testing.assert_array_equal(found.effect, [0, 0, np.inf, np.inf])
    np.testing.assert_array_equal(found.order[:2], [2, 3])
    np.testing.assert_array_equal(found.p[:2], [1, 1])
    np.testing.assert_array_equal(found.p[2:], [0, 0])
    assert (found.p_family[2:] < 0.1).all()
    assert (found.p_family[:2] == 1).all()
    with pytest.raises(InputError, match="sets of 1 and 5 prompts"):
        compare(a[:1], b)


def test_no_difference_is_not_found():
    """Under the null the family-wise p-value of the largest of many features is uniform: small ones are rare."""
    generator, small = np.random.default_rng(1), 0
    for seed in range(60):
        found = compare(*generator.exponential(size=(2, 8, 30)), permutations=99, seed=seed)
        small += found.p_family.min() <= 0.1
    assert small <= 14  # 6 are expected; 14 or more have probability 0.003


# With and without a pre-prompt


def suffixes_of(pre, texts, **options):
    encode = p.Words().encode
    return make_suffixes(encode([pre])[0], encode(texts), longest=p.CONTEXT, **options)


@pytest.mark.parametrize(
    ("feature", "pre"), [(p.QUOTES, " bade “ deki"), (p.BIGRAM, " bade deki New"), (p.ANSWER, " old bade Anna")]
)
def test_the_feature_that_the_pre_prompt_switches_on(made, feature, pre):
    """What depends on what stands before changes; features of the token alone do not (positions do)."""
    first = {p.QUOTES: " king", p.BIGRAM: " York", p.ANSWER: " is"}[feature]
    texts = [" ".join(["", first.strip(), *(w.strip() for w in text.split())]) for text in random_texts(9, 4)]
    suffixes = suffixes_of(pre, texts, skip_positions=0)
    found = prompt_diff(made.lm, made.coder, p.SITE, suffixes)
    moving = [f for f in range(p.N_FEATURES) if f == p.POSITION or f % 4 >= 2]  # of positions, of random directions
    order = [f for f in found.order if f == feature or (f not in moving and f != p.TWIN)]
    assert order[0] == feature
    assert found.change[feature] > 0.02
    assert found.change[feature] > 5 * found.error[feature] or feature == p.QUOTES
    assert found.change[p.TOKEN] == pytest.approx(0, abs=1e-6)
    assert found.fired_behind[feature] > found.fired_alone[feature] == 0
    (places,) = changed_places(made.lm, made.coder, p.SITE, suffixes, [feature], count=4)
    assert len(places) == 4
    for place in places:
        assert place.behind > 0.1 > 0 == place.alone
        assert place.token == 0 or feature == p.QUOTES


def test_changes_against_plain_passes(made):
    """Suffixes of several lengths, alone and behind, row by row; the first token is a sink when alone."""
    pre, texts = " bade “ is", random_texts(11, 5, before=" king”", after=".")
    suffixes, encode = suffixes_of(pre, texts), p.Words().encode
    found = prompt_diff(made.lm, made.coder, p.SITE, suffixes)
    pairs, each = [], []
    for i, ids in enumerate(encode(texts)):
        n, codes = len(ids), []
        for row in (ids, np.concatenate([encode([pre])[0], ids])):
            x = activations(made.lm, jnp.array(np.pad(row, (0, p.CONTEXT - len(row)))[None]), p.SITE)[0]
            codes.append(np.maximum(np.asarray(made.coder.encode(x)), 0)[len(row) - n : len(row)][1:])
        pairs += [(i, at + 1, *values) for at, values in enumerate(zip(*codes))]
        each.append((codes[1] - codes[0]).mean(axis=0))
    without, behind = (np.array([pair[side] for pair in pairs]) for side in (2, 3))
    assert found.places == len(pairs)
    np.testing.assert_allclose(found.alone, without.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.behind, behind.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.change, (behind - without).mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.error, np.std(each, axis=0, ddof=1) / np.sqrt(11), atol=1e-5)
    np.testing.assert_allclose(found.fired_behind, (behind > 0).mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(found.order[:5], np.argsort(-np.abs(found.change), kind="stable")[:5])
    features = [int(f) for f in found.order[:6]]
    for feature, places in zip(features, changed_places(made.lm, made.coder, p.SITE, suffixes, features, count=5)):
        change = np.abs(behind - without)[:, feature]
        best = np.sort(change)[::-1][:5]
        np.testing.assert_allclose([abs(q.behind - q.alone) for q in places], best[best > 0], rtol=1e-4, atol=1e-5)
        values = {pair[:2]: (pair[2][feature], pair[3][feature]) for pair in pairs}
        for q in places:
            np.testing.assert_allclose((q.alone, q.behind), values[q.suffix, q.token], atol=1e-5)


def test_a_begin_of_text_token_stands_before_both(made):
    suffixes = suffixes_of(" bade", [" king is", " deki"], bos_id=1)
    np.testing.assert_array_equal(suffixes.alone.tokens[0, :3], [1, p.token(" king"), p.token(" is")])
    np.testing.assert_array_equal(suffixes.behind.tokens[0, [0, 2, 3]], [1, p.token(" king"), p.token(" is")])
    assert suffixes.starts == (1, 2)
    np.testing.assert_array_equal(suffixes.places, [[True, True], [True, False]])
    found = prompt_diff(made.lm, made.coder, p.SITE, suffixes)
    assert found.places == 3


def test_pre_prompts_that_cannot_be(made):
    with pytest.raises(InputError, match="pre-prompt is empty"):
        suffixes_of("", [" king is"])
    with pytest.raises(InputError, match="has 33 tokens"):
        suffixes_of(" bade" * 30, [" king is is"])
    with pytest.raises(InputError, match="no token of the suffixes counts"):
        prompt_diff(made.lm, made.coder, p.SITE, suffixes_of(" bade", [" king is"]), max_norm=1e-3)
