"""Packing and masks, against answers worked by hand and a plain reference."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from sparse_jax.errors import InputError
from sparse_jax.lm import embedded
from sparse_jax.lm.documents import documents
from sparse_jax.lm.packing import pack
from sparse_jax.lm.tokenizer import Tokenizer, load_tokenizer
from tests.lm.letters import BOS, LETTERS, PAD, SEPARATOR, letter_tokenizer, texts


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    return letter_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def neox() -> Tokenizer:
    return load_tokenizer(embedded.MODELS["novel-neox"])


def counted(contents):
    """Documents one at a time, and how many were read."""
    read = []

    def stream():
        for document in texts(*contents):
            read.append(document.name)
            yield document

    return stream(), read


# Packing by hand


def test_rows_targets_mask_and_documents_by_hand(words):
    # stream: <eos> a b c <eos> d e | rows of 3, one token over (it is the last target)
    rows = pack(texts("a b c", "d e"), words, 3)
    assert (rows.n_rows, len(rows), rows.n_tokens, rows.n_dropped, rows.width) == (2, 2, 6, 1, 3)
    tokens, targets, mask, document = rows[:]
    assert tokens.tolist() == [[0, 3, 4], [5, 0, 6]]
    assert targets.tolist() == [[3, 4, 5], [0, 6, 7]]
    assert mask.tolist() == [[False, True, True], [False, False, True]]
    assert document.tolist() == [[0, 0, 0], [0, 1, 1]]
    assert rows.documents == ("t#1", "t#2")
    assert rows.document_starts.tolist() == [0, 4]
    assert (tokens.dtype, targets.dtype, mask.dtype, document.dtype) == (np.int32, np.int32, bool, np.int32)
    assert rows.stream.dtype == np.uint16


def test_bos_at_each_row_by_hand(words):
    # Rows take two tokens of the stream: <eos> a | b c | <eos> d | e
    rows = pack(texts("a b c", "d e"), words, 3, bos="row")
    tokens, targets, mask, document = rows[:]
    assert tokens.tolist() == [[2, 0, 3], [2, 4, 5], [2, 0, 6]]
    assert targets.tolist() == [[0, 3, 4], [4, 5, 0], [0, 6, 7]]
    assert mask.tolist() == [[False, False, True], [False, True, True], [False, False, True]]
    assert document.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert (rows.n_rows, rows.n_tokens, rows.n_dropped, rows.width) == (3, 9, 1, 2)


@pytest.mark.parametrize(
    ("skip", "mask"),
    [(0, [[False, True, True], [True, False, True]]), (2, [[False, False, True], [False, False, True]])],
)
def test_skipped_positions_by_hand(words, skip, mask):
    assert pack(texts("a b c", "d e"), words, 3, skip_positions=skip)[:].mask.tolist() == mask


def test_mask_drops_padding_and_bos_wherever_they_stand(words):
    rows = pack(texts("a b c d e f"), words, 7 - 1, skip_positions=0)
    assert rows.masked_ids == (SEPARATOR, PAD, BOS)
    rows.stream[2:4] = [PAD, BOS]
    assert rows[0].mask.tolist() == [False, True, False, False, True, True]


def test_indices_of_any_shape_and_empty_rows(words):
    rows = pack(texts("a b c", "d e"), words, 3)
    every = rows[:]
    assert all(np.array_equal(one, many[1]) for one, many in zip(rows[1], every))
    assert all(
        np.array_equal(one, many[[[1, 0], [0, 0]]]) for one, many in zip(rows[np.array([[1, 0], [0, 0]])], every)
    )
    assert all(np.array_equal(one, many[::-1]) for one, many in zip(rows[::-1], every))
    assert rows[[]].tokens.shape == (0, 3)
    tokens, targets, mask, document = rows[np.array([1, -1])]
    assert tokens.tolist() == [[5, 0, 6], [PAD, PAD, PAD]]
    assert targets.tolist() == [[0, 6, 7], [-1, -1, -1]]
    assert mask.tolist() == [[False, False, True], [False, False, False]]
    assert document.tolist() == [[0, 1, 1], [-1, -1, -1]]
    assert [row.tokens.tolist() for row in rows] == every.tokens.tolist()
    for wrong in (2, -2, [0, 5]):
        with pytest.raises(IndexError):
            rows[wrong]
    for wrong in (0.5, np.array([True, False])):
        with pytest.raises(TypeError):
            rows[wrong]


def test_large_vocabulary_is_not_cut_to_sixteen_bits(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "far": 70_000}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    rows = pack(texts("a far a"), load_tokenizer(tmp_path), 3)
    assert rows[0].tokens.tolist() == [0, 1, 70_000]
    assert rows.stream.dtype == np.int32
    assert rows.fill_id == 0


# Packing in general

CONTENTS = st.lists(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=12)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(CONTENTS, st.integers(2, 9), st.integers(0, 1), st.booleans(), st.none() | st.integers(9, 60))
def test_packing_equals_a_plain_reference(words, contents, context, skip, with_bos, limit):
    stream, owner = [], []
    for i, content in enumerate(contents):
        ids = [SEPARATOR] + [3 + LETTERS.index(letter) for letter in content.split()]
        stream, owner = stream + ids, owner + [i] * len(ids)
    width = context - with_bos
    n_rows = (len(stream) - 1) // width if limit is None else min((len(stream) - 1) // width, limit // context)
    source, read = counted(contents)
    if n_rows < 1:
        with pytest.raises(InputError, match="shorter than one row"):
            pack(source, words, context, skip_positions=skip, limit=limit, bos="row" if with_bos else "none")
        return
    rows = pack(source, words, context, skip_positions=skip, limit=limit, bos="row" if with_bos else "none")
    assert rows.n_rows == n_rows
    assert limit is None or rows.n_tokens <= limit
    assert list(rows.documents) == [f"t#{i + 1}" for i in range(owner[n_rows * width - 1] + 1)]
    assert len(rows.document_starts) == len(rows.documents)
    assert rows.n_dropped == sum(len(content.split()) + 1 for content in contents[: len(read)]) - n_rows * width
    for i in range(n_rows):
        tokens, targets, mask, document = rows[i]
        cut = slice(i * width, (i + 1) * width)
        assert tokens.tolist() == [BOS] * with_bos + stream[cut]
        assert targets[:-1].tolist() == tokens[1:].tolist()
        assert targets[-1] == stream[(i + 1) * width]
        assert mask.tolist() == [p >= skip and token > BOS for p, token in enumerate(tokens)]
        assert [rows.documents[d] for d in document[with_bos:]] == [f"t#{o + 1}" for o in owner[cut]]
        if with_bos:
            assert document[0] == document[1]
    # No document is read beyond the one that holds the last target.
    needed = owner[n_rows * width] + 1
    assert len(read) == (needed if limit is not None and n_rows == limit // context else len(contents))


def test_limit_reads_no_further_than_needed_with_bytes_above_one_a_sign(neox):
    # Each document is 3 bytes, hence up to 3 tokens, but one sign.
    source, read = counted(["\u4e2d"] * 1000)
    rows = pack(source, neox, 4, limit=40)
    assert rows.n_tokens == 40
    assert rows.n_dropped == len(read) * len(rows.stream[: rows.document_starts[1]]) - 40
    assert len(read) == -(-41 // int(rows.document_starts[1]))


def test_long_text_is_encoded_in_groups_with_the_same_result(words, monkeypatch):
    contents = [" ".join(LETTERS[: 1 + i % 20]) for i in range(200)]
    whole = pack(texts(*contents), words, 16)
    monkeypatch.setattr("sparse_jax.lm.packing._GROUP_BYTES", 50)
    groups = pack(texts(*contents), words, 16)
    assert np.array_equal(whole.stream, groups.stream)
    assert np.array_equal(whole.document_starts, groups.document_starts)
    assert whole.documents == groups.documents


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"context": 8}, r"1 document, 4 tokens with separators, where a row of 8 needs 9"),
        ({"context": 4}, "shorter than one row"),
        ({"context": 5, "bos": "row"}, "shorter than one row"),
        ({"context": 1}, "at least 2"),
        ({"context": 3, "skip_positions": 3}, "give 0 to 2"),
        ({"context": 3, "skip_positions": -1}, "give 0 to 2"),
        ({"context": 3, "limit": 2}, "at least 3 tokens"),
        ({"context": 3, "bos": "document"}, "'none' or 'row'"),
    ],
)
def test_bad_input_is_refused(words, options, reason):
    with pytest.raises(InputError, match=reason) as caught:
        pack(texts("a b c"), words, **options)
    assert "\n" not in str(caught.value)


def test_no_document_and_missing_special_tokens_are_refused_before_reading(words):
    with pytest.raises(InputError, match="0 documents, 0 tokens"):
        pack([], words, 3)
    without = Tokenizer(words.backend, None, None, None, words.vocab_size, "")
    only_separator = Tokenizer(words.backend, 0, None, None, words.vocab_size, "")
    for tokenizer, bos, reason in ((without, "none", "end-of-text"), (only_separator, "row", "begin-of-text")):
        source, read = counted(["a b c"] * 3)
        with pytest.raises(InputError, match=reason):
            pack(source, tokenizer, 3, bos=bos)
        assert read == []


# The embedded text


def test_packed_austen_is_what_the_model_card_counts(neox):
    rows = pack(documents("austen"), neox, 256)
    assert (rows.n_rows, rows.n_tokens) == (4109, 1_051_904)
    assert len(rows.documents) == 6
    every = rows[:]
    assert (every.targets >= 0).sum() == 1_051_904
    assert (every.tokens == SEPARATOR).sum() == 6
    # The model was trained on this: id 0 before each document, then its lines, each with its newline.
    raw = tokenizers.Tokenizer.from_file(str(embedded.MODELS["novel-neox"] / "tokenizer.json"))
    novel = next(documents("austen")).text
    stream = [0] + [i for line in novel.split("\n")[:400] for i in raw.encode(line + "\n").ids]
    assert rows.stream[: len(stream)].tolist() == stream
