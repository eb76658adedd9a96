"""Outlier features told from codes: as `features.collect` tells them from a text, and by hand."""

import numpy as np
import pytest

from sparse_jax.connectors.outliers import outliers, row_starts
from sparse_jax.connectors.paired_codes import SiteCodes, Tokens
from sparse_jax.errors import InputError
from sparse_jax.features.collect import collect
from sparse_jax.lm import Site, forward
from sparse_jax.lm.rows import Rows
from tests.features.tiny_models import CONTEXT, VOCAB, WIDTH, coder, tiny

N = 12


@pytest.fixture(scope="module")
def text():
    stream = np.random.default_rng(0).integers(1, VOCAB, 80 * CONTEXT + 1)
    stream[::17] = 0
    return Rows(
        stream=stream.astype(np.uint16),
        document_starts=np.arange(0, 80 * CONTEXT, 50),
        documents=tuple(f"document {i}" for i in range(len(np.arange(0, 80 * CONTEXT, 50)))),
        context=CONTEXT,
        skip_positions=1,
        masked_ids=(0,),
        bos_id=None,
        fill_id=0,
        n_dropped=0,
    )


def codes_of(values, indices=None):
    values = np.asarray(values, np.float32)
    return SiteCodes("site", values.shape[1], values, np.broadcast_to(np.arange(values.shape[1]), values.shape))


def test_the_meaning_is_that_of_the_collector(text):
    """The same counts from a pass over the text and from the codes of its tokens, in a random order."""
    lm, trained, site = tiny("gpt_neox"), coder(WIDTH, N, 1, sparse=0.5), Site.parse("resid_post.1")
    delimiters = np.isin(np.arange(VOCAB), (3, 4, 5, 6))
    collected = collect(lm, site, text, np.arange(80), trained, delimiters=delimiters, top=1, sample=1)
    rows = text[np.arange(80)]
    x = forward(lm, rows.tokens, capture=[site]).captured[str(site)]
    codes = np.maximum(np.asarray(trained.encode(x.reshape(-1, WIDTH))).reshape(80, CONTEXT, N), 0)
    row, position = np.nonzero(rows.mask)
    order = np.random.default_rng(1).permutation(len(row))
    row, position = row[order], position[order]
    tokens = Tokens(rows.tokens[row, position], rows.document[row, position], row, position)
    found = outliers(codes_of(codes[row, position]), tokens, delimiters)
    np.testing.assert_array_equal(found.fired, collected.fired)
    for ours, theirs in (("first", "first"), ("first_delimiter", "first_delimiters"), ("delimiters", "delimiters")):
        np.testing.assert_array_equal(np.round(getattr(found, ours) * found.fired), getattr(collected, theirs))
    np.testing.assert_allclose(found.density, collected.density)
    np.testing.assert_array_equal(found.starts, collected.outlier)
    assert collected.first.max() > 5
    assert collected.first_delimiters.max() > 5


@pytest.fixture(scope="module")
def planted():
    """(tokens, codes, delimiters): 30 rows of 10 tokens that begin at position 1; token 9 is a delimiter."""
    row, position = np.repeat(np.arange(30), 10), np.tile(np.arange(1, 11), 30)
    token = np.random.default_rng(0).integers(0, 8, 300)
    token[(position == 4) | (position == 7)] = 9
    tokens = Tokens(token, row // 3, row, position)
    values = np.zeros((300, 6))
    values[:, 0] = position == 1  # first tokens
    values[:, 1] = position == 4  # first delimiters
    values[:, 2] = token == 9  # all delimiters: a feature of full stops
    values[:, 3] = position != 5  # most tokens
    values[:, 4] = (position == 1) & (row < 9)  # first tokens, but too few to tell
    return tokens, codes_of(values), np.arange(10) == 9


def test_by_hand(planted):
    tokens, codes, delimiters = planted
    found = outliers(codes, tokens, delimiters)
    assert found.starts.tolist() == [True, True, False, False, False, False]
    assert found.most.tolist() == [False, False, False, True, False, False]
    assert found.outlier.tolist() == [True, True, False, True, False, False]
    assert found.reason.tolist() == ["first tokens", "first delimiters", "", "most tokens", "", ""]
    assert found.first_delimiter[2] == 0.5
    assert found.delimiters.tolist() == pytest.approx([0, 1, 1, 2 / 9, 0, 0])
    # Without delimiters none of them can be told.
    assert outliers(codes, tokens).starts.tolist() == [True, False, False, False, False, False]
    assert outliers(codes, tokens, delimiters, most_tokens=0.15).most[2]


def test_starts_are_told_of_all_tokens_and_used_of_some(planted):
    """Tokens whose rows begin elsewhere: what stands first among some of them is no start."""
    tokens, codes, delimiters = planted
    later = np.flatnonzero(tokens.position > 4)
    part = SiteCodes("site", 6, codes.values[later], codes.indices[later])
    starts = tuple(which[later] for which in row_starts(tokens, delimiters))
    assert not starts[0].any()
    assert not outliers(part, tokens.at(later), delimiters, starts).starts.any()
    alone = row_starts(tokens.at(later), delimiters)
    assert alone[0].sum() == 30


def test_ids_beyond_the_delimiters_are_none(planted):
    tokens, _, _ = planted
    first, first_delimiter = row_starts(tokens, np.ones(3, bool))
    assert first.sum() == 30
    assert (tokens.token[first_delimiter] < 3).all()


@pytest.mark.parametrize("wrong", [np.arange(10), np.ones((2, 5), bool)])
def test_delimiters_that_cannot_be_are_refused(wrong, planted):
    tokens, codes, _ = planted
    with pytest.raises(InputError, match="a bool for each id"):
        outliers(codes, tokens, wrong)
    with pytest.raises(InputError, match="as many of each"):
        outliers(codes, tokens.at(slice(0, 5)))
