"""What the model says of a target in single texts, on a model in which features are planted."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.target_texts import HiddenCoder, Removal
from sparse_jax.features.firings import firings
from tests.features.planted import ANSWER, CONTEXT, N_FEATURES, SITE, planted, token


@pytest.fixture(scope="module")
def places():
    """(rows, positions) of two firings of ANSWER, behind " Anna"."""
    p = planted()
    for found in firings(p.lm, SITE, p.rows, np.arange(len(p.rows)), p.coder):
        its = found.places[found.features == ANSWER]
        rows, positions = found.rows[its // CONTEXT], its % CONTEXT
        kept = positions >= 2
        if kept.sum() >= 2:
            return rows[kept][:2], positions[kept][:2]
    raise AssertionError("the planted feature does not fire")


@pytest.fixture(scope="module")
def removal():
    p = planted()
    return Removal(p.lm, p.coder, SITE, p.rows, p.tokenizer.token_strings)


def test_the_answer_is_less_likely_without_the_feature(removal, places):
    rows, positions = places
    changes = removal.changes(ANSWER, np.unique(rows))
    assert set(changes) == set(np.unique(rows).tolist())
    p = planted()
    for row, position in zip(rows.tolist(), positions.tolist()):
        tokens, targets, _, _ = p.rows[np.array([row])]
        before = changes[row][:position]
        assert changes[row].shape == (CONTEXT,)
        if targets[0, position] == token(" tall"):
            assert changes[row][position] < -0.5
        fires_before = (tokens[0, :position] == token(" is")).any()
        assert fires_before or (before == 0).all()


def test_it_needs_what_it_fires_behind(removal, places):
    for context in removal.needs(ANSWER, *places):
        assert context.tokens[context.peak] == " is"
        strongest = int(np.argmax(context.activations[: context.peak]))
        assert context.tokens[strongest] == " Anna"
        assert context.activations[strongest] == pytest.approx(context.activations[context.peak], rel=1e-3)


def test_hidden_units_need_what_their_inputs_need(removal, places):
    p = planted()
    mlp = MLP(n_features=3, d_in=N_FEATURES, d_out=2)
    W = jnp.zeros((N_FEATURES, 3)).at[ANSWER, 1].set(2.0)
    params = {"W_enc": W, "b_enc": jnp.zeros(3), "W_dec": jnp.zeros((3, 2)), "b_dec": jnp.zeros(2)}
    unit = Removal(p.lm, HiddenCoder(p.coder, params, mlp), SITE, p.rows, p.tokenizer.token_strings)
    for mine, its in zip(unit.needs(1, *places), removal.needs(ANSWER, *places), strict=True):
        assert mine.tokens == its.tokens
        np.testing.assert_allclose(mine.activations, 2 * np.array(its.activations), rtol=1e-4, atol=1e-4)
