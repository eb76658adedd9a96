"""The whole evaluation against a slow one in NumPy that runs the model in full for every figure."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Neurons, Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, Site, add, at, forward, put
from sparse_jax.metrics import EvalBatch, Setting, evaluate, evaluate_each
from sparse_jax.metrics.evaluate import UNMASKED_EVERY, _add
from sparse_jax.metrics.token_mean import token_mean
from sparse_jax.training import reconstructor

ROWS, CONTEXT, D, VOCAB = 4, 10, 16, 40


def batch(seed, empty=0):
    """Four rows, the last few of them empty; first positions and every token 0 are masked."""
    generator = np.random.default_rng(seed)
    stream = generator.integers(0, VOCAB, (ROWS, CONTEXT + 1))
    tokens, targets = stream[:, :-1].copy(), stream[:, 1:].copy()
    tokens[ROWS - empty :], targets[ROWS - empty :] = 0, -1
    mask = (tokens > 3) & (np.arange(CONTEXT) > 0) & (targets >= 0)
    return EvalBatch(*(jnp.array(v) for v in (tokens.astype(np.int32), targets.astype(np.int32), mask)))


@pytest.fixture(scope="module")
def batches():
    """Five, of which the first and the last, with an empty row, give the figures without the mask."""
    return [*(batch(seed) for seed in range(1, 5)), batch(5, empty=1)]


@pytest.fixture(scope="module")
def mean():
    return np.random.default_rng(3).normal(size=D)


@pytest.fixture(scope="module")
def dictionaries(mean):
    """The dictionary and two floors that know nothing of each other."""
    generator = np.random.default_rng(4)
    dictionary = L1(n_features=24).sized(D)
    params = dictionary.init(jax.random.key(0))
    # Three features that never fire.
    params["b_enc"] = jnp.array(np.where(np.arange(24) < 3, -1e4, -0.3), jnp.float32)
    trained = Normalised(dictionary, params, Normaliser(jnp.array(mean, jnp.float32), jnp.float32(1.4)))
    neurons = Neurons(k=5, n_features=D).sized(D)
    fitted, identity = neurons.fit(jnp.array(mean, jnp.float32)), Normaliser(jnp.zeros(D), jnp.ones(()))
    means = jnp.array(generator.normal(size=(VOCAB, D)), jnp.float32)
    return {
        "dictionary": reconstructor(trained),
        "neurons": reconstructor(Normalised(neurons, fitted, identity)),
        "perfect": reconstructor(Normalised(dataclasses.replace(neurons, k=D), fitted, identity)),
        "token_mean": token_mean(means),
    }


def below(tokens):
    """Edits below the site, in its own layer and in the one before."""
    changed = jnp.cos(tokens.astype(jnp.float32)[..., None] + jnp.arange(16.0))
    return (
        Edit(Site("mlp_out", 0), put, (changed,)),
        Edit(Site("resid_pre", 1), add, (jnp.linspace(-1.0, 1.0, 16), jnp.float32(3))),
        Edit(Site("attn_z", 1), add, (jnp.ones((4, 4)), jnp.float32(1.5))),
    )


# The slow way


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


class Slow:
    """One variant: every counted activation and prediction, kept."""

    def __init__(self):
        self.x, self.x_hat, self.codes, self.ce, self.kl, self.clean = [], [], [], [], [], []

    def figures(self, mean, lengths, ce_zero, ce_mean):
        x, x_hat, codes = (np.concatenate(part) for part in (self.x, self.x_hat, self.codes))
        ce, kl, clean = (np.concatenate(part).mean() for part in (self.ce, self.kl, self.clean))
        fvu = np.sum((x - x_hat) ** 2) / np.sum((x - x.mean(0)) ** 2)
        shares = np.mean(codes != 0, axis=0)
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": np.mean(np.sum(codes != 0, axis=1)),
            "l1": np.mean(np.sum(np.abs(codes) * lengths, axis=1)),
            "ce_clean": clean,
            "ce_spliced": ce,
            "ce_zero": ce_zero,
            "ce_mean": ce_mean,
            "ce_increase": ce - clean,
            "ce_recovered": (ce_zero - ce) / (ce_zero - clean),
            "ce_recovered_mean": (ce_mean - ce) / (ce_mean - clean),
            "kl": kl,
            "perplexity_clean": np.exp(clean),
            "perplexity_spliced": np.exp(ce),
            "perplexity_increase": np.exp(ce) - np.exp(clean),
            "shrinkage": np.sum((x_hat - mean) ** 2) / np.sum((x_hat - mean) * (x - mean)),
            "tokens_evaluated": len(x),
            "dead_fraction": np.mean(shares == 0),
            "rare_fraction": np.mean(shares < 1e-5),
            "dense_fraction": np.mean(shares > 0.1),
        }


def slowly(lm, setting, batches, reconstructors, mean, outlier_norm):
    site, unmasked = setting.site, Slow()
    kept = {name: Slow() for name in ("zero", "mean", "zero unmasked", "mean unmasked", *reconstructors)}
    kept["dictionary unmasked"], lengths = unmasked, {}
    spreads, counts = (
        {"dropped": 0.0, "all": 0.0},
        dict.fromkeys(("tokens", "dropped", "by norm", "out", "out kept"), 0),
    )
    for number, (tokens, targets, mask) in enumerate(batches):
        edits = tuple(setting.edits_for(tokens)) if setting.edits_for else ()
        out = forward(lm, tokens, capture=[site], edits=edits)
        there = out.captured[str(site)]
        x = there.reshape(-1, D)
        real = np.asarray(targets) >= 0
        norms = np.linalg.norm(x, axis=-1).reshape(real.shape)
        counted = real & np.asarray(mask) & ~((norms > outlier_norm) & setting.drop_outliers)
        p = log_softmax(out.logits)
        values = {"zero": (np.zeros(x.shape), None), "mean": (np.tile(mean, (len(x), 1)), None)}
        for name, rebuild in reconstructors.items():
            codes = rebuild.encode(rebuild.params, x, tokens.reshape(-1))
            x_hat, lengths[name] = rebuild.decode(rebuild.params, codes, x, tokens.reshape(-1))
            values[name] = (np.asarray(x_hat), np.asarray(codes, np.float64))
        lengths["dictionary unmasked"] = lengths["dictionary"]
        for name, variant in kept.items():
            if name.endswith("unmasked") and number % UNMASKED_EVERY:
                continue
            value, codes = values[name.removesuffix(" unmasked")]
            where = real if name.endswith("unmasked") else counted
            new = jnp.array(value, jnp.float32).reshape(there.shape)
            splice = Edit(site, put, (new,), at(mask=where))
            q = log_softmax(forward(lm, tokens, edits=(*edits, splice)).logits)
            index = np.maximum(targets, 0)[..., None]
            variant.ce.append(-np.take_along_axis(q, index, axis=-1)[..., 0][where])
            variant.clean.append(-np.take_along_axis(p, index, axis=-1)[..., 0][where])
            variant.kl.append(np.sum(np.exp(p) * (p - q), axis=-1)[where])
            variant.x.append(np.asarray(x, np.float64)[where.reshape(-1)])
            variant.x_hat.append(np.asarray(value, np.float64)[where.reshape(-1)])
            if codes is not None:
                variant.codes.append(codes[where.reshape(-1)])
        spread = np.sum((np.asarray(x, np.float64) - mean) ** 2, axis=1).reshape(real.shape)
        spreads["dropped"] += spread[real & ~counted].sum()
        spreads["all"] += spread[real].sum()
        outlier = real & (norms > outlier_norm)
        for name, where in (
            ("tokens", real),
            ("dropped", real & ~counted),
            ("by norm", real & np.asarray(mask) & ~counted),
            ("out", outlier),
            ("out kept", outlier & counted),
        ):
            counts[name] += int(where.sum())
    ce = {name: np.concatenate(kept[name].ce).mean() for name in kept}
    figures = {
        name: kept[name].figures(mean, np.asarray(lengths[name], np.float64), ce["zero"], ce["mean"])
        for name in reconstructors
    }
    all_figures = unmasked.figures(
        mean, np.asarray(lengths["dictionary"], np.float64), ce["zero unmasked"], ce["mean unmasked"]
    )
    dropped = {
        "tokens": counts["tokens"],
        "dropped": counts["dropped"],
        "dropped_by_norm": counts["by norm"],
        "dropped_share_of_variance": spreads["dropped"] / spreads["all"],
        "outliers": counts["out"],
        "outliers_kept": counts["out kept"],
        "outlier_norm": outlier_norm,
    }
    fired = np.count_nonzero(np.concatenate(kept["dictionary"].codes), axis=0)
    return figures, all_figures, dropped, fired


def assert_close(figures, expected):
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        # A difference of perplexities is as exact as they are.
        unit = expected["perplexity_clean"] if name == "perplexity_increase" else 1
        np.testing.assert_allclose(figures[name], value, rtol=2e-4, atol=1e-5 * unit, err_msg=name)


@pytest.mark.parametrize(
    ("site", "drop", "edits_for"),
    [
        ("resid_post.1", False, below),
        ("mlp_out.1", True, below),
        ("attn_z.1", False, None),
    ],
)
def test_equals_the_slow_way(lm, batches, mean, dictionaries, site, drop, edits_for):
    setting = Setting(Site.parse(site), drop, edits_for)
    x = forward(lm, batches[0].tokens, capture=[site]).captured[site].reshape(-1, D)
    limit = float(np.quantile(np.linalg.norm(x, axis=1), 0.7))
    found = evaluate(lm, setting, batches, dictionaries, mean=mean, outlier_norm=limit)
    figures, unmasked, dropped, fired = slowly(lm, setting, batches, dictionaries, mean, limit)
    assert_close(found.figures, figures.pop("dictionary"))
    assert found.floors.keys() == figures.keys()
    for name, floor in figures.items():
        assert_close(found.floors[name], floor)
    assert_close(found.unmasked, unmasked)
    assert_close(found.mask, dropped)
    np.testing.assert_array_equal(found.fired, fired)
    assert found.fired.dtype == np.int64
    assert not found.fired[:3].any()
    # The comparison is worth something: the mask, the floors and the ablations all differ.
    assert found.unmasked["tokens_evaluated"] == 7 * CONTEXT
    assert found.figures["tokens_evaluated"] < found.mask["tokens"] == 19 * CONTEXT
    assert found.floors["token_mean"]["l0"] == 1
    assert found.floors["neurons"]["l0"] == pytest.approx(5)
    assert abs(found.figures["ce_zero"] - found.figures["ce_mean"]) > 1e-3
    assert (found.mask["outliers_kept"] == 0) == drop
    for floor in found.floors.values():
        for name in ("ce_clean", "ce_zero", "ce_mean", "tokens_evaluated", "perplexity_clean"):
            assert floor[name] == found.figures[name]


def test_empty_rows_and_the_cut_into_batches_change_nothing(lm, mean, dictionaries):
    setting, full = Setting(Site("resid_post", 0)), [batch(1), batch(2)]
    empty = batch(9, empty=ROWS)

    def rows(order, *, of=(*full, empty)):
        together = [jnp.concatenate(parts) for parts in zip(*of)]
        return EvalBatch(*(part[jnp.array(order)] for part in together))

    # Eight rows in two batches; or in three, scattered among empty rows 8 to 11, and an empty batch.
    scattered = [rows([0, 8, 1, 2]), rows([9, 3, 4, 10]), rows([7, 6, 5, 11]), empty]
    one, other = (
        evaluate(lm, setting, given, dictionaries, mean=mean, outlier_norm=5.0) for given in (full, scattered)
    )
    assert_close(other.figures, one.figures)
    for name, value in (("fvu", 0), ("ce_increase", 0), ("kl", 0), ("ce_recovered", 1), ("shrinkage", 1)):
        assert one.floors["perfect"][name] == pytest.approx(value, abs=1e-5), name
    assert one.mask["tokens"] == other.mask["tokens"] == 8 * CONTEXT
    np.testing.assert_array_equal(one.fired, other.fired)


def test_in_parts_many_are_measured_as_each_alone(lm, batches, mean, dictionaries):
    """Three at once, of four; two of them without the mask too, one in each part; a name may be an ablation's."""
    setting = Setting(Site("resid_post", 1), drop_outliers=True)
    names = {"dictionary": "zero", "neurons": "neurons", "perfect": "perfect", "token_mean": "token_mean"}
    several = {names[name]: dictionaries[name] for name in names}
    x = forward(lm, batches[0].tokens, capture=["resid_post.1"]).captured["resid_post.1"].reshape(-1, D)
    fixed = {"mean": mean, "outlier_norm": float(np.quantile(np.linalg.norm(x, axis=1), 0.7))}
    found = evaluate_each(lm, setting, batches, several, unmasked=("zero", "token_mean"), at_once=3, **fixed)
    alone = evaluate(lm, setting, batches, dictionaries, **fixed)
    assert list(found.figures) == list(several)
    assert_close(found.figures["zero"], alone.figures)
    for name, floor in alone.floors.items():
        assert_close(found.figures[name], floor)
    assert list(found.unmasked) == ["zero", "token_mean"]
    assert_close(found.unmasked["zero"], alone.unmasked)
    assert found.unmasked["token_mean"]["ce_clean"] == found.unmasked["zero"]["ce_clean"]
    assert found.unmasked["token_mean"]["fvu"] != found.figures["token_mean"]["fvu"]
    assert found.mask == alone.mask
    np.testing.assert_array_equal(found.fired["zero"], alone.fired)
    with pytest.raises(InputError, match="at least one"):
        evaluate_each(lm, setting, batches, {}, **fixed)


