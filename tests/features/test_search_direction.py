"""Search by direction: what writes along it comes first, cosines are plain ones, directions are those of the logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Fista, Neurons, Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.prompts import make_prompts
from sparse_jax.features.search_direction import difference_of_means, similarity, unembedding
from sparse_jax.features.target_scores import ranking
from sparse_jax.lm import forward, random_model
from sparse_jax.lm.families.gpt2 import GPT2Config
from sparse_jax.lm.families.llama import LlamaConfig
from tests.features import planted as p


@pytest.fixture(scope="module")
def made():
    return p.planted()


def test_the_planted_feature_is_first(made):
    for feature, token in ((p.ANSWER, " tall"), (p.WRONG, " short")):
        found = similarity(made.coder, unembedding(made.lm, p.token(token)))
        assert ranking(found.decoder)[0] == feature
        assert found.decoder[feature] > 0.4
        assert found.encoder[feature] > 0.4
    found = similarity(made.coder, np.asarray(made.coder.directions())[p.BIGRAM] * 7)
    assert ranking(found.decoder)[0] == p.BIGRAM
    assert found.decoder[p.BIGRAM] == pytest.approx(1)
    # What reads a direction need not write it.
    read = np.asarray(made.coder.params["W_enc"])[:, p.TWIN]
    found = similarity(made.coder, read)
    assert {ranking(found.encoder)[0], ranking(found.encoder)[1]} == {p.ANSWER, p.TWIN}
    assert found.decoder[p.TWIN] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("feature", "word"), [(p.TOKEN, " king"), (p.WRONG, " is"), (p.QUOTES, " “")])
def test_difference_of_means(made, feature, word):
    words = [s for s in p.strings()[40:] if s.startswith(" ")]
    generator = np.random.default_rng(0)
    texts = [[word if i % 3 else " bade" for i in range(9)] + list(generator.choice(words, 3)) for _ in range(10)]
    a = make_prompts(p.Words().encode(["".join(text) for text in texts]), longest=p.CONTEXT, length=12)
    b = make_prompts(p.Words().encode(["".join(generator.choice(words, 12)) for _ in range(10)]), longest=p.CONTEXT)
    direction = difference_of_means(made.lm, p.SITE, a, b)
    means = []
    for prompts in (a, b):
        x = np.asarray(forward(made.lm, prompts.tokens, capture=[p.SITE]).captured[str(p.SITE)], np.float64)
        means.append(x[prompts.mask].mean(axis=0))
    np.testing.assert_allclose(direction, means[0] - means[1], atol=1e-5)
    found = similarity(made.coder, direction)
    similar = [f for f in ranking(found.decoder) if f < 80][:2]
    assert feature in similar
    with pytest.raises(InputError, match="no place"):
        difference_of_means(made.lm, p.SITE, a, b, max_norm=1e-3)


def test_cosines_are_plain_ones():
    """With a normaliser, whose scale changes no angle; a row of length 0 has cosine 0."""
    key = jax.random.key(0)
    dictionary = L1(n_features=6).sized(4)
    params = dictionary.init(key) | {"W_enc": jax.random.normal(key, (4, 6))}
    params["W_dec"] = params["W_dec"].at[2].set(0)
    trained = Normalised(dictionary, params, Normaliser(jnp.ones(4), jnp.float32(3)))
    direction = np.array([1.0, -2, 0.5, 0])
    found = similarity(trained, direction)
    for i in range(6):
        for rows, got in ((np.asarray(params["W_dec"]), found.decoder), (np.asarray(params["W_enc"]).T, found.encoder)):
            length = np.linalg.norm(rows[i]) * np.linalg.norm(direction)
            assert got[i] == pytest.approx(rows[i] @ direction / length if length else 0, abs=1e-5)
    for wrong in (np.zeros(4), np.ones(5), np.array([1, np.nan, 0, 0])):
        with pytest.raises(InputError, match="direction"):
            similarity(trained, wrong)


def test_what_has_encoder_rows():
    identity = Normaliser(jnp.zeros(4), jnp.float32(1))
    tied = L1(n_features=6, tied=True).sized(4)
    fista = Fista(n_features=6).sized(4)
    neurons = Neurons(n_features=4, d_in=4, d_out=4)
    direction = np.array([0.0, 1, 0, 0])
    found = {
        name: similarity(Normalised(d, d.init(jax.random.key(0)), identity), direction)
        for name, d in (("tied", tied), ("fista", fista), ("neurons", neurons))
    }
    np.testing.assert_allclose(found["tied"].encoder, found["tied"].decoder, atol=1e-6)
    np.testing.assert_allclose(found["neurons"].encoder, direction, atol=1e-6)
    assert found["fista"].encoder is None


@pytest.mark.parametrize(
    "config", [GPT2Config(1, 8, 16, 2, 20, 16), LlamaConfig(1, 8, 16, 2, 2, 4, 20, 16)], ids=["gpt2", "llama"]
)
def test_unembedding_is_the_logits_slope(config):
    """Along the direction, at a residual of fixed length, log-odds against the average token rise fastest."""
    lm = random_model(config, jax.random.key(0))
    scale = jax.random.uniform(jax.random.key(1), (8,), minval=0.5, maxval=2)
    head = lm.params["head"] | {"norm": lm.params["head"]["norm"] | {"scale": scale}}
    lm = dataclasses.replace(lm, params=lm.params | {"head": head})
    token, direction = 7, unembedding(lm, 7)

    def score(x):
        logits = forward(lm, x[None, None], start=1).logits[0, 0]
        return logits[token] - jnp.mean(logits)

    # The norm divides by a length that does not change to first order across the residual.
    x = jax.random.normal(jax.random.key(2), (8,))
    centred = x - jnp.mean(x) if "bias" in head["norm"] else x
    gradient = np.asarray(jax.grad(score)(x), np.float64)
    across = direction - (direction @ np.asarray(centred)) / float(centred @ centred) * np.asarray(centred)
    cosine = gradient @ across / np.linalg.norm(gradient) / np.linalg.norm(across)
    assert cosine == pytest.approx(1, abs=1e-4)
    with pytest.raises(InputError, match="0 to 19"):
        unembedding(lm, 20)
