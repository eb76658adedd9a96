"""Rows that overlap and rows of documents apart: by hand, and against a plain reference."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.lm.packing import Layout, pack, row_windows
from sparse_jax.lm.tokenizer import Tokenizer
from tests.lm.letters import BOS, LETTERS, PAD, SEPARATOR, letter_tokenizer, texts


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    return letter_tokenizer(tmp_path_factory.mktemp("words"))


def test_overlapping_rows_by_hand(words):
    # stream: <eos> a b c d e f | rows of 4, 2 apart, one token over
    rows = pack(texts("a b c d e f"), words, 4, stride=2)
    tokens, targets, mask, _ = rows[:]
    assert tokens.tolist() == [[0, 3, 4, 5], [4, 5, 6, 7]]
    assert targets.tolist() == [[3, 4, 5, 6], [5, 6, 7, 8]]
    assert mask.tolist() == [[False, True, True, True], [False, False, True, True]]
    assert (rows.n_rows, rows.n_tokens, rows.n_dropped) == (2, 8, 1)


def test_documents_apart_by_hand(words):
    rows = pack(texts("a b c d e", "f", "g h"), words, 3, packing="documents")
    tokens, targets, mask, document = rows[:]
    # The document of one token makes no row: its only position is skipped.
    assert tokens.tolist() == [[3, 4, 5], [6, 7, PAD], [9, 10, PAD]]
    assert targets.tolist() == [[4, 5, 6], [7, SEPARATOR, -1], [10, SEPARATOR, -1]]
    assert mask.tolist() == [[False, True, True], [False, True, False], [False, True, False]]
    assert document.tolist() == [[0, 0, 0], [0, 0, -1], [1, 1, -1]]
    assert rows.documents == ("t#1", "t#3")
    assert rows.n_dropped == 4  # three separators and the lone f


def test_documents_apart_behind_bos_and_overlapping_by_hand(words):
    rows = pack(texts("a b c d", "e f"), words, 4, packing="documents", bos="row", stride=2)
    tokens, targets, mask, document = rows[:]
    assert tokens.tolist() == [[BOS, 3, 4, 5], [BOS, 5, 6, PAD], [BOS, 7, 8, PAD]]
    assert targets.tolist() == [[3, 4, 5, 6], [5, 6, SEPARATOR, -1], [7, 8, SEPARATOR, -1]]
    assert mask.tolist() == [[False, True, True, True], [False, False, True, False], [False, True, True, False]]
    assert document.tolist() == [[0, 0, 0, 0], [0, 0, 0, -1], [1, 1, 1, -1]]


CONTENTS = st.lists(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=14).map(" ".join), min_size=1, max_size=10)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(CONTENTS, st.integers(2, 8), st.data(), st.booleans(), st.sampled_from(["joined", "documents"]))
def test_every_token_counts_once_with_its_neighbours(words, contents, context, data, with_bos, packing):
    """Which token of which document counts, and what precedes it in its row, against the documents themselves."""
    width = context - with_bos
    if width < 1:
        return
    stride = data.draw(st.integers(1, width))
    options = {"skip_positions": 0, "bos": "row" if with_bos else "none", "stride": stride, "packing": packing}
    ids = [[SEPARATOR] + [3 + LETTERS.index(letter) for letter in content.split()] for content in contents]
    stream = list(itertools.chain(*ids))
    if packing == "joined" and len(stream) <= width:
        with pytest.raises(InputError, match="shorter than one row"):
            pack(texts(*contents), words, context, **options)
        return
    rows = pack(texts(*contents), words, context, **options)
    tokens, targets, mask, document = rows[:]
    counted = [
        (rows.documents[d], int(token))
        for row in range(len(rows))
        for token, counts, d in zip(tokens[row], mask[row], document[row])
        if counts
    ]
    due = [(f"t#{i + 1}", token) for i, each in enumerate(ids) for token in each if token != SEPARATOR]
    assert counted == (due if packing == "documents" else due[: len(counted)])
    if packing == "joined":
        # What is dropped does not make another row.
        covered = (len(rows) - 1) * stride + width
        assert len(counted) == sum(token != SEPARATOR for token in stream[:covered])
        assert len(stream) < covered + stride + 1
    for row in range(len(rows)):
        real = targets[row] >= 0
        _check_run(stream, tokens[row, with_bos:][real[with_bos:]].tolist())
        assert targets[row][:-1][real[1:]].tolist() == tokens[row][1:][real[1:]].tolist()
        # Separators aside, what does not count is what the row before held: the first width - stride tokens.
        text = tokens[row, with_bos:] != SEPARATOR
        fresh, repeated = mask[row, with_bos:], np.arange(width) < width - stride
        own = text & real[with_bos:]
        assert np.array_equal(fresh, own) or np.array_equal(fresh, own & ~repeated)


def _check_run(stream, wanted):
    """That these tokens stand in the stream one after the other."""
    assert any(stream[place : place + len(wanted)] == wanted for place in range(len(stream)))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
    CONTENTS, st.integers(2, 6), st.data(), st.booleans(), st.sampled_from(["joined", "documents"]), st.integers(1, 5),
    st.none() | st.integers(6, 60),
)  # fmt: skip
def test_windows_hold_the_rows_of_the_whole(words, contents, context, data, with_bos, packing, size, limit):
    width = context - with_bos
    if limit is not None and limit < context:
        return
    layout = Layout(context, 1, "row" if with_bos else "none", data.draw(st.none() | st.integers(1, width)), packing)
    try:
        whole = next(row_windows(texts(*contents), words, layout, limit=limit))
    except InputError:
        with pytest.raises(InputError):
            list(row_windows(texts(*contents), words, layout, window_rows=size, limit=limit))
        return
    windows = list(row_windows(texts(*contents), words, layout, window_rows=size, limit=limit))
    assert [len(window) for window in windows[:-1]] == [size] * (len(windows) - 1)
    assert sum(map(len, windows)) == len(whole)
    due = whole[:]
    for i, window in enumerate(windows):
        part = slice(i * size, i * size + len(window))
        tokens, targets, mask, document = window[:]
        assert np.array_equal(tokens, due.tokens[part])
        assert np.array_equal(targets, due.targets[part])
        assert np.array_equal(mask, due.mask[part])
        there = document >= 0
        assert np.array_equal(np.where(there, document + window.documents_before, -1), due.document[part])
        assert window.documents == whole.documents[window.documents_before :][: len(window.documents)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stride": 0}, "--stride 0: give 1 to 3"),
        ({"stride": 4}, "more leaves some out"),
        ({"stride": 3, "bos": "row"}, "give 1 to 2"),
        ({"packing": "apart"}, "joined or documents"),
    ],
)
def test_bad_layouts_are_refused(words, options, reason):
    with pytest.raises(InputError, match=reason):
        pack(texts("a b c d e"), words, 3, **options)
