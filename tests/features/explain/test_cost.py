"""Estimates of costs: tokens by the rule against a real tokenizer, money by hand, what is refused."""

import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.explain import Estimate, Prices, Request, prompts
from sparse_jax.features.explain.cost import FORMAT_TOKENS, count_tokens, estimate
from sparse_jax.features.explain.requests import quoted
from sparse_jax.lm.tokenizer import load_tokenizer

SENTENCES = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families. In 1813 there were 1,500 copies."
)


def test_tokens_by_hand():
    assert count_tokens("") == 0
    assert count_tokens("the king") == 2
    assert count_tokens(" acknowledged") == 2  # twelve letters: eight and four
    assert count_tokens("1813") == 2
    assert count_tokens('1\t" king"\t7\n') == 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1


def test_tokens_are_about_those_of_a_tokenizer(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "neox")
    tokens = tokenizer.token_strings(tokenizer.encode([SENTENCES])[0])
    reply = "\n".join(f"{i}\t{quoted(token)}\t0" for i, token in enumerate(tokens, 1))
    written = [
        prompts.simulate("words such as king", tokens),
        prompts.judge("words such as king", [SENTENCES] * 5, prompts.DETECT_YES),
        prompts.EXPLAIN_SYSTEM + prompts.EXPLAIN_TASK + prompts.SIMULATE_SYSTEM,
        reply,
    ]
    for text, ids in zip(written, tokenizer.encode(written)):
        assert count_tokens(text) == pytest.approx(len(ids), rel=0.1)


def test_an_estimate_counts_what_is_left():
    requests = [Request("explain", "one", "two three", 100, 20), Request("simulation", "", "one", 50, 30)]
    both = estimate(requests, [False, False])
    assert both == Estimate(2, 0, 0, 3 + 1 + 2 * FORMAT_TOKENS, 50, 150)
    left = estimate(requests, [True, False])
    assert left == Estimate(1, 1, 0, 1 + FORMAT_TOKENS, 30, 50)
    assert estimate(requests[:1], [False]) + estimate(requests[1:], [False]) == both


def test_prices():
    found = Estimate(10, 0, 0, 1_000_000, 200_000, 500_000)
    prices = Prices(0.5, 2.0)
    assert prices.of(found.prompt_tokens, found.completion_tokens) == pytest.approx(0.9)
    assert "cost about 0.9, at most 1.5" in prices.words(found)
    assert "cost" not in Prices().words(found)
    Prices(0.5, 2.0, 1.5).check(found)
    with pytest.raises(InputError, match=r"10 calls may cost up to 1\.5, more than --max-cost 1\.4"):
        Prices(0.5, 2.0, 1.4).check(found)
    with pytest.raises(InputError, match="needs prices"):
        Prices(limit=1.0).check(found)
    Prices().check(found)
