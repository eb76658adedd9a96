"""A language model and a dictionary built by hand, in which features with known meanings are planted.

The model is a two-layer GPT-2 of 256 tokens. Its weights are set so that the residual stream after block 0 (`SITE`)
holds, in dimensions of their own:

    TOKEN_DIMS      a code of the token: unit length, entries that sum to 0
    BEFORE_DIMS     the code of the token before, fetched by head 0 (the first position fetches itself)
    POSITION_DIMS   the position, one-hot less its mean
    QUOTE_DIMS      what the last quotation mark was, fetched by head 1: opening, closing, none; one-hot less its mean
    ANSWER_DIMS     written by the MLP of block 0: dimension j is 1 at " is" behind subject j, the last at any " is"

Every part but the last has the same length at every token, so the layer norms of block 0 only multiply by a constant.
Block 1 is small and random. The unembedding reads ANSWER_DIMS: dimension j raises the logit of answer j, the last, half
as much, that of " short".

The dictionary (`planted().coder`, 80 features, l1 form) reads that residual stream. What fires where:

    TOKEN       on " king"
    BIGRAM      on " York" behind " New"
    POSITION    at position 7
    QUOTES      from an opening quotation mark to before the closing one
    ANSWER      on " is" behind " Anna"; its direction raises the logit of " tall": it causes the right answer
    WRONG       on every " is"; its direction raises the logit of " short"
    TWIN        where ANSWER does, three times as strongly, but nothing reads its direction

The others are distractors: pairs of random tokens, tokens before, other positions, random projections.
"""

import re
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Normalised
from sparse_jax.lm import LanguageModel, Site, random_model
from sparse_jax.lm.families.gpt2 import GPT2Config
from sparse_jax.lm.rows import Rows

CONTEXT, VOCAB, D, HEADS, HEAD_DIM = 32, 256, 160, 2, 80
TOKEN_DIMS, BEFORE_DIMS, POSITION_DIMS = slice(0, 48), slice(48, 96), slice(96, 128)
QUOTE_DIMS, ANSWER_DIMS, SPARE_DIMS = slice(128, 131), slice(131, 139), slice(139, 160)
SITE = Site("resid_post", 0)

N_FEATURES = 80
POSITION, TOKEN, ANSWER, WRONG, TWIN, BIGRAM, QUOTES = 5, 17, 29, 30, 31, 42, 63
PLANTED_POSITION = 7

SPECIAL = [
    "<|endoftext|>", " king", " New", " York", " “", "”", " is", " Anna", " Bob", " Carl", " tall", " old", " rich",
    " short", ".", ",", "\n", "!", "?", " 7", " 12", " 2024", " NASA", " UK", "ing", "ed", "s", "ly",
]  # fmt: skip
SUBJECTS, ANSWERS = (" Anna", " Bob", " Carl"), (" tall", " old", " rich")
SYLLABLES = ["ba", "de", "ki", "lo", "mu", "na", "po", "ra", "su", "ti", "ve", "zo"]


@cache
def strings() -> list[str]:
    """How each token is written: the special ones, then words of two syllables, every third with a capital."""
    words = [a + b for a in SYLLABLES for b in SYLLABLES] + [a + b + "n" for a in SYLLABLES for b in SYLLABLES]
    words = [f" {word.capitalize() if i % 3 == 0 else word}" for i, word in enumerate(words)]
    return (SPECIAL + words)[:VOCAB]


def token(string: str) -> int:
    """The id of a token."""
    return strings().index(string)


class Words:
    """A tokenizer: text is spelled by the longest tokens that fit."""

    separator_id, bos_id, vocab_size = 0, None, VOCAB
    _longest = re.compile("|".join(map(re.escape, sorted(strings()[1:], key=len, reverse=True))))

    def encode(self, texts):
        pieces = [self._longest.findall(text) for text in texts]
        assert ["".join(found) for found in pieces] == list(texts), "words that the vocabulary lacks"
        return [np.array([token(piece) for piece in found], np.int32) for found in pieces]

    def token_strings(self, ids):
        return [strings()[i] for i in ids]


@cache
def codes() -> np.ndarray:
    """`[vocab, 48]`: of unit length, entries sum to 0; the quotation marks are orthogonal to all others."""
    generator = np.random.default_rng(5)
    made = np.zeros((VOCAB, 48))
    for i, code in enumerate(made):
        # Thresholds of what is planted lie between the overlap with a special token and 1.
        while not code.any() or (made[: min(i, len(SPECIAL))] @ code).max(initial=0) > 0.4:
            code[:44] = generator.permutation(np.repeat([1, -1], 22)) / np.sqrt(44)
    for string, at in ((" “", 44), ("”", 46)):
        made[token(string)] = 0
        made[token(string), at : at + 2] = np.array([1, -1]) / np.sqrt(2)
    return made


