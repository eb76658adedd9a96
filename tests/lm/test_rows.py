"""Packing, masks, held-out documents and the order of rows, against answers worked by hand and a plain reference."""

import datasets
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from sparse_jax.errors import InputError
from sparse_jax.lm import embedded
from sparse_jax.lm.documents import Document, documents
from sparse_jax.lm.rows import hold_out, is_held_out, pack, row_indices, row_order, split
from sparse_jax.lm.tokenizer import Tokenizer, load_tokenizer

SEPARATOR, PAD, BOS = 0, 1, 2
# "a" is 3, "b" is 4, ...
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    """One id for each letter standing alone."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", "<bos>", *LETTERS])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("words")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}')
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def neox() -> Tokenizer:
    return load_tokenizer(embedded.MODELS["novel-neox"])


def texts(*contents: str) -> list[Document]:
    return [Document(f"t#{i}", content) for i, content in enumerate(contents, 1)]


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
    monkeypatch.setattr("sparse_jax.lm.rows._GROUP_BYTES", 50)
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


def test_last_addresses_are_what_the_model_card_counts(neox):
    train, evaluation = split("state-of-the-union", tokenizer=neox, context=256)
    assert pack(evaluation, neox, 256).n_tokens == 113_408
    assert sum(1 for _ in train) == 240


# Held-out documents


def test_embedded_documents_are_held_out_by_name():
    train, held = hold_out(documents("embedded"), fraction=0.5)
    assert [document.name for document in held] == [
        "austen/Persuasion",
        "austen/Pride and Prejudice",
        *(f"state-of-the-union/{i}" for i in range(241, 250)),
    ]
    assert len(train) == 6 + 249 - 11


def test_other_documents_are_held_out_by_content():
    many = texts(*(f"document number {i}" for i in range(4000)))
    train, held = hold_out(many)
    assert len(train) + len(held) == 4000
    # Five standard deviations of a binomial: 200 +- 69.
    assert 131 < len(held) < 269
    assert [d for d in many if is_held_out(d)] == held
    # The same whatever the name, the order, and what else is in the text; copies go together.
    again, held_again = hold_out([Document("other", d.text) for d in reversed(many + many)])
    assert {d.text for d in held_again} == {d.text for d in held}
    assert len(held_again) == 2 * len(held)
    assert not {d.text for d in again} & {d.text for d in held_again}
    # A larger share keeps what a smaller one held out.
    assert set(held) < set(hold_out(many, fraction=0.2)[1])


def test_held_out_documents_by_known_answers():
    # Fixed for ever: another hash would move documents between training and evaluation.
    held = [i for i in range(100) if is_held_out(Document("x", f"document {i}"))]
    assert held == [40, 70]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.text(min_size=1, max_size=3), max_size=40), st.floats(0.01, 0.99))
def test_held_out_never_overlaps(contents, fraction):
    train, held = hold_out(texts(*contents), fraction=fraction)
    assert not {d.text.strip() for d in train} & {d.text.strip() for d in held}
    assert sorted(d.name for d in train + held) == sorted(d.name for d in texts(*contents))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(InputError, match="between 0 and 1"):
        hold_out([], fraction=fraction)
    with pytest.raises(InputError, match="between 0 and 1"):
        split("austen", fraction=fraction)


def file_of(path, contents):
    path.write_text("<|endoftext|>".join(contents))
    return path


def test_split_of_one_file(tmp_path, words):
    contents = [f"a b c {letter} {other}" for letter in LETTERS for other in LETTERS]
    path = file_of(tmp_path / "a.txt", contents)
    train, evaluation = split(path, tokenizer=words, context=4)
    assert (list(train), list(evaluation)) == hold_out(documents(path))
    assert list(train) == list(train)


def test_split_without_a_held_out_document_or_row_is_refused(tmp_path, words):
    def refused(contents, **options):
        with pytest.raises(InputError) as caught:
            split(file_of(tmp_path / "a.txt", contents), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    held = [c for c in (f"a b {x} {y}" for x in LETTERS for y in LETTERS) if is_held_out(Document("", c))]
    trained = [c for c in (f"a b {x} {y}" for x in LETTERS for y in LETTERS) if not is_held_out(Document("", c))]
    message = refused(trained[:3])
    assert "3 documents, 0 of them held out at --holdout 0.05" in message
    assert "--eval-text or a larger --holdout" in message
    message = refused([*trained, held[0]], tokenizer=words, context=8)
    assert f"{len(trained) + 1} documents, 1 of them held out" in message
    assert "evaluation do not fill one row" in message
    assert "training do not fill one row" in refused(held[:2])
    assert split(file_of(tmp_path / "a.txt", [*trained, held[0]]), tokenizer=words, context=4)


def test_split_of_two_sources(tmp_path, words):
    a, b = (file_of(tmp_path / name, contents) for name, contents in (("a.txt", ["a b", "c d"]), ("b.txt", ["e f"])))
    train, evaluation = split(a, b, tokenizer=words, context=2)
    assert [d.text for d in train] == ["a b", "c d"]
    assert [d.text for d in evaluation] == ["e f"]
    for short, source, number in ((8, a, "2 documents"), (3, b, "1 document")):
        with pytest.raises(InputError, match="does not fill one row") as caught:
            split(a, b, tokenizer=words, context=short)
        assert repr(str(source)) in str(caught.value)
        assert number in str(caught.value)


def test_document_on_both_sides_is_refused_at_once_and_named(tmp_path):
    a = file_of(tmp_path / "a.txt", ["one", "two", "three"])
    b = file_of(tmp_path / "b.txt", ["four", "\n two \n"])
    with pytest.raises(InputError, match=r"'a.txt#2' is in both"):
        split(a, b)
    with pytest.raises(InputError, match="'austen/Emma' is in both"):
        split("embedded", "austen")


def test_embedded_held_out_documents_are_never_trained_on(tmp_path):
    train, evaluation = split("austen", file_of(tmp_path / "b.txt", ["four"]))
    assert {d.name for d in train}.isdisjoint(embedded.HELD_OUT)
    assert len(list(train)) == 4
    assert [d.text for d in evaluation] == ["four"]
    train, evaluation = split("state-of-the-union", "austen")
    assert (len(list(train)), len(list(evaluation))) == (240, 6)


def hub(monkeypatch, **splits):
    """Stand in for the hub with endless splits, and count what is read of each."""
    read = dict.fromkeys(splits, 0)

    def load_dataset(name, config, split, streaming):
        def stream():
            for example in splits[split]():
                read[split] += 1
                yield {"text": example}

        return stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return read


def endless(form):
    def stream():
        i = 0
        while True:
            yield form.format(i)
            i += 1

    return stream


def test_endless_hub_dataset_is_split_and_packed(monkeypatch, words):
    read = hub(monkeypatch, train=endless("a b {}"))
    train, evaluation = split("hub:owner/name", tokenizer=words, context=8)
    # Each document is 4 tokens with its separator: the third completes a row and its last target.
    first_held = [i for i in range(1000) if is_held_out(Document("", f"a b {i}"))][:3]
    assert (
        read["train"] == 3 + sum(i < 4 and is_held_out(Document("", f"a b {i}")) for i in range(4)) + first_held[2] + 1
    )
    read["train"] = 0
    rows = pack(train, words, 8, limit=800)
    held = sum(is_held_out(Document("", f"a b {i}")) for i in range(read["train"]))
    assert rows.n_tokens == 800
    assert read["train"] - held == 201
    names = {f"owner/name#{1 + i}" for i in range(read["train"]) if not is_held_out(Document("", f"a b {i}"))}
    assert set(rows.documents) <= names
    assert set(rows.documents).isdisjoint(pack(evaluation, words, 8, limit=80).documents)


def test_copy_in_an_evaluation_split_of_the_hub_is_refused_when_it_is_read(monkeypatch):
    hub(monkeypatch, train=endless("a {}"), test=lambda: iter(["b 0", "b 1", "a 7"]))
    train, evaluation = split("hub:owner/name", "hub:owner/name", eval_hub_split="test")
    assert [d.text for d, _ in zip(train, range(5))] == [f"a {i}" for i in range(5)]
    assert len(list(evaluation)) == 3
    with pytest.raises(InputError, match="'owner/name#8' is in both"):
        list(zip(train, range(20)))


# The order of the rows


def test_row_order_by_known_answers():
    # Fixed for ever, on every machine.
    assert row_order(8, seed=0, epoch=0).tolist() == [1, 7, 0, 4, 3, 6, 5, 2]
    assert row_order(8, seed=0, epoch=1).tolist() == [0, 5, 6, 1, 2, 3, 4, 7]
    assert row_order(8, seed=3, epoch=0).tolist() == [1, 2, 5, 4, 7, 3, 6, 0]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 5))
def test_each_epoch_is_a_permutation(n_rows, seed, epoch):
    order = row_order(n_rows, seed, epoch)
    assert sorted(order.tolist()) == list(range(n_rows))
    assert np.array_equal(order, row_order(n_rows, seed, epoch))
    assert order.dtype == np.int64


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(1, 20), st.integers(0, 3), st.integers(0, 70), st.integers(0, 70))
def test_rows_at_a_place_do_not_depend_on_where_reading_began(n_rows, seed, start, count):
    epochs = np.concatenate([row_order(n_rows, seed, epoch) for epoch in range(141 // n_rows + 1)])
    found = row_indices(n_rows, seed, start, count)
    assert np.array_equal(found, epochs[start : start + count])
    assert found.dtype == np.int64


def test_orders_differ_and_cannot_be_spoilt():
    assert not np.array_equal(row_order(100, 0, 0), row_order(100, 0, 1))
    assert not np.array_equal(row_order(100, 0, 0), row_order(100, 1, 0))
    before = row_order(100, 0, 0).copy()
    row_order(100, 0, 0)[:] = 0
    row_indices(100, 0, 0, 50)[:] = 0
    assert np.array_equal(row_order(100, 0, 0), before)
    assert np.array_equal(row_indices(100, 0, 0, 100), before)


def test_bad_places_are_refused():
    for numbers in ((0, 0, 0), (5, -1, 0), (5, 0, -1)):
        with pytest.raises(InputError):
            row_order(*numbers)
    for numbers in ((0, 0, 0, 1), (5, -1, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)):
        with pytest.raises(InputError):
            row_indices(*numbers)
