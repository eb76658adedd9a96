"""A text read as it goes: the same rows, an order that depends on nothing behind a window, reading ahead."""

import threading
from functools import partial

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.lm.order import row_indices, windowed_row_indices
from sparse_jax.lm.packing import Layout, pack, row_windows
from sparse_jax.lm.row_stream import RowStream
from tests.lm.letters import LETTERS, letter_tokenizer, texts

LAYOUT = Layout(6)
CONTENTS = [" ".join(LETTERS[i % 7 : i % 7 + 3 + i % 11]) for i in range(60)]
WINDOW = 7


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return letter_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def whole(words):
    return pack(texts(*CONTENTS), words, LAYOUT.context)


def stream(words, documents=None, **options):
    source = (lambda: iter(texts(*CONTENTS))) if documents is None else documents

    def windows():
        return row_windows(source(), words, LAYOUT, window_rows=WINDOW, **options)

    return RowStream(windows, WINDOW)


def assert_same(one, other):
    for left, right in zip(one, other):
        assert np.array_equal(left, right)


def test_rows_are_those_of_the_packed_text(words, whole):
    read = stream(words)
    assert read.n_rows is None
    numbers = np.arange(len(whole))
    for start in range(0, len(whole), 5):
        part = numbers[start : start + 5]
        assert_same(read[part], whole[part])
    assert (read.n_rows, read.n_tokens) == (len(whole), whole.n_tokens)
    assert tuple(read.documents) == whole.documents
    # Back to the start, across windows, with empty rows and out of order.
    mixed = np.array([3, -1, 8, 6, 0])
    assert_same(read[mixed], whole[mixed])
    assert tuple(read.documents) == whole.documents
    with pytest.raises(IndexError):
        read[np.array([len(whole)])]


def test_the_order_is_a_permutation_of_each_window_in_each_epoch(words, whole):
    read, n = stream(words), len(whole)
    places = np.concatenate([read.ordered(3, start, 4) for start in range(0, 3 * n, 4)])[: 3 * n]
    assert np.array_equal(places, windowed_row_indices(n, WINDOW, 3, 0, 3 * n))
    for epoch in range(3):
        for start in range(0, n, WINDOW):
            part = places[epoch * n + start : min(epoch * n + start + WINDOW, (epoch + 1) * n)]
            assert sorted(part) == list(range(start, min(start + WINDOW, n)))
    assert np.any(places[:n] != places[n : 2 * n])
    assert np.any(places[:n] != np.arange(n))


def test_the_order_before_the_end_of_a_window_depends_on_nothing_behind_it():
    for n in (14, 15, 20, 700):
        assert np.array_equal(windowed_row_indices(n, 7, 1, 0, 14), windowed_row_indices(1400, 7, 1, 0, 14))


def test_one_window_is_as_good_as_any_and_bad_numbers_are_refused():
    assert sorted(windowed_row_indices(5, 100, 0, 0, 5)) == sorted(row_indices(5, 0, 0, 5))
    assert windowed_row_indices(5, 2, 0, 3, 0).tolist() == []
    for wrong in ((5, 0, 0, 0, 1), (5, 2, 0, -1, 1), (0, 2, 0, 0, 1), (5, 2, -1, 0, 1)):
        with pytest.raises(InputError):
            windowed_row_indices(*wrong)


def test_the_next_window_is_read_before_it_is_asked_for(words):
    read, asked = threading.Semaphore(0), []

    def documents():
        for document in texts(*CONTENTS):
            asked.append(document.name)
            read.release()
            yield document

    streamed = stream(words, documents)
    streamed[np.array([0])]
    held = len(streamed.documents)
    # The thread gets on by itself to documents that no window asked for yet holds.
    for _ in range(held + 3):
        assert read.acquire(timeout=20)
    # But no further than the next window: the rest of the text is not read.
    assert len(asked) < len(CONTENTS) - 10


def test_a_text_that_stops_gives_its_whole_windows_first(words, whole):
    def documents():
        yield from texts(*CONTENTS[:25])
        raise InputError("the connection was lost")

    broken = stream(words, documents)
    assert_same(broken[np.arange(WINDOW)], whole[np.arange(WINDOW)])
    for start in range(0, 35, WINDOW):
        assert_same(broken[np.arange(start, start + WINDOW)], whole[np.arange(start, start + WINDOW)])
    with pytest.raises(InputError, match=r"after 35 rows of text: the connection was lost"):
        broken[np.array([35])]


def test_a_text_too_short_is_refused_when_it_is_opened(words):
    with pytest.raises(InputError, match="shorter than one row"):
        stream(words, partial(texts, "a b"))