@dataclass(frozen=True)
class Planted:
    """The model, the dictionary, the tokenizer, the text, and for each planted feature where it must fire.

    Attributes:
        rows: 200 rows of 32 tokens; the first position and separators do not count.
    """

    lm: LanguageModel
    coder: Normalised
    tokenizer: Words
    rows: Rows


@cache
def planted() -> Planted:
    """All of it. Cached: the same objects at each call."""
    return Planted(model(), coder(), Words(), text())


def model() -> LanguageModel:
    """The language model."""
    config = GPT2Config(2, D, 64, HEADS, VOCAB, CONTEXT, tied_embeddings=False)
    lm = random_model(config, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.array(leaf), lm.params)
    embed, head = params["embed"], params["head"]
    embed["tokens"][:] = 0
    embed["tokens"][:, TOKEN_DIMS] = codes()
    embed["positions"][:] = 0
    embed["positions"][:, POSITION_DIMS] = np.eye(CONTEXT) - 1 / CONTEXT
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])  # views: what is set in them is set in the model
    for part in ("attn", "mlp"):
        for weight in jax.tree.leaves(first[part]):
            weight[:] = 0
    _fetch_token_before(first["attn"], _norm_factor(1 + 31 / 32))
    _fetch_quotation_mark(first["attn"], _norm_factor(1 + 31 / 32))
    _answer(first["mlp"], _norm_factor(1 + 1 + 31 / 32 + 2 / 3))
    head["unembed"][:, ANSWER_DIMS] = head["unembed"][:, SPARE_DIMS] = 0
    for j, answer in enumerate(ANSWERS):
        head["unembed"][token(answer), ANSWER_DIMS.start + j] = 1
    head["unembed"][token(" short"), ANSWER_DIMS.stop - 1] = 0.5
    return LanguageModel(jax.tree.map(jnp.array, params), config, "float32", "planted")


def _norm_factor(square: float) -> float:
    """What a layer norm multiplies a vector of this squared length and mean 0 with."""
    return 1 / np.sqrt(square / D + 1e-5)


def _fetch_token_before(attention: dict, factor: float) -> None:
    """Head 0: the query at p meets the key at p - 1; the token's code goes to BEFORE_DIMS."""
    kernel, out = attention["qkv"]["kernel"], attention["out"]["kernel"]
    strength = np.sqrt(100 * np.sqrt(HEAD_DIM)) / factor
    for p in range(CONTEXT):
        kernel[POSITION_DIMS.start + p, 0, 0, p] = strength
        if p + 1 < CONTEXT:
            kernel[POSITION_DIMS.start + p, 1, 0, p + 1] = strength
    kernel[TOKEN_DIMS, 2, 0, :48] = np.eye(48) / factor
    out[0, :48, BEFORE_DIMS] = np.eye(48)


def _fetch_quotation_mark(attention: dict, factor: float) -> None:
    """Head 1: the last quotation mark, else any token; which of three it was goes to QUOTE_DIMS."""
    kernel, bias, out = attention["qkv"]["kernel"], attention["qkv"]["bias"], attention["out"]["kernel"]
    root = np.sqrt(HEAD_DIM)
    bias[0, 1, 0] = 1
    opening, closing = codes()[token(" “")], codes()[token("”")]
    kernel[TOKEN_DIMS, 1, 1, 0] = 2000 * root * (opening + closing) / factor
    kernel[POSITION_DIMS, 1, 1, 0] = 40 * root * np.arange(CONTEXT) / factor
    for i, read in enumerate((opening, closing, -opening - closing)):
        kernel[TOKEN_DIMS, 2, 1, i] = read / factor
        bias[2, 1, i] = (i == 2) - 1 / 3
        out[1, i, QUOTE_DIMS.start + i] = 1


def _answer(mlp: dict, factor: float) -> None:
    """Neuron j: " is" behind subject j; the last answer dimension: " is" behind anything."""
    up, down = mlp["up"], mlp["down"]
    verb = codes()[token(" is")]
    for j, subject in enumerate(SUBJECTS):
        up["kernel"][TOKEN_DIMS, j] = 40 * verb / factor
        up["kernel"][BEFORE_DIMS, j] = 40 * codes()[token(subject)] / factor
        up["bias"][j] = -40 * 1.7
        down["kernel"][j, ANSWER_DIMS.start + j] = 1 / 12  # the neuron is 40 x 0.3
    up["kernel"][TOKEN_DIMS, 10] = 40 * verb / factor
    up["bias"][10] = -40 * 0.7
    down["kernel"][10, ANSWER_DIMS.stop - 1] = 1 / 12


