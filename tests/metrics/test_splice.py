"""Replacing an activation: the same as a full pass with an edit, and CE and KL against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.lm import Edit, Site, at, forward, put, random_model
from sparse_jax.lm.families.llama import LlamaConfig
from sparse_jax.metrics import ce_recovered, clean_predictions, resume_with, splice_sums

SITES = (
    "resid_pre.0",
    "attn_q.0",
    "attn_z.0",
    "attn_out.0",
    "mlp_hidden.0",
    "resid_post.0",
    "attn_z.1",
    "mlp_out.1",
    "resid_post.1",
)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(0, 40, (3, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def targets(text):
    """The next token, and none for the last of each row."""
    return np.concatenate([text[:, 1:], np.full((3, 1), -1)], axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def clean(lm, text):
    return forward(lm, text, capture=(*SITES, "resid_pre.1"))


# A splice is an edit


@partial(jax.jit, static_argnames=("site",))
def resumed(lm, clean, site, value, mask):
    residual = clean[f"resid_pre.{site.layer}"]
    current = clean[str(site)].reshape(*residual.shape[:2], -1)
    return resume_with(lm, residual, site, current, value, mask)


@pytest.mark.parametrize("site", ["attn_k.0", "attn_v.1", "attn_z.1", "resid_mid.0", "mlp_hidden.1"])
def test_resuming_where_query_heads_share_keys(text, site):
    """Keys and values have fewer heads than queries, and heads of another size than width / heads."""
    config = LlamaConfig(2, 16, 24, 4, 2, 6, 40, 16, initializer_range=0.4)
    model, site = random_model(config, jax.random.key(1)), Site.parse(site)
    captured = forward(model, text, capture=[site, f"resid_pre.{site.layer}"]).captured
    there, rng = captured[str(site)], np.random.default_rng(3)
    value, mask = jnp.array(rng.normal(size=(3, 9, there[0, 0].size)), jnp.float32), rng.random((3, 9)) < 0.5
    full = forward(model, text, edits=[Edit(site, put, (value.reshape(there.shape),), at(mask=mask))]).logits
    np.testing.assert_allclose(resumed(model, captured, site, value, mask), full, atol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_resuming_equals_a_full_pass_with_an_edit(lm, text, targets, clean, site):
    captured, site = clean.captured, Site.parse(site)
    there = captured[str(site)]
    value = jnp.array(np.random.default_rng(1).normal(size=(3, 9, there[0, 0].size)), jnp.float32)
    mask = np.random.default_rng(2).random((3, 9)) < 0.5
    logits = resumed(lm, captured, site, value, mask)
    full = forward(lm, text, edits=[Edit(site, put, (value.reshape(there.shape),), at(mask=mask))]).logits
    np.testing.assert_allclose(logits, full, atol=1e-4)
    assert np.abs(logits - clean.logits).max() > 0.1
    # With the activation itself put in, or with nothing masked in, nothing happens.
    itself = there.reshape(value.shape)
    expected = clean_predictions(clean.logits)
    for nothing in (resumed(lm, captured, site, itself, mask), resumed(lm, captured, site, value, np.zeros_like(mask))):
        spliced, unspliced = (splice_sums(expected, given, targets, mask) for given in (nothing, clean.logits))
        assert float(spliced.ce - unspliced.ce) / float(spliced.predictions) == pytest.approx(0, abs=1e-6)
        assert float(spliced.kl) / float(spliced.predictions) == pytest.approx(0, abs=1e-6)


# CE and KL


def test_ce_by_hand():
    # p = (1/4, 3/4) and (1/2, 1/2)
    logits = jnp.array([[[0.0, np.log(3.0)], [7.0, 7.0], [0.0, 0.0]]])
    clean = clean_predictions(jnp.zeros((1, 3, 2)))
    every = jnp.ones((1, 3), bool)
    sums = splice_sums(clean, logits, jnp.array([[0, 1, -1]]), every)
    assert int(sums.predictions) == 2
    assert float(sums.ce) == pytest.approx(np.log(4) + np.log(2))
    # KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log(3) / 2
    assert float(sums.kl) == pytest.approx(np.log(2) - np.log(3) / 2)
    alone = splice_sums(clean, logits, jnp.array([[1, 1, -1]]), every.at[0, 1].set(False))
    assert int(alone.predictions) == 1
    assert float(alone.ce) == pytest.approx(np.log(4 / 3))


@pytest.mark.parametrize("scale", [0.1, 5.0, 30.0])
def test_ce_and_kl_equal_numpy(scale):
    generator = np.random.default_rng(3)
    clean, other = (scale * generator.normal(size=(4, 6, 50)).astype(np.float32) for _ in range(2))
    targets = generator.integers(-1, 50, (4, 6)).astype(np.int32)
    counted = generator.random((4, 6)) < 0.7
    p, q = log_softmax(clean), log_softmax(other)
    kl = np.sum(np.exp(p) * (p - q), axis=-1)
    ce = -np.take_along_axis(q, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    where = counted & (targets >= 0)
    sums = splice_sums(clean_predictions(clean), other, targets, counted)
    assert int(sums.predictions) == where.sum()
    np.testing.assert_allclose(sums.ce, ce[where].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.kl, kl[where].sum(), rtol=1e-4)
    # One prediction at a time: not negative. Logits that differ by a constant are the same predictions.
    for value in (other, clean + np.float32(scale)):
        each = [
            float(splice_sums(clean_predictions(clean), value, targets, one).kl)
            for one in np.eye(24, dtype=bool).reshape(24, 4, 6)
        ]
        assert min(each) > -1e-6 * max(scale, 1)
    assert max(each) < 1e-5 * max(scale, 1)


def test_predictions_that_are_not_counted_may_be_anything():
    logits = jnp.array([[[1.0, 2.0], [jnp.nan, jnp.inf]]])
    sums = splice_sums(clean_predictions(logits), logits, jnp.array([[1, 0]]), jnp.array([[True, False]]))
    assert np.isfinite(sums.ce)
    assert float(sums.kl) == pytest.approx(0, abs=1e-6)


def test_ce_recovered_by_hand():
    assert ce_recovered(2.0, 2.0, 10.0) == 1
    assert ce_recovered(2.0, 10.0, 10.0) == 0
    assert ce_recovered(2.0, 4.0, 10.0) == pytest.approx(0.75)
    assert ce_recovered(2.0, 12.0, 10.0) == pytest.approx(-0.25)
