"""Attention sinks planted into the embedded model: with the mask every figure is that of the model without them.

At position 0 and at the first delimiter of each row a vector along (1, ..., 1) is added to the residual stream of an
early layer, 50 times as long as an activation is. Layer norms take their input's mean away, so that the model predicts
what it predicted before, while these few activations hold nearly all of the variance.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Neurons, Normalised
from sparse_jax.lm import Edit, Site, forward, load, resolve
from sparse_jax.lm.holdout import split
from sparse_jax.lm.packing import pack
from sparse_jax.lm.tokenizer import load_tokenizer
from sparse_jax.metrics import EvalBatch, Setting, evaluate
from sparse_jax.training import reconstructor

EARLY, SITE = Site("resid_post", 1), Site("resid_post", 3)
# "." and "," of the embedded tokenizer; `test_the_delimiters` holds them to it.
DELIMITERS = (15, 13)
# 50 median norms at EARLY, over the square root of the width, 256.
HEIGHT = 50 * 30.0 / 16


def planted_places(tokens):
    """`[rows, position]` bool: position 0 and the first delimiter of each row that has one."""
    is_delimiter = jnp.isin(tokens, jnp.array(DELIMITERS, tokens.dtype))
    first = is_delimiter & (jnp.cumsum(is_delimiter, axis=1) == 1)
    return first | (jnp.arange(tokens.shape[1]) == 0)


def raise_there(value, places):
    return value + jnp.where(places[..., None], HEIGHT, 0.0).astype(value.dtype)


def planting(tokens):
    return (Edit(EARLY, raise_there, (planted_places(tokens),)),)


@pytest.fixture(scope="module")
def lm():
    return load("novel-neox")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("novel-neox"))


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Eleven rows of held-out text and an empty one."""
    rows = pack(split("austen")[1], tokenizer, 32, limit=32 * 400, skip_positions=1)
    return EvalBatch(*(jnp.array(part) for part in rows[np.append(np.arange(0, 330, 30), -1)][:3]))


@pytest.fixture(scope="module")
def x(lm, batch):
    """Activations at the site, of the model as it is, on real tokens."""
    return np.asarray(forward(lm, batch.tokens, capture=[SITE]).captured[str(SITE)])[np.asarray(batch.targets) >= 0]


@pytest.fixture(scope="module")
def dictionaries(x):
    """Principal components and their opposites behind a threshold, a few of which never fire; and neurons."""
    dictionary = L1(n_features=512).sized(256)
    _, vectors = np.linalg.eigh(np.cov(x.T))
    W_dec = jnp.array(np.concatenate([vectors.T, -vectors.T]), jnp.float32)
    b_enc = jnp.where(jnp.arange(512) < 9, -1e5, -0.5)
    params = {"W_dec": W_dec, "W_enc": W_dec.T, "b_enc": b_enc, "b_dec": jnp.zeros(256)}
    normaliser = Normaliser(jnp.array(x.mean(0)), jnp.float32(np.sqrt(np.mean(x.var(axis=0)))))
    neurons = Neurons(k=20, n_features=256).sized(256)
    identity = Normaliser(jnp.zeros(256), jnp.ones(()))
    return {
        "dictionary": reconstructor(Normalised(dictionary, params, normaliser)),
        "neurons": reconstructor(Normalised(neurons, neurons.fit(jnp.array(x.mean(0))), identity)),
    }


@pytest.fixture(scope="module")
def measured(lm, batch, x, dictionaries):
    def measure(mask, drop, edits_for):
        return evaluate(
            lm,
            Setting(SITE, drop, edits_for),
            [batch._replace(mask=mask)],
            dictionaries,
            mean=x.mean(0),
            outlier_norm=10 * float(np.median(np.linalg.norm(x, axis=1))),
        )

    return {
        "plain": measure(batch.mask & ~planted_places(batch.tokens), False, None),
        "dropped": measure(batch.mask, True, planting),
        "kept": measure(batch.mask, False, planting),
    }


def test_the_delimiters(tokenizer):
    assert [list(ids) for ids in tokenizer.encode([".", ","])] == [[i] for i in DELIMITERS]


def test_the_plant_is_what_it_is_said_to_be(lm, batch, x):
    tokens = batch.tokens
    plain, planted = (forward(lm, tokens, capture=[SITE], edits=edits) for edits in ((), planting(tokens)))
    np.testing.assert_allclose(planted.logits, plain.logits, atol=2e-3)
    norms, places = np.linalg.norm(planted.captured[str(SITE)], axis=-1), np.asarray(planted_places(tokens))
    median = np.median(np.linalg.norm(x, axis=1))
    assert norms[places].min() > 25 * median
    assert norms[~places].max() < 5 * median


def test_masked_figures_are_those_without_outliers(measured):
    plain, dropped = measured["plain"], measured["dropped"]
    assert dropped.figures.keys() == plain.figures.keys()
    for name in plain.figures:
        expected = pytest.approx(plain.figures[name], rel=1e-4, abs=1e-5)
        assert dropped.figures[name] == expected, name
        assert dropped.floors["neurons"][name] == pytest.approx(plain.floors["neurons"][name], rel=1e-4, abs=1e-5), name
    # ... and say something.
    assert 0.05 < plain.figures["fvu"] < 1
    assert plain.figures["ce_increase"] > 0.01
    assert plain.figures["kl"] > 0.01
    assert 0 < plain.figures["dead_fraction"] < 1
    np.testing.assert_array_equal(dropped.fired, plain.fired)


def test_outliers_are_counted_exactly(measured, batch):
    real, by_text = np.asarray(batch.targets) >= 0, np.asarray(batch.mask)
    planted = np.asarray(planted_places(batch.tokens)) & real
    n_planted, n_unmasked, n_by_text = planted.sum(), (planted & by_text).sum(), (real & ~by_text).sum()
    assert n_planted > n_unmasked > 5
    dropped, kept = measured["dropped"].mask, measured["kept"].mask
    for mask in (dropped, kept):
        assert mask["tokens"] == real.sum() == 11 * 32
        assert mask["outliers"] == n_planted
    assert (dropped["dropped_by_norm"], dropped["outliers_kept"]) == (n_unmasked, 0)
    assert (kept["dropped_by_norm"], kept["outliers_kept"]) == (0, n_unmasked)
    assert (dropped["dropped"], kept["dropped"]) == (n_by_text + n_unmasked, n_by_text)
    assert dropped["dropped_share_of_variance"] > 0.95
    assert measured["plain"].mask["outliers"] == 0
    assert measured["plain"].mask["dropped_share_of_variance"] < 0.3


def test_kept_outliers_change_the_figures_grossly(measured):
    """So that the comparison above can fail; and so do the figures that are reported without any mask."""
    plain, kept, dropped = measured["plain"], measured["kept"], measured["dropped"]
    ratio = kept.figures["fvu"] / plain.figures["fvu"]
    assert not 1 / 3 < ratio < 3, ratio
    assert abs(kept.figures["l1"] / plain.figures["l1"] - 1) > 0.5
    assert not 1 / 3 < dropped.unmasked["fvu"] / plain.unmasked["fvu"] < 3
