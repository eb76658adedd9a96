"""Top-token tables: means by hand, what is left out, hostile tokens in CSV, terminal and page."""

import csv

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.features import Report, render
from sparse_jax.features.collected import Collected
from sparse_jax.features.token_counts import TokenCounter
from sparse_jax.features.top_tokens import as_text, commonest_share, shown, table, top_tokens, write_csv

VOCAB = 8
HOSTILE = ["=1+1", 'a"b,c', "\n", "\r\n<script>", "\x1b[2J", "\u202eevil", "", " x"]
OCCURRENCES = np.array([10, 4, 2, 1, 50, 8, 0, 6])


def strings(ids):
    return [HOSTILE[i] for i in ids]


@pytest.fixture
def collected():
    """Feature 0 fires on all tokens 1 and on half of the tokens 0; feature 1 never; feature 2 once; 3 often."""
    counter = TokenCounter(np.ones((4, 1), np.float32), VOCAB, 100)
    counter.occurrences += OCCURRENCES
    for feature, token, values in (
        (0, 1, [2, 2, 2, 2]),
        (0, 0, [3, 3, 3, 3, 3]),
        (0, 3, [9]),
        (2, 7, [6]),
        (3, 4, [0.5] * 40),
        (3, 5, [0.5] * 8),
        (3, 2, [0.25, 0.25]),
    ):
        counter.add(np.full(len(values), feature), np.full(len(values), token, np.int32), np.array(values, np.float32))
    counts = counter.result()
    fired = np.array([10, 0, 1, 50])
    zeros = np.zeros(4, np.int64)
    return Collected(
        tokens=100, fired=fired, sums=np.zeros((4, 4)), maximum=np.zeros(4, np.float32), first=zeros,
        first_delimiters=zeros, delimiters=zeros, top=None, sample=None, token_counts=counts, coactive=None,
        rows=np.arange(2), seed=0,
    )  # fmt: skip


def told(rows):
    return [(row.feature, [(token.text, token.mean) for token in row.tokens]) for row in rows]


def test_means_over_all_occurrences(collected):
    rows = top_tokens(collected, strings)
    assert told(rows) == [
        (0, [(HOSTILE[3], 9.0), (HOSTILE[1], 2.0), (HOSTILE[0], 1.5)]),
        (2, [(" x", 1.0)]),
        (3, [("\u202eevil", 0.5), ("\x1b[2J", 0.4), ("\n", 0.25)]),
    ]
    assert [row.density for row in rows] == [0.1, 0.01, 0.5]
    token = rows[0].tokens[2]
    assert (token.firings, token.occurrences) == (5, 10)


def test_means_where_it_fires(collected):
    rows = top_tokens(collected, strings, over="firings", count=2, order="density")
    assert told(rows) == [
        (3, [("\x1b[2J", 0.5), ("\u202eevil", 0.5)]),
        (0, [(HOSTILE[3], 9.0), ("=1+1", 3.0)]),
        (2, [(" x", 6.0)]),
    ]


def test_rare_tokens_are_left_out(collected):
    rows = top_tokens(collected, strings, least=7, order="mean")
    assert told(rows) == [(0, [("=1+1", 1.5)]), (3, [("\u202eevil", 0.5), ("\x1b[2J", 0.4)]), (2, [])]


def test_the_share_of_the_commonest_token(collected):
    np.testing.assert_allclose(commonest_share(collected.token_counts), [0.5, 0, 1, 0.8])


def test_csv_is_read_back_as_it_was(collected, tmp_path):
    path = tmp_path / "table.csv"
    rows = top_tokens(collected, strings)
    write_csv(rows, path)
    with path.open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["feature", "density", "token_1", "mean_1", "firings_1", "token_2", "mean_2", "firings_2",
                    "token_3", "mean_3", "firings_3"]  # fmt: skip
    for line, row in zip(lines, rows, strict=True):
        assert (int(line[0]), float(line[1])) == (row.feature, row.density)
        assert line[2::3] == [token.text for token in row.tokens]
        assert [float(cell) for cell in line[3::3]] == [token.mean for token in row.tokens]
        assert [int(cell) for cell in line[4::3]] == [token.firings for token in row.tokens]
    assert [each.name for each in tmp_path.iterdir()] == ["table.csv"]
    # A surrogate alone has no UTF-8.
    write_csv(top_tokens(collected, lambda ids: ["\ud800"] * len(ids)), path)
    assert "\\ud800" in path.read_text(encoding="utf-8")


def test_the_terminal_is_safe(collected):
    text = as_text(top_tokens(collected, strings))
    assert len(text.split("\n")) == 3
    assert text.replace("\n", "").isprintable()
    assert r"'\x1b[2J' 0.4" in text
    assert text.startswith("0   10.000 %  ")
    assert shown(" x") == "' x'"
    assert as_text([]) == ""


def test_the_page_is_safe(collected):
    made = table(top_tokens(collected, strings), "layer 3", "a note")
    assert made.columns == ("feature", "density, %", "token 1", "token 2", "token 3")
    assert [len(row) for row in made.rows] == [5, 5, 5]
    page = render(Report(title="t", tables=(made,)))
    assert "<script>" not in page
    assert r"&lt;script&gt;" in page
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert table([], "nothing").rows == ()


@pytest.mark.parametrize("options", [{"count": 0}, {"least": 0}, {"over": "all"}, {"order": "name"}])
def test_what_cannot_be_asked(collected, options):
    with pytest.raises(InputError, match="give"):
        top_tokens(collected, strings, **options)
