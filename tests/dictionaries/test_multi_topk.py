"""The Multi-TopK autoencoder: its second reconstruction, gradients, and what it is for."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries.multi_topk import MultiTopK
from sparse_jax.dictionaries.topk import TopK
from sparse_jax.errors import InputError
from tests.dictionaries.k_sparse import assert_gradients, context, encode, loss, small, sparse_data, train


@pytest.mark.parametrize("k_now", [None, 1])
def test_is_the_sum_of_two_topk_losses(k_now):
    dictionary, params, batch = small(MultiTopK, np.float32, n=24, k=2)
    losses = loss(dictionary, params, batch, context(dictionary, k_now))
    k = k_now or 2
    for width, name, weight in ((k, "reconstruction", 1), (4 * k, "wide", 1 / 8)):
        one = TopK(n_features=24, k=width).sized(4)
        expected = loss(one, params, batch, context(one))
        np.testing.assert_allclose(losses.terms[name], weight * expected.terms["reconstruction"], rtol=1e-5)
        if name == "reconstruction":
            np.testing.assert_array_equal(losses.fired, expected.fired)
            np.testing.assert_allclose(losses.y_hat, expected.y_hat, rtol=1e-6)
    np.testing.assert_array_equal(
        encode(dictionary, params, batch.x), encode(TopK(n_features=24, k=2).sized(4), params, batch.x)
    )


def test_gradients_of_every_term_against_finite_differences(x64):
    dictionary, params, batch = small(MultiTopK, k=1)
    here = context(dictionary, dtype=jnp.float64)

    def terms(params):
        made = loss(dictionary, params, batch, here).terms
        return {name: made[name] for name in ("reconstruction", "wide")}

    assert_gradients(terms, params, params)


def test_training_gives_a_code_that_more_features_improve():
    x, fvu = sparse_data(1000, seed=5), {}
    for architecture in (MultiTopK, TopK):
        _, params, (first, last) = train(architecture(n_features=48, k=3).sized(16), 400, 5e-3)
        assert last["fvu"] < 0.5 * first["fvu"]
        wide = TopK(n_features=48, k=12).sized(16)
        error = np.sum((wide.decode(params, encode(wide, params, x)) - x) ** 2)
        fvu[architecture] = error / np.sum((x - np.mean(x, axis=0)) ** 2)
    assert fvu[MultiTopK] < fvu[TopK]


@pytest.mark.parametrize(("options", "flag"), [({"wide": 1}, "--wide 1"), ({"wide_coefficient": -1.0}, "--wide-coeff")])
def test_bad_values_are_refused(options, flag):
    with pytest.raises(InputError, match=flag):
        MultiTopK(**options)
