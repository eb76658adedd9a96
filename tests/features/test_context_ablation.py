"""What a feature needs: each variant of a context by its own pass of the model, and needs known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import Neurons, Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.context_ablation import (
    _code,
    context_needs,
    need_contexts,
    needs_html,
    sample_tokens,
    variants,
)
from sparse_jax.lm import forward
from tests.features.tiny_models import CONTEXT, VOCAB, WIDTH, coder, text, tiny

SITE = "resid_post.1"
POSITIONS = np.array([9, 4, 0, 11])


def activation(lm, trained, feature, row):
    """At the last token of a row, by a pass over that row alone."""
    x = forward(lm, np.array(row)[None], capture=[SITE]).captured[SITE][:, -1]
    return max(0.0, float(trained.encode(x)[0, feature]))


@pytest.mark.parametrize("replace_with", [None, 5, [3, 7, 11]])
def test_brute_force(replace_with):
    lm, trained, feature = tiny("gpt2"), coder(WIDTH, 6, 1, sparse=0.0), 2
    tokens = text(4)[0]
    needs = context_needs(lm, trained, SITE, feature, tokens, POSITIONS, replace_with=replace_with, start=1)
    assert needs.changes.shape == (4, CONTEXT)
    for row, place, clean, changes in zip(tokens, POSITIONS, *needs):
        as_it_is = activation(lm, trained, feature, row[: place + 1])
        assert clean == pytest.approx(as_it_is, abs=1e-5)
        tried = np.zeros(CONTEXT, bool)
        tried[1:place] = True
        np.testing.assert_array_equal(np.isnan(changes), ~tried)
        for j in range(1, place):
            before, behind = list(row[:j]), list(row[j + 1 : place + 1])
            if replace_with is None:
                without = activation(lm, trained, feature, before + behind)
            else:
                each = np.atleast_1d(replace_with)
                without = np.mean([activation(lm, trained, feature, [*before, token, *behind]) for token in each])
            assert changes[j] == pytest.approx(without - as_it_is, abs=1e-5)
    assert np.nanmax(np.abs(needs.changes)) > 0.05


def test_variants_by_hand():
    rows, places = variants(np.array([5, 6, 7, 8]), 0, None)
    np.testing.assert_array_equal(rows, [[5, 6, 7, 8], [6, 7, 8, 8], [5, 7, 8, 8], [5, 6, 8, 8]])
    np.testing.assert_array_equal(places, [3, 2, 2, 2])
    rows, places = variants(np.array([5, 6, 7]), 1, np.array([1, 2]))
    np.testing.assert_array_equal(rows, [[5, 6, 7], [5, 1, 7], [5, 2, 7]])
    np.testing.assert_array_equal(places, [2, 2, 2])
    rows, _ = variants(np.array([5]), 3, None)
    np.testing.assert_array_equal(rows, [[5]])


def test_a_feature_of_the_token_alone_needs_no_other():
    """The embedding of a model whose positions enter by rotation: no earlier token can matter."""
    lm = tiny("gpt_neox")
    dictionary = Neurons(n_features=WIDTH, d_in=WIDTH, d_out=WIDTH, k=WIDTH)
    neurons = Normalised(dictionary, dictionary.fit(jnp.zeros(WIDTH)), Normaliser(jnp.zeros(WIDTH), jnp.ones(())))
    tokens = text(2)[0]
    places = np.array([8, 11])
    for replace_with in (None, 4):
        needs = context_needs(lm, neurons, "resid_pre.0", 3, tokens, places, replace_with=replace_with)
        expected = np.maximum(np.asarray(lm.params["embed"]["tokens"])[tokens[[0, 1], places], 3], 0)
        np.testing.assert_allclose(needs.activations, expected, rtol=1e-6)
        assert np.nanmax(np.abs(needs.changes)) == 0


def test_a_previous_token_is_what_learned_positions_shift():
    """At the embedding of a GPT-2 a dropped token shifts the position and no more; a replaced one changes nothing."""
    lm = tiny("gpt2")
    dictionary = Neurons(n_features=WIDTH, d_in=WIDTH, d_out=WIDTH, k=WIDTH)
    neurons = Normalised(dictionary, dictionary.fit(jnp.full(WIDTH, -9.0)), Normaliser(jnp.zeros(WIDTH), jnp.ones(())))
    tokens = text(1)[0]
    dropped = context_needs(lm, neurons, "resid_pre.0", 3, tokens, np.array([8]))
    table = np.asarray(lm.params["embed"]["positions"])
    np.testing.assert_allclose(dropped.changes[0, :8], table[7, 3] - table[8, 3], atol=1e-5)
    replaced = context_needs(lm, neurons, "resid_pre.0", 3, tokens, np.array([8]), replace_with=1)
    assert not replaced.changes[0, :8].any()


def test_replacements_are_drawn_from_what_counts():
    tokens, mask = np.array([[1, 1, 1, 2], [9, 9, 9, 9]]), np.array([[True] * 4, [False] * 4])
    drawn = sample_tokens(tokens, mask, 4000, 0)
    assert set(drawn) == {1, 2}
    assert np.mean(drawn == 1) == pytest.approx(0.75, abs=0.04)
    np.testing.assert_array_equal(drawn, sample_tokens(tokens, mask, 4000, 0))
    with pytest.raises(InputError, match="no token counts"):
        sample_tokens(tokens, ~mask & False, 3, 0)


def test_compiled_once_for_all_contexts():
    lm, trained, tokens = tiny("gpt2"), coder(WIDTH, 6, 1), text(3)[0]
    context_needs(lm, trained, SITE, 1, tokens, np.array([3, 8, 11]))
    before = _code._cache_size()
    other = dataclasses.replace(trained, params=jax.tree.map(lambda a: 2 * a, trained.params))
    context_needs(lm, other, SITE, 4, tokens[::-1], np.array([10, 2, 7]), replace_with=[1, 2])
    assert _code._cache_size() == before


def test_drawn_red_where_needed_and_blue_where_held_down():
    lm, trained, tokens = tiny("gpt2"), coder(WIDTH, 6, 1), text(1)[0]
    needs = context_needs(lm, trained, SITE, 2, tokens, np.array([3]))
    needs = needs._replace(activations=np.array([4.0]), changes=np.full((1, CONTEXT), np.nan))
    needs.changes[0, :3] = (-2.0, np.nan, 1.0)

    def strings(ids):
        return [f"<{i}>" for i in ids]

    (context,) = need_contexts(needs, tokens, np.array([3]), strings)
    assert context.activations == (2.0, 0.0, -1.0, 4.0)
    assert context.peak == 3
    assert context.tokens == tuple(strings(tokens[0, :4]))
    page = needs_html([context], 4.0)
    spans = page.split("<span")[3:]  # behind the label and the activation
    assert len(spans) == 4
    assert 'style="--a:0.50"' in spans[0]
    assert "neg" not in spans[0]
    assert "style" not in spans[1]
    assert 'class="neg"' in spans[2]
    assert 'style="--a:0.30"' in spans[2]
    assert 'class="pk"' in spans[3]
    assert "&lt;" in spans[0]
    assert f"<{tokens[0, 0]}>" not in page
    assert page.count("<li>") == 1
    # Of a long context the end is shown.
    assert needs_html([context], 4.0, shown=2).count("<span") == 4


def test_errors():
    lm, trained, tokens = tiny("gpt2"), coder(WIDTH, 6, 1), text(2)[0]

    def run(site=SITE, feature=0, positions=(3, 4), **options):
        return context_needs(lm, trained, site, feature, tokens, np.array(positions), **options)

    for wrong in ([VOCAB], [-1], []):
        with pytest.raises(InputError, match="replace_with"):
            run(replace_with=np.array(wrong, int))
    with pytest.raises(InputError, match="rows have 0 to 11"):
        run(positions=(3, CONTEXT))
    with pytest.raises(InputError, match="give \\[contexts, position\\]"):
        run(positions=(3,))
    with pytest.raises(InputError, match="features"):
        run(feature=6)
    with pytest.raises(InputError, match="another width"):
        run(site="mlp_hidden.0")
    with pytest.raises(InputError, match="multiple of 8"):
        run(batch_rows=12)
