"""Ablation effects: one whole pass of the model for each feature and row, and answers known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.ablation import _changed, ablation_effects, mean_logit_change
from sparse_jax.features.logit_effect import most_raised_and_lowered
from sparse_jax.lm import Edit, Site, forward, put, site_width
from tests.features.tiny_models import CONFIGS, CONTEXT, LAYERS, VOCAB, WIDTH, coder, text, tiny

FAMILIES = tuple(CONFIGS)
ROWS, N = 5, 10
EDGES = (-0.2, -0.05, 0.0, 0.05, 0.2)


def brute_force(lm, trained, site, tokens, targets, mask, feature):
    """By whole passes from the tokens: (log p, target's logit, all logits) as they are and ablated, and where it
    fires."""
    site = Site.parse(site)
    clean = forward(lm, tokens, capture=[site])
    value = clean.captured[str(site)]
    x = value.reshape(*tokens.shape, -1)
    codes = np.asarray(trained.encode(x.reshape(-1, x.shape[-1]))).reshape(*tokens.shape, -1)[..., feature]
    fires = (codes > 0) & mask
    removed = np.where(fires, codes, 0)[..., None] * np.asarray(trained.directions()[feature])
    ablated = forward(lm, tokens, edits=[Edit(site, put, ((x - removed).reshape(value.shape),))])
    found = []
    for logits in (clean.logits, ablated.logits):
        logits = np.asarray(logits, np.float64)
        target = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
        found.append((target - np.log(np.exp(logits).sum(-1)), target, logits))
    return found[0], found[1], fires


def check(lm, site, trained, *, tolerance=1e-11, **options):
    """Every figure against brute force, for all features."""
    tokens, targets, mask = text(ROWS)
    effects = ablation_effects(
        lm, trained, site, tokens, targets, mask, edges=EDGES, keep_changes=True, block_rows=2, **options
    )
    scored_places = mask & (targets >= 0)
    assert effects.predictions == scored_places.sum() < mask.sum()
    logits = mean_logit_change(lm, effects)
    kept = {(f, r): row for f, r, row in zip(*effects.changes)}
    assert len(kept) == len(effects.changes.rows)
    for feature in range(trained.dictionary.n_features):
        clean, ablated, fires = brute_force(lm, trained, site, tokens, targets, mask, feature)
        scored = fires & (targets >= 0)
        change = np.where(targets >= 0, ablated[0] - clean[0], 0)
        assert {row for f, row in kept if f == feature} == set(np.flatnonzero(fires.any(axis=1)))
        for row in range(ROWS):
            np.testing.assert_allclose(kept.get((feature, row), np.zeros(CONTEXT)), change[row], atol=tolerance)
        assert effects.firings[feature] == fires.sum()
        assert effects.scored[feature] == scored.sum()
        ce = -change[scored_places].sum() / scored_places.sum()
        np.testing.assert_allclose(effects.ce_change[feature], ce, atol=tolerance)
        drop = (clean[1] - ablated[1])[scored]
        by_hand = [np.sum((drop >= low) & (drop < high)) for low, high in zip((-9e9, *EDGES), (*EDGES, 9e9))]
        np.testing.assert_array_equal(effects.drops[feature], by_hand)
        if scored.any():
            np.testing.assert_allclose(effects.log_p_change[feature], change[scored].mean(), atol=tolerance)
            moved = (ablated[2] - clean[2])[scored].mean(axis=0)
            np.testing.assert_allclose(logits[feature], moved, atol=max(tolerance, 1e-6))
    assert 0.03 < effects.firings.sum() / mask.sum() / N < 0.7, "neither silent nor everywhere"
    return effects


@pytest.mark.parametrize(
    ("family", "site"), [*((family, "resid_post.0") for family in FAMILIES), ("llama", f"resid_post.{LAYERS - 1}")]
)
def test_brute_force_in_every_family(family, site, x64):
    lm = tiny(family, "float64")
    effects = check(lm, site, coder(WIDTH, N, 1, "float64"))
    # Later places change too, but only where attention lies above the site.
    changes = effects.changes
    fires = np.stack([places(lm, coder(WIDTH, N, 1, "float64"), site, f)[r] for f, r, _ in zip(*changes)])
    later = np.abs(np.where(fires, 0, changes.log_p))
    assert (later.max() > 1e-3) == (site == "resid_post.0")


def places(lm, trained, site, feature):
    tokens, targets, mask = text(ROWS)
    return brute_force(lm, trained, site, tokens, targets, mask, feature)[2]


@pytest.mark.parametrize(
    ("family", "site"),
    [("llama", "resid_pre.1"), ("gpt2", "attn_q.2"), ("llama", "attn_k.2"), ("gpt_neox", "mlp_hidden.2")],
)
def test_brute_force_at_every_kind_of_site(family, site, x64):
    lm = tiny(family, "float64")
    check(lm, site, coder(site_width(lm.config, site), N, 2, "float64", 0.3))


@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_batches_change_nothing(batch_tokens, x64):
    check(tiny("sequential", "float64"), "resid_mid.1", coder(WIDTH, N, 1, "float64"), batch_tokens=batch_tokens)


def test_float32():
    check(tiny("gpt2"), "resid_post.1", coder(WIDTH, N, 1), tolerance=2e-5)


def test_some_features_in_any_order(x64):
    lm, trained = tiny("gpt2", "float64"), coder(WIDTH, N, 1, "float64")
    whole = ablation_effects(lm, trained, "resid_post.1", *text(ROWS))
    some = ablation_effects(lm, trained, "resid_post.1", *text(ROWS), [7, 2])
    for name in ("firings", "ce_change", "log_p_change", "logsumexp_change", "normed_change", "drops"):
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name)[[7, 2]], atol=1e-12)
    np.testing.assert_allclose(
        mean_logit_change(lm, some, log_p=True),
        mean_logit_change(lm, some) - some.logsumexp_change[:, None],
        atol=1e-6,
    )


def test_silent_and_masked_features_do_exactly_nothing():
    lm, trained = tiny("gpt_neox"), coder(WIDTH, N, 1)
    tokens, targets, mask = text(ROWS)
    effects = ablation_effects(lm, trained, "resid_post.0", tokens, targets, mask, keep_changes=True)
    silent = N - 1  # never fires
    assert effects.firings[silent] == 0
    assert silent not in effects.changes.features
    for figures in (effects.ce_change, effects.log_p_change, effects.normed_change, effects.drops):
        assert not figures[silent].any()
    # Exactly 0 before the first firing, masked-in or not.
    for feature, row, change in zip(*effects.changes):
        first = places(lm, trained, "resid_post.0", feature)[row].argmax()
        assert not change[:first].any()
        assert change[first] != 0
    # A mask that drops a feature's places leaves it without an effect.
    busiest = int(effects.firings.argmax())
    fires = places(lm, trained, "resid_post.0", busiest)
    masked = ablation_effects(lm, trained, "resid_post.0", tokens, targets, mask & ~fires, keep_changes=True)
    assert masked.firings[busiest] == 0
    assert masked.ce_change[busiest] == 0
    assert busiest not in masked.changes.features
    # So does a largest norm that no activation stays under: nothing counts then.
    with pytest.raises(InputError, match="no prediction counts"):
        ablation_effects(lm, trained, "resid_post.0", tokens, targets, mask, max_norm=1e-3)


def test_the_norm_limit_masks_single_places(x64):
    lm, trained = tiny("gpt2", "float64"), coder(WIDTH, N, 1, "float64")
    tokens, targets, mask = text(ROWS)
    x = forward(lm, tokens, capture=["resid_post.0"]).captured["resid_post.0"]
    norms = np.linalg.norm(np.asarray(x), axis=-1)
    limit = float(np.median(norms))
    limited = ablation_effects(lm, trained, "resid_post.0", tokens, targets, mask, max_norm=limit)
    by_mask = ablation_effects(lm, trained, "resid_post.0", tokens, targets, mask & (norms <= limit))
    np.testing.assert_allclose(limited.ce_change, by_mask.ce_change, atol=1e-12)
    assert limited.predictions == by_mask.predictions < (mask & (targets >= 0)).sum()


def test_a_direction_along_an_unembedding_row_lowers_its_token_most():
    """At the last layer, where nothing else stands between."""
    lm = tiny("llama")
    table = np.asarray(lm.params["embed"]["tokens"] * lm.params["head"]["norm"]["scale"])
    rows = table / np.linalg.norm(table, axis=1, keepdims=True)
    trained = coder(WIDTH, VOCAB, 0, sparse=0.2)
    trained = dataclasses.replace(trained, params=trained.params | {"W_dec": 0.01 * jnp.array(rows)})
    effects = ablation_effects(lm, trained, f"resid_post.{LAYERS - 1}", *text(ROWS))
    change = mean_logit_change(lm, effects)
    # The denominator hardly moves for so short a direction: what is left is the product with each token's row.
    lowered = most_raised_and_lowered(change, 1).lowered[:, 0]
    expected = (rows @ table.T).argmax(axis=1)
    there = effects.scored > 3
    assert there.sum() > 10
    assert np.mean(lowered[there] == expected[there]) > 0.8


def test_compiled_once_for_all_features_and_rows():
    lm, trained = tiny("gpt2"), coder(WIDTH, N, 1)
    tokens, targets, mask = text(6)
    ablation_effects(lm, trained, "resid_post.2", tokens, targets, mask, [1, 2, 3], block_rows=3)
    before = _changed._cache_size()
    other = coder(WIDTH, N, 5)
    ablation_effects(lm, other, "resid_post.2", tokens[::-1], targets[::-1], mask[::-1], [4, 0, 7], block_rows=3)
    assert _changed._cache_size() == before


def test_errors():
    lm, trained = tiny("gpt2"), coder(WIDTH, N, 1)
    tokens, targets, mask = text(2)
    with pytest.raises(InputError, match="takes 8 numbers"):
        ablation_effects(lm, trained, "mlp_hidden.0", tokens, targets, mask)
    with pytest.raises(InputError, match="features"):
        ablation_effects(lm, trained, "resid_post.0", tokens, targets, mask, [N])
    with pytest.raises(InputError, match="edges"):
        ablation_effects(lm, trained, "resid_post.0", tokens, targets, mask, edges=(1.0, 1.0))
    with pytest.raises(InputError, match="three arrays"):
        ablation_effects(lm, trained, "resid_post.0", tokens, targets[:1], mask)
    with pytest.raises(InputError, match="no prediction counts"):
        ablation_effects(lm, trained, "resid_post.0", tokens, targets, np.zeros_like(mask))
    assert jax.tree.leaves(trained)