def coder() -> Normalised:
    """The dictionary."""
    generator = np.random.default_rng(1)
    W_enc, b_enc = np.zeros((D, N_FEATURES)), np.zeros(N_FEATURES)
    W_dec = generator.normal(size=(N_FEATURES, D))
    for feature in range(N_FEATURES):
        a, b = codes()[generator.choice(np.arange(len(SPECIAL), VOCAB), 2, replace=False)]
        kind = feature % 4
        if kind == 0:  # two tokens
            W_enc[TOKEN_DIMS, feature], b_enc[feature] = 3 * (a + b), -3 * 0.9
        elif kind == 1:  # two tokens before
            W_enc[BEFORE_DIMS, feature], b_enc[feature] = 3 * (a + b), -3 * 0.9
        elif kind == 2:  # positions 8, 9, ...
            W_enc[POSITION_DIMS.start + 8 + feature // 4, feature], b_enc[feature] = 2, -1
        else:  # any direction
            W_enc[:, feature], b_enc[feature] = generator.normal(size=D), -2.5

    def plant(feature, direction, bias, **reads):
        W_enc[:, feature], W_dec[feature], b_enc[feature] = 0, 0, bias
        for where, what in reads.items():
            W_enc[globals()[where], feature] = what
        W_dec[feature] = direction if direction is not None else W_enc[:, feature]

    one = lambda dims, i: np.eye(dims.stop - dims.start)[i]  # noqa: E731
    spare = np.zeros(D)
    spare[SPARE_DIMS.start] = 1
    plant(TOKEN, None, -5 * 0.7, TOKEN_DIMS=5 * codes()[token(" king")])
    plant(BIGRAM, None, -5 * 1.7, TOKEN_DIMS=5 * codes()[token(" York")], BEFORE_DIMS=5 * codes()[token(" New")])
    plant(POSITION, None, -1.0, POSITION_DIMS=2 * one(POSITION_DIMS, PLANTED_POSITION))
    plant(QUOTES, None, 0.0, QUOTE_DIMS=2 * one(QUOTE_DIMS, 0))
    plant(ANSWER, None, -0.2, ANSWER_DIMS=one(ANSWER_DIMS, 0))
    plant(WRONG, None, -0.2, ANSWER_DIMS=one(ANSWER_DIMS, -1))
    plant(TWIN, spare, -0.6, ANSWER_DIMS=3 * one(ANSWER_DIMS, 0))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    params = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": np.zeros(D)}
    params = {name: jnp.array(value, jnp.float32) for name, value in params.items()}
    dictionary = L1(n_features=N_FEATURES).sized(D)
    return Normalised(dictionary, params, Normaliser(jnp.zeros(D, jnp.float32), jnp.ones((), jnp.float32)))


def text(n_rows: int = 200) -> Rows:
    """Random words with the planted tokens among them; documents of about 300 tokens behind a separator."""
    generator = np.random.default_rng(2)
    ordinary = np.arange(10, VOCAB)
    stream: list[int] = []
    starts = []
    while len(stream) < n_rows * CONTEXT + 1:
        if not starts or len(stream) - starts[-1] > 300:
            starts.append(len(stream))
            stream.append(0)
        draw = generator.random()
        word = lambda: int(generator.choice(ordinary))  # noqa: E731
        if draw < 0.04:
            stream += [token(" New"), token(" York")]
        elif draw < 0.08:
            stream += [token(" New"), word()] if draw < 0.06 else [word(), token(" York")]
        elif draw < 0.12:
            stream.append(token(" king"))
        elif draw < 0.16:
            stream += [token(" “"), *(word() for _ in range(generator.integers(2, 7))), token("”")]
        elif draw < 0.20:
            subject = int(generator.integers(3))
            stream += [token(SUBJECTS[subject]), token(" is"), token(ANSWERS[subject])]
        elif draw < 0.22:
            stream += [word(), token(" is"), token(" short")]
        else:
            stream.append(word())
    starts = np.array([start for start in starts if start < n_rows * CONTEXT])
    return Rows(
        stream=np.array(stream[: n_rows * CONTEXT + 1], np.uint16),
        document_starts=starts,
        documents=tuple(f"document {i}" for i in range(len(starts))),
        context=CONTEXT,
        skip_positions=1,
        masked_ids=(0,),
        bos_id=None,
        fill_id=0,
        n_dropped=0,
    )


def where_planted(tokens: np.ndarray) -> dict[int, np.ndarray]:
    """Feature -> `[rows, position]` bool, where each planted feature fires on rows of tokens: plain loops."""
    true = {f: np.zeros(tokens.shape, bool) for f in (POSITION, TOKEN, ANSWER, WRONG, TWIN, BIGRAM, QUOTES)}
    for r, row in enumerate(tokens):
        last_mark = None
        for p, here in enumerate(row):
            before = row[max(0, p - 1)]
            last_mark = here if here in (token(" “"), token("”")) else last_mark
            true[TOKEN][r, p] = here == token(" king")
            true[BIGRAM][r, p] = here == token(" York") and before == token(" New")
            true[POSITION][r, p] = p == PLANTED_POSITION
            true[QUOTES][r, p] = last_mark == token(" “")
            true[WRONG][r, p] = here == token(" is")
            true[ANSWER][r, p] = true[TWIN][r, p] = here == token(" is") and before == token(" Anna")
    return true
