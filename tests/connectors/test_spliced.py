"""Replacing a site by predictions: plain loops over whole passes with an edit, and the figures of `evaluate`."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors.spliced import _batch_losses, connected, rebuilt, spliced_figures, spliced_losses
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, at, forward, put
from sparse_jax.lm.sites import Site
from sparse_jax.metrics.evaluate import EvalBatch, Reconstructor, Setting, evaluate_each
from tests.connectors.tiny_pairs import located, rows_of
from tests.features.tiny_models import WIDTH, tiny

N_IN, N_OUT = 7, 6


@partial(jax.tree_util.register_dataclass, data_fields=["W"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Affine:
    """Predicts c W - 0.2: what a connector is here."""

    W: jax.Array

    def predict(self, x):
        return x @ self.W - 0.2


def affine(n_in, n_out, seed=0):
    return Affine(jnp.array(0.5 * np.random.default_rng(seed).normal(size=(n_in, n_out)), jnp.float32))


def batches(rows, size=4):
    """All rows; the last batch is filled up with empty ones."""
    numbers = np.arange(-(-rows.n_rows // size) * size)
    numbers[rows.n_rows :] = -1
    return [rows[part] for part in numbers.reshape(-1, size)]


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


CASES = [
    ("gpt_neox", ["resid_pre.1"], "mlp_out.1"),
    ("gpt2", ["resid_pre.1", "attn_out.1", "mlp_out.1"], "resid_post.1"),
]


@pytest.mark.parametrize(("family", "sites", "site"), CASES)
def test_equals_plain_loops(family, sites, site):
    lm, rows = tiny(family), rows_of(7)
    inputs, target = [located(lm, name, N_IN, k) for k, name in enumerate(sites)], located(lm, site, N_OUT, 9)
    connector = affine(N_IN * len(sites), N_OUT)
    raw = affine(WIDTH * len(sites), WIDTH, 3)
    coders = [place.coder for place in inputs]
    replacements = {
        "dictionary": rebuilt(target.coder),
        "linear": connected(connector, coders, target.coder),
        "positive": connected(connector, coders, target.coder, non_negative=True),
        "raw": connected(raw, [None] * len(sites), None),
    }
    everything = rows[np.arange(rows.n_rows)]
    clean = forward(lm, everything.tokens, capture=[*sites, site])
    x = np.asarray(clean.captured[site])
    mean, limit = x.mean(axis=(0, 1)) + 0.1, float(np.quantile(np.linalg.norm(x, axis=-1), 0.8))
    found = spliced_losses(lm, sites, site, batches(rows), replacements, mean=mean, max_norms={site: limit})

    where = everything.mask & (np.linalg.norm(x, axis=-1) <= limit)
    assert 0 < where.sum() < everything.mask.sum()
    given = [np.asarray(clean.captured[name]) for name in sites]
    codes = [np.asarray(place.coder.encode(a.reshape(-1, WIDTH))) for place, a in zip(inputs, given)]
    predicted = np.concatenate(codes, axis=1) @ np.asarray(connector.W) - 0.2
    assert predicted.min() < -0.1
    by_hand = {
        "clean": x,
        "zero": np.zeros_like(x),
        "mean": np.broadcast_to(mean, x.shape),
        "dictionary": target.coder.reconstruct(x.reshape(-1, WIDTH)),
        "linear": target.coder.decode(jnp.array(predicted)),
        "positive": target.coder.decode(jnp.array(np.maximum(predicted, 0))),
        "raw": np.concatenate(given, axis=-1).reshape(-1, WIDTH * len(sites)) @ np.asarray(raw.W) - 0.2,
    }
    log_p = log_softmax(clean.logits)
    assert set(found.ce) == set(by_hand)
    for name, value in by_hand.items():
        value = jnp.array(np.asarray(value).reshape(x.shape))
        log_q = log_softmax(forward(lm, everything.tokens, edits=[Edit(site, put, (value,), at(mask=where))]).logits)
        ce = -np.take_along_axis(log_q, np.maximum(everything.targets, 0)[..., None], axis=-1)[..., 0]
        kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
        for n, document in enumerate(found.document):
            here = where & (everything.document == document)
            assert found.predictions[n] == here.sum()
            np.testing.assert_allclose(found.ce[name][n], ce[here].sum(), rtol=1e-4)
            np.testing.assert_allclose(found.kl[name][n], kl[here].sum(), rtol=1e-3, atol=1e-5)
        if name != "clean":
            error = np.sum((np.asarray(value) - x)[where].astype(np.float64) ** 2)
            np.testing.assert_allclose(found.error[name], error, rtol=1e-4)
            assert np.sum(found.kl[name]) > 0.1
    assert found.predictions.sum() == where.sum()
    np.testing.assert_allclose(found.spread, found.error["mean"], rtol=1e-5)

    figures = spliced_figures(found, resamples=200)
    ce = {name: values.sum() / where.sum() for name, values in found.ce.items()}
    for name, of in figures.items():
        assert of.ce_increase.value == pytest.approx(ce[name] - ce["clean"])
        assert of.kl.value == pytest.approx(found.kl[name].sum() / where.sum())
        assert of.ce_recovered.value == pytest.approx((ce["zero"] - ce[name]) / (ce["zero"] - ce["clean"]))
        assert of.fvu == pytest.approx(found.error[name] / found.spread)
        assert of.kl.low < of.kl.value < of.kl.high
    assert figures["zero"].ce_recovered.value == 0
    assert figures["mean"].ce_recovered_mean.value == 0


def test_figures_are_those_of_evaluate():
    lm, rows = tiny("gpt_neox"), rows_of(8)
    target = located(lm, "mlp_out.1", N_OUT, 9)
    mean = np.linspace(-1, 1, WIDTH)
    found = spliced_losses(
        lm, ["resid_pre.1"], "mlp_out.1", batches(rows), {"dictionary": rebuilt(target.coder)}, mean=mean
    )
    figures = spliced_figures(found)
    rebuild = Reconstructor(_encode, _decode, target.coder)
    measured = evaluate_each(
        lm,
        Setting(Site("mlp_out", 1)),
        [EvalBatch(*map(jnp.array, batch[:3])) for batch in batches(rows)],
        {"dictionary": rebuild},
        mean=mean,
        outlier_norm=1e9,
    ).figures["dictionary"]
    assert int(found.predictions.sum()) == measured["tokens_evaluated"]
    for name in ("ce_increase", "kl", "ce_recovered", "ce_recovered_mean"):
        assert getattr(figures["dictionary"], name).value == pytest.approx(measured[name], abs=1e-5)
    assert figures["mean"].ce_increase.value == pytest.approx(measured["ce_mean"] - measured["ce_clean"], abs=1e-5)


def _encode(coder: Normalised, x, tokens):
    return coder.encode(x)


def _decode(coder, codes, x, tokens):
    return coder.decode(codes, x), jnp.ones(codes.shape[1])


def test_compiled_once():
    lm, rows = tiny("gpt_neox"), rows_of(7)
    inputs, target = located(lm, "resid_pre.1", N_IN, 0), located(lm, "mlp_out.1", N_OUT, 9)

    def run(seed):
        made = {"linear": connected(affine(N_IN, N_OUT, seed), [inputs.coder], target.coder)}
        return spliced_losses(lm, ["resid_pre.1"], "mlp_out.1", batches(rows), made, mean=np.zeros(WIDTH))

    run(0)
    before = _batch_losses._cache_size()
    run(1)
    assert _batch_losses._cache_size() == before


def test_errors():
    lm, rows = tiny("gpt_neox"), rows_of(7)
    target = located(lm, "mlp_out.1", N_OUT, 9)

    def run(sites=("resid_pre.1",), site="mlp_out.1", text=None, name="a", width=WIDTH, **options):
        text, mean = batches(rows) if text is None else text, np.zeros(width)
        return spliced_losses(lm, sites, site, text, {name: rebuilt(target.coder)}, mean=mean, **options)

    with pytest.raises(InputError, match="does not come before"):
        run(["resid_post.1"])
    with pytest.raises(InputError, match="has these names"):
        run(name="zero")
    with pytest.raises(InputError, match="a mean of shape"):
        run(width=3)
    with pytest.raises(InputError, match="norms of attn_out"):
        run(max_norms={"attn_out.1": 3.0})
    with pytest.raises(InputError, match="no prediction counts"):
        run(text=[])
    with pytest.raises(InputError, match="no prediction counts"):
        run(text=[rows[np.full(4, -1)]])
    broken = jax.tree.map(lambda leaf: leaf, lm.params)
    broken["blocks"]["mlp"]["down"]["bias"] = broken["blocks"]["mlp"]["down"]["bias"].at[1].set(jnp.nan)
    with pytest.raises(InputError, match="not finite"):
        spliced_losses(
            dataclasses.replace(lm, params=broken), ["resid_pre.1"], "mlp_out.1", batches(rows),
            {"a": rebuilt(target.coder)}, mean=np.zeros(WIDTH),
        )  # fmt: skip
