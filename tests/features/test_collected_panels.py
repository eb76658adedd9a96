"""Panels of what was collected, against plain counting on a text in which features are planted."""

import dataclasses

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.features.collect import collect
from sparse_jax.features.collected_panels import choose_places, collected_panels, histogram_of
from sparse_jax.features.firings import firings
from sparse_jax.lm.row_cuts import Cuts
from tests.features.planted import CONTEXT, N_FEATURES, SITE, TOKEN, planted


@pytest.fixture(scope="module")
def collected():
    p = planted()
    return collect(p.lm, SITE, p.rows, np.arange(len(p.rows)), p.coder, sample=64, top=10)


@pytest.fixture(scope="module")
def values():
    """`[rows, position, features]` codes where they count."""
    p = planted()
    made = np.zeros((len(p.rows) * CONTEXT, N_FEATURES), np.float32)
    for found in firings(p.lm, SITE, p.rows, np.arange(len(p.rows)), p.coder):
        row = found.rows[found.places // CONTEXT]
        made[row * CONTEXT + found.places % CONTEXT, found.features] = found.values
    return made.reshape(-1, CONTEXT, N_FEATURES)


@pytest.fixture(scope="module")
def panels(collected):
    p = planted()
    return list(collected_panels(collected, p.lm, SITE, p.rows, p.coder, p.tokenizer.token_strings))


def test_each_feature_has_its_panel(panels, values):
    p = planted()
    tokens, _, mask, documents = p.rows[np.arange(len(p.rows))]
    assert [panel.index for panel in panels] == list(range(N_FEATURES))
    for panel in panels:
        of_it = values[..., panel.index]
        assert panel.density == pytest.approx((of_it > 0).sum() / mask.sum())
        assert panel.maximum == pytest.approx(of_it.max(), rel=1e-5)
        if not panel.density:
            assert (panel.mean, panel.histogram, panel.contexts, panel.top_tokens) == (None, None, (), ())
            continue
        assert panel.mean == pytest.approx(of_it[of_it > 0].mean(), rel=1e-4)
        assert panel.variance == pytest.approx(of_it[mask].var(), rel=1e-3)
        # Texts: each is at a place of its own row, and shows what stands there.
        assert panel.contexts[0].context.activations[panel.contexts[0].context.peak] == pytest.approx(
            of_it.max(), rel=1e-4
        )
        for passage in panel.contexts:
            context = passage.context
            n = len(context.tokens)
            rows, positions = np.nonzero(np.abs(of_it - context.activations[context.peak]) < 1e-4)
            shown = [
                tuple(p.tokenizer.token_strings(tokens[r, max(0, i - 14) : i + 7])) == context.tokens
                and n == len(tokens[r, max(0, i - 14) : i + 7])
                and p.rows.documents[documents[r, i]] == context.source
                for r, i in zip(rows, positions)
            ]
            assert any(shown)


def test_the_token_feature_is_about_its_token(panels):
    panel = panels[TOKEN]
    assert panel.top_tokens[0][0] == " king"
    assert panel.histogram.tokens[0] == " king"
    assert all(passage.context.tokens[passage.context.peak] == " king" for passage in panel.contexts)


def test_histograms_count_all_firings(collected, panels, values):
    p = planted()
    tokens = p.rows[np.arange(len(p.rows))].tokens
    for panel in panels:
        if panel.histogram is None:
            continue
        of_it = values[..., panel.index]
        edges = np.array(panel.histogram.edges)
        assert edges[-1] >= of_it.max() * (1 - 1e-6)
        counts, rest = np.array(panel.histogram.counts), np.array(panel.histogram.rest)
        assert counts.sum() + rest.sum() == (of_it > 0).sum()
        for name, row in zip(panel.histogram.tokens, counts):
            on_token = of_it[(tokens == p.tokenizer.encode([name])[0][0]) & (of_it > 0)]
            assert row.sum() == len(on_token)
            bins = np.searchsorted(edges[1:-1].astype(np.float32), on_token)
            assert np.abs(row - np.bincount(bins, minlength=len(row))).sum() <= 2  # at an edge, by rounding


def test_places(collected, values):
    features = np.array([TOKEN, 3, 40])
    chosen = choose_places(collected, features, top=4, quantiles=4, per_quantile=2)
    assert len(chosen.labels) == len(chosen.rows) == chosen.starts[-1]
    for i, feature in enumerate(features):
        part = slice(chosen.starts[i], chosen.starts[i + 1])
        rows, positions, labels = chosen.rows[part], chosen.positions[part], chosen.labels[part]
        assert (chosen.features[part] == feature).all()
        assert len(set(rows)) == len(rows)
        found = values[rows, positions, feature]
        assert (found > 0).all()
        best = np.sort(values[..., feature].max(axis=1))[::-1][: labels.count("top")]
        np.testing.assert_allclose(found[: len(best)], best, rtol=1e-5)
        order = ["top", "firings 75–100 %", "firings 50–75 %", "firings 25–50 %", "firings 0–25 %"]
        assert labels == sorted(labels, key=order.index)
        assert max(labels.count(name) for name in order[1:]) <= 2
        means = [found[[label == name for label in labels]].mean() for name in order[1:] if name in labels]
        assert means == sorted(means, reverse=True)


def test_some_features_in_their_order(collected):
    p = planted()
    some = collected_panels(collected, p.lm, SITE, p.rows, p.coder, p.tokenizer.token_strings, [40, 3], tokens=2)
    panels = list(some)
    assert [panel.index for panel in panels] == [40, 3]
    assert all(len(panel.top_tokens) <= 2 for panel in panels)
    with pytest.raises(InputError):
        list(collected_panels(collected, p.lm, SITE, p.rows, p.coder, p.tokenizer.token_strings, [80]))


def test_changes_stand_beside_activations(collected, panels):
    p = planted()
    changes = np.random.default_rng(0).normal(size=(len(p.rows), CONTEXT))

    def changes_at(feature, row):
        return changes[row] + feature if row % 2 else None

    places = choose_places(collected, np.array([3]))
    strings = p.tokenizer.token_strings
    (panel,) = collected_panels(collected, p.lm, SITE, p.rows, p.coder, strings, [3], changes_at=changes_at)
    assert [passage.context for passage in panel.contexts] == [passage.context for passage in panels[3].contexts]
    assert {row % 2 for row in places.rows} == {0, 1}
    for passage, row, position in zip(panel.contexts, places.rows, places.positions):
        if row % 2:
            np.testing.assert_allclose(passage.effects, changes[row, max(0, position - 14) : position + 7] + 3)
        else:
            assert passage.effects == ()


def test_co_active_features_fire_together(panels, values):
    fires = values.reshape(-1, N_FEATURES) > 0
    for panel in panels:
        for partner in panel.coactive:
            both = (fires[:, panel.index] & fires[:, partner.feature]).sum()
            assert partner.count == both  # the sample is of all tokens of so short a text
            norms = fires[:, panel.index].sum() * fires[:, partner.feature].sum()
            assert partner.cosine == pytest.approx(both / np.sqrt(norms), rel=1e-5)


@pytest.mark.parametrize("edges", [[0.5], [0.0, 0.5, 0.5, 1.0], [1.0, 2.0], [50.0, 60.0], []])
def test_any_edges_give_a_histogram(edges):
    p = planted()
    edges = np.tile(np.array(edges, np.float32), (N_FEATURES, 1)).reshape(N_FEATURES, len(edges))
    collected = collect(p.lm, SITE, p.rows, np.arange(20), p.coder, edges=edges)
    for feature in range(N_FEATURES):
        found = histogram_of(collected, feature, p.tokenizer.token_strings)
        assert (found is None) == (collected.fired[feature] == 0)
        if found:
            assert np.sum(found.counts) + np.sum(found.rest) == collected.fired[feature]


def test_padding_is_no_text_and_masked_tokens_do_not_fire():
    """Rows that end early: what fills them up is not shown, and what stands at the dropped first place is 0."""
    p = planted()
    tokens, _, _, _ = p.rows[np.arange(len(p.rows))]
    lengths = np.full(len(p.rows), CONTEXT)
    lengths[1::2] = CONTEXT - 9
    cuts = Cuts(np.arange(len(p.rows)) * CONTEXT, lengths, np.zeros(len(p.rows), np.int64))
    short = dataclasses.replace(p.rows, cuts=cuts)
    numbers = np.arange(len(p.rows))
    found = collect(p.lm, SITE, short, numbers, p.coder, sample=64, top=10)
    rows = {tuple(p.tokenizer.token_strings(tokens[r, : lengths[r]])): r for r in numbers}
    fill = p.tokenizer.token_strings(np.array([short.fill_id]))[0]
    seen = 0
    for panel in collected_panels(found, p.lm, SITE, short, p.coder, p.tokenizer.token_strings, before=99, after=99):
        for passage in panel.contexts:
            context = passage.context
            row = rows[context.tokens]  # the whole row, and nothing behind it
            seen += lengths[row] < CONTEXT
            assert context.activations[0] == 0
            assert len(context.tokens) == lengths[row]
    assert seen
    assert fill is not None
