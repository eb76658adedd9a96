"""Generation: remembered keys and values change nothing, edits hold at each step, tokens are drawn as asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, add, at, fill, forward, generate, load, put, zero
from sparse_jax.lm.generate import Sampling, _draw, _generate

# One of each kind: parallel and sequential, learned and rotary positions, shared key-value heads, windows, norms.
FAMILIES = ("parallel", "sequential", "gpt2-hub", "gpt2-by-layer", "llama", "mistral", "qwen2-window", "qwen3")
PROMPT = np.array([[3, 1, 4, 1, 5], [6, 5, 3, 5, 8], [2, 7, 1, 8, 2]])
N_TOKENS = 6


def uncached(lm, prompt, lengths, made, edits=(), prompt_edits=()):
    """Logits `[batch, n, vocab]` that each new token was chosen from, by whole passes over each row alone."""
    found = []
    for row, length, new in zip(prompt, lengths, np.asarray(made), strict=True):
        rows = np.concatenate([row[:length], new])[None, :-1]
        logits = forward(lm, rows, edits=edits).logits
        found.append(np.asarray(logits[0, length - 1 :]))
    return np.stack(found)


def relative(ours, theirs):
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_logits_are_uncached_ones(loaded, name):
    lm = loaded(name)
    made = generate(lm, PROMPT, N_TOKENS, keep_logits=True)
    expected = uncached(lm, PROMPT, [5] * 3, made.tokens)
    assert made.tokens.shape == (3, N_TOKENS)
    assert made.logits.shape == expected.shape
    assert relative(made.logits, expected) < 1e-5
    np.testing.assert_array_equal(made.tokens, expected.argmax(-1))  # greedy


@pytest.mark.parametrize("name", ["parallel", "gpt2-hub", "qwen3"])
def test_cached_logits_in_float64(loaded, name, x64):
    lm = loaded(name, "float64")
    made = generate(lm, PROMPT, N_TOKENS, keep_logits=True)
    assert made.logits.dtype == jnp.float64
    assert relative(made.logits, uncached(lm, PROMPT, [5] * 3, made.tokens)) < 1e-13


def test_cached_logits_of_the_trained_model():
    """200 tokens: past the first block of queries."""
    lm = load()
    prompt = np.arange(100, 108)[None]
    made = generate(lm, prompt, 200, keep_logits=True)
    expected = uncached(lm, prompt, [8], made.tokens)
    assert relative(made.logits, expected) < 1e-5
    assert len(set(np.asarray(made.tokens)[0].tolist())) > 10


def test_prompts_of_several_lengths_are_those_prompts_alone(loaded):
    """What fills the shorter ones up is never seen, whatever it is."""
    lm, lengths = loaded("mistral"), [2, 5, 3]
    made = generate(lm, PROMPT, N_TOKENS, lengths=lengths, keep_logits=True)
    assert relative(made.logits, uncached(lm, PROMPT, lengths, made.tokens)) < 1e-5
    np.testing.assert_array_equal(generate(lm, PROMPT[:1, :2], N_TOKENS).tokens[0], made.tokens[0])
    filled = np.where(np.arange(5) < np.array(lengths)[:, None], PROMPT, 0)
    np.testing.assert_array_equal(generate(lm, filled, N_TOKENS, lengths=lengths, keep_logits=True).logits, made.logits)


STEER = Edit("resid_post.0", add, (jnp.linspace(-2.0, 2.0, 16), jnp.array(1.5)))
EDITS = {
    "steering": [STEER],
    "a head": [Edit("attn_z.1", zero, where=at(heads=[1]))],
    "one position of the prompt": [Edit("resid_pre.1", zero, where=at(positions=[2]))],
    "one position to come": [Edit("resid_pre.1", zero, where=at(positions=[7]))],
    "new tokens only": [dataclasses.replace(STEER, where=at(first=[5, 5, 5]))],
    "from the second new token on": [dataclasses.replace(STEER, where=at(first=6))],
    "several": [STEER, Edit("mlp_out.1", fill, (jnp.ones(16),)), Edit("attn_pattern.0", zero, where=at(heads=[0]))],
    "keys and values": [Edit("attn_k.0", zero, where=at(heads=[0])), Edit("attn_v.1", zero, where=at(positions=[1]))],
}


@pytest.mark.parametrize("name", ["parallel", "mistral"])
@pytest.mark.parametrize("edits", EDITS)
def test_edits_hold_at_every_step(loaded, name, edits):
    lm, edits = loaded(name), EDITS[edits]
    made = generate(lm, PROMPT, N_TOKENS, edits=edits, keep_logits=True)
    # The last new token is never fed back, so a place that it would take is beyond the whole pass.
    expected = uncached(lm, PROMPT, [5] * 3, made.tokens, edits=[first_of_row(edit) for edit in edits])
    assert relative(made.logits, expected) < 1e-5
    clean = generate(lm, PROMPT, N_TOKENS, keep_logits=True)
    assert np.abs(made.logits - clean.logits).max() > 1e-2


def first_of_row(edit):
    """The edit for a batch of one row: all rows of a first position are alike here."""
    if edit.where is None or edit.where.first is None:
        return edit
    return dataclasses.replace(edit, where=at(first=edit.where.first[:1]))


def test_edits_of_the_prompt_alone(loaded):
    """Patching the prompt from another run: the new tokens are untouched, and see what was put in."""
    lm = loaded("llama")
    other = forward(lm, PROMPT[::-1].copy(), capture=["resid_post.0"]).captured["resid_post.0"]
    patch = Edit("resid_post.0", put, (other,), at(positions=[4]))
    made = generate(lm, PROMPT, 3, prompt_edits=[patch], keep_logits=True)
    np.testing.assert_allclose(
        made.logits[:, 0], forward(lm, PROMPT, edits=[patch]).logits[:, -1], rtol=1e-5, atol=1e-5
    )
    clean = generate(lm, PROMPT, 3, keep_logits=True)
    assert np.abs(made.logits - clean.logits).max() > 1e-2
    with pytest.raises(ValueError, match="an edit keeps shape and dtype"):
        generate(lm, PROMPT, 3, edits=[patch])  # at a step there is one position, the patch has five


def test_a_mask_over_the_prompt_changes_no_new_token(loaded):
    lm = loaded("gpt2-hub")
    masked = generate(lm, PROMPT, 3, edits=[Edit("resid_post.0", zero, where=at(mask=np.zeros((3, 5), bool)))])
    np.testing.assert_array_equal(masked.tokens, generate(lm, PROMPT, 3).tokens)


def test_a_row_ends_at_its_stop_token(loaded):
    lm = loaded("parallel")
    free = np.asarray(generate(lm, PROMPT, 12).tokens)
    stop = int(free[0, 4])
    made = generate(lm, PROMPT, 12, stop_tokens=[stop])
    for row, length, tokens in zip(free, made.lengths, np.asarray(made.tokens), strict=True):
        ends = np.flatnonzero(row == stop)
        assert length == (ends[0] + 1 if len(ends) else 12)
        np.testing.assert_array_equal(tokens[:length], row[:length])
        assert (tokens[length:] == stop).all()
    every = generate(lm, PROMPT, 12, stop_tokens=range(29))
    np.testing.assert_array_equal(every.lengths, [1, 1, 1])
    np.testing.assert_array_equal(every.tokens, np.repeat(free[:, :1], 12, 1))


# Drawing


def frequencies(logits, n=20000, top_k=None, **sampling):
    sampling = Sampling(jnp.array(sampling.get("temperature", 1.0)), jnp.array(sampling.get("top_p", 1.0)))
    rows = jnp.broadcast_to(jnp.array(logits), (n, len(logits)))
    return np.bincount(_draw(rows, sampling, top_k, jax.random.key(0)), minlength=len(logits)) / n


def test_tokens_are_drawn_as_often_as_they_should_be():
    p = np.array([0.5, 0.05, 0.3, 0.15])
    logits = np.log(p).astype(np.float32) + 2
    np.testing.assert_allclose(frequencies(logits), p, atol=0.02)
    np.testing.assert_allclose(frequencies(logits, temperature=0.5), p**2 / (p**2).sum(), atol=0.02)
    np.testing.assert_allclose(frequencies(logits, top_k=2), [0.625, 0, 0.375, 0], atol=0.02)
    np.testing.assert_allclose(frequencies(logits, top_p=0.6), [0.625, 0, 0.375, 0], atol=0.02)
    np.testing.assert_allclose(frequencies(logits, top_p=0.5 - 1e-6), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(logits, top_p=1e-9), [1, 0, 0, 0])
    np.testing.assert_allclose(
        frequencies(logits, top_k=3, top_p=0.9), [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95], atol=0.02
    )
    np.testing.assert_allclose(frequencies(logits, temperature=1e-4), [1, 0, 0, 0])


def test_the_key_decides_what_is_drawn(loaded):
    lm = loaded("gpt2-hub")

    def draw(seed, **more):
        return np.asarray(generate(lm, PROMPT, 15, temperature=1.0, key=jax.random.key(seed), **more).tokens)

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    assert len({row.tobytes() for row in draw(0)}) == 3


# Compilations, dtypes, errors


def test_other_prompts_and_numbers_compile_nothing_new(loaded):
    lm, before = loaded("llama"), _generate._cache_size()
    for seed in range(4):
        prompt = np.random.default_rng(seed).integers(0, 29, (2, 4))
        edits = [Edit("resid_post.1", add, (jnp.full(16, float(seed)), jnp.array(0.1 * seed)))]
        generate(
            lm, prompt, 7, lengths=[1 + seed % 4, 4], temperature=0.5 + seed, top_p=0.9 - 0.1 * seed,
            key=jax.random.key(seed), edits=edits,
        )  # fmt: skip
    assert _generate._cache_size() == before + 1


def test_bfloat16(model_folder):
    lm = load(model_folder("llama"), dtype="bfloat16")
    made = generate(lm, PROMPT, 4, keep_logits=True)
    assert made.logits.dtype == jnp.float32
    assert relative(made.logits, uncached(lm, PROMPT, [5] * 3, made.tokens)) < 3e-2


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"n_tokens": 0}, "0 new tokens"),
        (
            {"n_tokens": 60},
            "60 new tokens after prompts of up to 5: give at least 1, and together at most the model's 64",
        ),
        ({"lengths": [1, 2]}, "give one integer from 1 to 5 for each of 3 rows"),
        ({"lengths": [0, 2, 3]}, "from 1 to 5"),
        ({"lengths": [6, 2, 3]}, "from 1 to 5"),
        ({"temperature": -1.0}, "temperature -1.0: give 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1.0}, "draws tokens at random: give a key"),
        ({"top_k": 3}, "top_k and top_p are for drawing tokens; give a temperature above 0"),
        ({"top_k": 0, "temperature": 1.0}, "top_k 0: give 1 to 29"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p 1.5: give a probability"),
        ({"prompt": np.zeros((3, 0), np.int32)}, "0 positions"),
        ({"prompt": np.array([[40, 1]])}, "token ids from 1 to 40; the model's are 0 to 28"),
        ({"prompt": np.zeros((1, 3, 16), np.float32)}, r"a prompt has shape \[batch, position\]"),
        ({"edits": [Edit("resid_mid.0", zero)]}, "attention and MLP run in parallel"),
        ({"edits": [Edit("resid_pre.9", zero)]}, "the model has layers 0 to 2"),
        ({"edits": [Edit("attn_z.0", zero, where=at(heads=[7]))]}, "there are 4 heads"),
        ({"prompt_edits": [Edit("resid_pre.0", zero, where=at(positions=[5]))]}, "there are 5 positions"),
    ],
)
def test_what_cannot_be_generated_is_refused(loaded, given, shown):
    with pytest.raises(InputError, match=shown):
        generate(loaded("parallel"), **({"prompt": PROMPT, "n_tokens": 3} | given))
