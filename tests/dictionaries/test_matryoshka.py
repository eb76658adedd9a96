"""The Matryoshka autoencoder: nested reconstructions equal to the naive ones, and their gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.dictionaries import from_json, to_json
from sparse_jax.dictionaries.batch_topk import BatchTopK
from sparse_jax.dictionaries.matryoshka import Matryoshka
from sparse_jax.errors import InputError
from tests.dictionaries.k_sparse import assert_gradients, context, encode, loss, small, sparse_data, train

SHARES = (0.25, 0.5, 1.0)


def test_sizes():
    assert Matryoshka().sized(65_536 // 8).sizes == (2048, 6144, 14336, 30720, 65536)
    assert Matryoshka(n_features=8, prefixes=SHARES).sized(4).sizes == (2, 4, 8)
    assert Matryoshka(n_features=5).sized(4).sizes == (1, 2, 5)


@pytest.mark.parametrize("prefixes", [SHARES, (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0), (1.0,)])
def test_equals_a_full_product_for_each_prefix(x64, prefixes):
    dictionary, params, batch = small(Matryoshka, n=24, k=3, prefixes=prefixes)
    plain, here = (
        BatchTopK(n_features=24, k=3).sized(4, compute_dtype="float64"),
        context(dictionary, dtype=jnp.float64),
    )
    codes = plain.batch_codes(plain.preactivations(params, batch.x), batch.weight, here)
    naive = []
    for size in dictionary.sizes:
        y_hat = codes[:, :size] @ params["W_dec"][:size] + params["b_dec"]
        naive.append(np.sum(batch.weight[:, None] * (y_hat - batch.x) ** 2) / int(np.sum(batch.weight)))
    losses = loss(dictionary, params, batch, here)
    np.testing.assert_allclose(losses.terms["reconstruction"], naive[-1], rtol=1e-12)
    np.testing.assert_allclose(losses.terms["prefixes"], sum(naive[:-1]), rtol=1e-12)
    # Everything else is as without prefixes.
    other = loss(plain, params, batch, here)
    np.testing.assert_allclose(losses.terms["reconstruction"], other.terms["reconstruction"], rtol=1e-12)
    np.testing.assert_array_equal(losses.fired, other.fired)
    np.testing.assert_allclose(losses.frozen["threshold"], other.frozen["threshold"])


def test_gradients_of_every_term_against_finite_differences(x64):
    dictionary, params, batch = small(Matryoshka, k=3, prefixes=SHARES)
    trained = {name: value for name, value in params.items() if name != "threshold"}
    here = context(dictionary, dtype=jnp.float64)

    def terms(trained):
        made = loss(dictionary, params | trained, batch, here).terms
        return {name: made[name] for name in ("reconstruction", "prefixes")}

    grads = assert_gradients(terms, trained, trained)
    # The last block is in no inner prefix.
    assert not np.any(grads["prefixes"]["W_dec"][4:])
    assert np.any(grads["prefixes"]["W_dec"][:4])


def test_training_makes_prefixes_that_reconstruct_by_themselves():
    x = sparse_data(1000, seed=5)
    alone = {}
    for architecture in (Matryoshka, BatchTopK):
        dictionary = architecture(n_features=48, k=4).sized(16)
        _, params, (first, last) = train(dictionary, 400, 5e-3)
        assert last["fvu"] < 0.5 * first["fvu"]
        codes = np.array(encode(dictionary, params, x))
        codes[:, 22:] = 0
        error = np.sum((dictionary.decode(params, jnp.array(codes)) - x) ** 2)
        alone[architecture] = error / np.sum((x - np.mean(x, axis=0)) ** 2)
    assert alone[Matryoshka] < 0.8 * alone[BatchTopK]


def test_survives_json_with_its_tuple():
    dictionary = Matryoshka(prefixes=SHARES).sized(8)
    again = from_json(json.loads(json.dumps(to_json(dictionary))))
    assert again == dictionary
    assert hash(again) == hash(dictionary)
    assert jax.jit(lambda x, d: x * d.k, static_argnums=1)(1.0, again) == dictionary.k


@pytest.mark.parametrize("prefixes", [(), (0.5,), (0.5, 0.5, 1.0), (0.0, 1.0), (0.5, 0.25, 1.0), (0.5, 1.0, 2.0)])
def test_prefixes_that_do_not_nest_are_refused(prefixes):
    with pytest.raises(InputError, match="--prefixes"):
        Matryoshka(prefixes=prefixes)
