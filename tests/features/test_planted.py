"""The planted features fire where they are said to: everything else that uses them rests on this."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations.blocks import activations
from sparse_jax.lm import forward
from tests.features import planted as p


@pytest.fixture(scope="module")
def values():
    made = p.planted()
    tokens = made.rows[np.arange(40)].tokens
    x = activations(made.lm, jnp.array(tokens), p.SITE)
    return tokens, np.asarray(made.coder.encode(x.reshape(-1, p.D))).reshape(*tokens.shape, -1)


def test_they_fire_exactly_where_they_must(values):
    tokens, codes = values
    for feature, where in p.where_planted(tokens).items():
        assert where.sum() >= 5
        np.testing.assert_array_equal(codes[..., feature] > 0.05, where, err_msg=str(feature))
        np.testing.assert_array_equal(codes[..., feature] > 0, where, err_msg=str(feature))


def test_distractors_fire_too(values):
    fired = (values[1] > 0).sum(axis=(0, 1))
    assert (fired > 0).sum() > 65
    assert (fired[3::4] > 0).all()


def test_the_answer_is_caused():
    made = p.planted()
    ids = made.tokenizer.encode([" bade Anna is", " bade Bob is", " bade is"])
    last = [np.asarray(forward(made.lm, row[None]).logits)[0, -1] for row in ids]
    tall, old, short = (p.token(word) for word in (" tall", " old", " short"))
    assert int(np.argmax(last[0])) == tall
    assert int(np.argmax(last[1])) == old
    assert int(np.argmax(last[2])) == short
    assert last[0][short] > np.median(last[0]) + 1
