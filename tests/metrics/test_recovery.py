"""Recovery of known features: answers worked by hand, and what must not matter."""

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.metrics import (
    Matching,
    hungarian_mean_cosine,
    match,
    matched_correlation,
    mean_max_cosine,
    support_scores,
)

Z = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
CODES = np.array([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
EYE = np.eye(2)


def test_matched_correlation_by_hand():
    assert matched_correlation(Z, CODES) == pytest.approx(1)
    # Only the second latent has a code; the first counts as 0.
    assert matched_correlation(Z, CODES[:, :1]) == pytest.approx(0.5)
    # (1, 0, 0) and (2, 1, 0): deviations (2, -1, -1) / 3 and (1, 0, -1), 1 / sqrt(2/3 * 2).
    assert matched_correlation(Z[:, :1], np.array([[2.0], [1.0], [0.0]])) == pytest.approx(1 / np.sqrt(4 / 3))


def test_scale_sign_order_shift_and_spare_codes_do_not_matter():
    generator = np.random.default_rng(0)
    z = generator.normal(size=(50, 4))
    codes = np.concatenate([generator.normal(size=(50, 3)), z[:, [2, 0, 3, 1]] * [1, -2, 3, -4] + 5], axis=1)
    assert matched_correlation(z, codes) == pytest.approx(1)
    matching = match(z, codes)
    np.testing.assert_array_equal(matching.codes[np.argsort(matching.latents)], [4, 6, 3, 5])


def test_one_to_one():
    """Two latents may not share a code that is best for both."""
    z = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.9], [0.0, 0.1]])
    alone = matched_correlation(z, z[:, :1])
    assert alone == pytest.approx(0.5, abs=0.01)
    assert matched_correlation(z, z) == pytest.approx(1)


def test_what_does_not_vary():
    silent = np.concatenate([Z, np.full((3, 1), 0.1)], axis=1)
    assert matched_correlation(silent, CODES) == pytest.approx(1)  # a latent that never varies is left out
    assert matched_correlation(Z, np.zeros((3, 2))) == 0
    assert matched_correlation(np.zeros((3, 2)), CODES) == 0


def test_a_matching_of_other_rows():
    swapped = match(Z, CODES)
    assert matched_correlation(Z, Z, swapped) == pytest.approx(0.5)  # |corr((1,0,0), (0,1,0))| = 0.5
    assert matched_correlation(Z, CODES, swapped) == pytest.approx(1)


def test_support_scores_by_hand():
    z = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    codes = np.array([[3.0, 0.1], [2.0, 0.0], [0.0, 3.0], [0.2, 0.0]])
    straight = Matching(np.arange(2), np.arange(2))
    scores = support_scores(z, codes, straight)
    # Active: 3, .1, 2, 3, .2; true of them 3; active latents 4.
    assert (scores.precision, scores.recall) == (pytest.approx(3 / 5), pytest.approx(3 / 4))
    assert scores.f1 == pytest.approx(2 * 3 / (5 + 4))
    # Silent entries .1, 0, 0, .2 against active ones: 3, 2, 3 win all four; 0 ties with two zeros: 1.
    assert scores.auc == pytest.approx((3 * 4 + 1) / 16)
    above = support_scores(z, codes, straight, threshold=0.5)
    assert (above.precision, above.recall, above.auc) == (1, pytest.approx(3 / 4), scores.auc)


def test_support_scores_of_nothing_and_of_too_few():
    nothing = support_scores(Z, np.zeros((3, 2)))
    assert nothing == (0, 0, 0, 0.5)
    alone = support_scores(Z, CODES[:, :1])
    assert (alone.precision, alone.recall) == (1, 0.5)


def test_auc_is_the_share_of_pairs():
    generator = np.random.default_rng(0)
    z = (generator.random((40, 3)) < 0.4) * 1.0
    codes = np.round(np.maximum(z + generator.normal(size=z.shape), 0), 1)
    matching = match(z, codes)
    true, size = z[:, matching.latents] > 0, codes[:, matching.codes]
    positive, negative = size[true][:, None], size[~true]
    expected = np.mean((positive > negative) + 0.5 * (positive == negative))
    assert support_scores(z, codes, matching).auc == pytest.approx(expected)


def test_cosines_by_hand():
    assert mean_max_cosine(EYE, EYE[:1]) == pytest.approx(0.5)
    assert mean_max_cosine(EYE[:1], EYE) == pytest.approx(1)
    assert mean_max_cosine(EYE, -EYE) == 0  # of either sign is not the same feature
    diagonal = np.array([[3.0, 3.0]])
    assert mean_max_cosine(EYE, diagonal) == pytest.approx(np.sqrt(0.5))


def test_hungarian_by_hand():
    assert hungarian_mean_cosine(EYE, -2 * EYE[::-1]) == pytest.approx(1)
    # A second copy of a feature does not stand for another.
    copies = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert hungarian_mean_cosine(EYE, copies) == pytest.approx(0.5)
    assert mean_max_cosine(copies, EYE) == pytest.approx(1)
    assert hungarian_mean_cosine(EYE, EYE[:1]) == pytest.approx(0.5)
    assert hungarian_mean_cosine(EYE, np.zeros((2, 2))) == 0


def test_shapes_that_do_not_belong_together():
    with pytest.raises(InputError, match="same rows"):
        matched_correlation(Z, CODES[:2])
    with pytest.raises(InputError, match=r"dictionaries of shapes"):
        mean_max_cosine(EYE, np.eye(3))