def test_host_sums_are_wide():
    total = _add(None, {"fired": jnp.array([2**31 - 1], jnp.int32), "ce": jnp.float32(2**24)})
    total = _add(total, {"fired": jnp.array([5], jnp.int32), "ce": jnp.float32(1)})
    assert (total["fired"].dtype, total["ce"].dtype) == (np.int64, np.float64)
    assert int(total["fired"][0]) == 2**31 + 4
    assert float(total["ce"]) == 2**24 + 1


def test_nothing_to_evaluate(lm, mean, dictionaries):
    for given in ([], [batch(1, empty=ROWS)]):
        with pytest.raises(InputError, match="no evaluation token counts"):
            evaluate(lm, Setting(Site("resid_post", 0)), given, dictionaries, mean=mean, outlier_norm=5.0)


def test_activations_that_are_not_finite(lm, batches, mean, dictionaries):
    only_in_second = np.setdiff1d(batches[1].tokens, batches[0].tokens)[0]
    embedding = lm.params["embed"]["tokens"].at[only_in_second].set(jnp.nan)
    poisoned = dataclasses.replace(lm, params={**lm.params, "embed": {"tokens": embedding}})
    with pytest.raises(InputError, match=r"resid_post\.0 is not finite in evaluation batch 1"):
        evaluate(poisoned, Setting(Site("resid_post", 0)), batches, dictionaries, mean=mean, outlier_norm=5.0)
