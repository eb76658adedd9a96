"""Simulated activations as they are read from replies: expected values by hand, integers, what is missing."""

import math

import numpy as np
import pytest

from sparse_jax.features.explain import simulate
from sparse_jax.features.explain.requests import Reply, numbered_values


def reply(*tokens):
    """A reply of tokens; (token, {alternative: probability}) where it has some."""
    pairs = [(t, None) if isinstance(t, str) else (t[0], {a: math.log(p) for a, p in t[1].items()}) for t in tokens]
    return Reply("".join(token for token, _ in pairs), tokens=pairs)


def test_integers_where_there_are_no_log_probabilities():
    found = simulate.read(Reply('1\t" a"\t0\n2\t" king"\t10\n3\t"\\n"\t4'), 3)
    np.testing.assert_array_equal(found.values, [0, 10, 4])
    assert (found.kind, found.missing) == ("integer", 0)


def test_expected_values_by_hand():
    first = ("0", {"0": 0.5, "1": 0.25, "10": 0.05, "king": 0.2})
    second = ("\t7", {"\t7": 0.6, " 8": 0.2, "7.5": 0.1})
    found = simulate.read(reply("1", '\t" a"\t', first, "\n", "2", '\t" b"', second), 2)
    np.testing.assert_allclose(found.values, [(0.25 + 0.5) / 0.8, (7 * 0.6 + 8 * 0.2) / 0.8])
    assert (found.kind, found.missing) == ("expected", 0)


def test_ten_as_two_tokens():
    """1 then 0: the mass of 1 is shared between 1 and 10 as the next token's alternatives say."""
    one, zero = ("1", {"1": 0.6, "9": 0.3}), ("0", {"0": 0.75})
    found = simulate.read(reply('1\t" a"\t', one, zero, "\n"), 1)
    np.testing.assert_allclose(found.values, [(0.6 * 0.75 * 10 + 0.6 * 0.25 * 1 + 0.3 * 9) / 0.9])
    # Written as 1, it is 1.
    found = simulate.read(reply('1\t" a"\t', one, "\n"), 1)
    np.testing.assert_allclose(found.values, [(0.6 * 1 + 0.3 * 9) / 0.9])


def test_some_of_both():
    found = simulate.read(reply('1\t" a"\t', ("3", {"3": 0.9}), '\n2\t" b"\t', ("4", {"four": 0.9})), 2)
    np.testing.assert_allclose(found.values, [3, 4])
    assert found.kind == "mixed"


def test_places_are_places_in_tokens():
    """A token that is half a character reads otherwise alone than in the message."""
    tokens = [('1\t"', None), ("\\xc3", None), ("\\xa9", None), ('"\t', None), ("5", {"6": 0.0})]
    found = simulate.read(Reply('1\t"é"\t5', tokens=tokens), 1)
    assert (found.values[0], found.kind) == (6, "expected")


def test_tokens_by_other_names_are_not_read():
    """Where line breaks are written as another sign the tokens have no lines; the message has."""
    tokens = [
        ("1\u0120a\u0120", None),
        ("3", {"4": 0.0}),
        ("\u010a", None),
        ("2\u0120b\u0120", None),
        ("5", {"6": 0.0}),
    ]
    found = simulate.read(Reply("1 a 3\n2 b 5", tokens=tokens), 2)
    np.testing.assert_array_equal(found.values, [3, 5])
    assert found.kind == "integer"


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("", {}),
        ("I cannot do that.", {}),
        ("1: 3\n2. 4", {0: 3, 1: 4}),
        ('1\t" 1990"\n2\t" b"\t2', {1: 2}),
        ("1 a 3\n1 a 5", {0: 3}),
        ("7 x 3\n0 x 3\n2 x 11\n1 x 2.5\n", {}),
        ("1\tx\t-3\n2\tx\t7/10", {}),
        ("```\n1\tx\t3  \r\n```", {0: 3}),
        ('12\t"x"\t3', {}),
        ("70", {}),
    ],
)
def test_lines_that_are_and_are_not_understood(text, due):
    found = numbered_values(text, 2, 10)
    assert {number: value for number, (value, _) in found.items()} == due
    assert all(text[place : place + len(str(value))] == str(value) for value, place in found.values())
    read = simulate.read(Reply(text), 2)
    assert read.missing == 2 - len(due)
    assert read.kind == ("integer" if due else "none")


def test_the_question_shows_every_token_once():
    tokens = [" a", "\n", ' "quoted"', "1\t2", "é"]
    request = simulate.request('the token "x"', tokens)
    assert request.user.count("\n1\t") == 1
    assert '\n2\t"\\n"\n3\t" \\"quoted\\""\n4\t"1\\t2"\n5\t"é"\n' in request.user
    assert request.values
    assert request.expected_tokens < request.max_tokens
