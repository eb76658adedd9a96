"""Errors by document against plain loops over dense codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.document_errors import document_errors
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.connectors.synthetic import planted_connections
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes, dense

IN, OUT, TOKENS = 16, 6, 900


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Tokens in no order of documents; the last target never fires, the one before is 2 everywhere."""
    pair = planted_connections(tokens=TOKENS, n_inputs=IN, n_targets=OUT, document_tokens=60).pair
    y = pair.targets.dense(slice(None))
    y[:, -1], y[:, -2] = 0, 2
    targets = dataclasses.replace(pair.targets, values=y, indices=np.tile(np.arange(OUT), (TOKENS, 1)))
    shuffled = np.random.default_rng(0).permutation(TOKENS)
    return dataclasses.replace(pair, targets=targets).at(shuffled)


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).normal(size=(IN, OUT)).astype(np.float32)


def predictors(pair, weights):
    linear = Linear(with_bias=False).sized(IN, OUT)
    params = {**linear.init(jax.random.key(0)), "W_dec": jnp.array(weights)}
    function = jax.jit(lambda codes: dense(codes, IN) @ jnp.array(weights))
    return {
        "trained": Trained(linear, params),
        "function": function,
        "array": pair.inputs.dense(slice(None)) @ weights,
    }


def test_sums_are_those_of_plain_loops(pair, weights):
    errors = document_errors(pair, predictors(pair, weights), chunk_rows=128)
    x, y = (side.dense(slice(None)).astype(np.float64) for side in (pair.inputs, pair.targets))
    document = pair.tokens.document
    assert errors.documents == len(errors.tokens) == document.max() + 1 > 10
    for d in range(document.max() + 1):
        at = document == d
        assert errors.tokens[d] == at.sum()
        np.testing.assert_array_equal(errors.fired[d], (y[at] > 0).sum(axis=0))
        np.testing.assert_allclose(errors.total[d], y[at].sum(axis=0))
        np.testing.assert_allclose(errors.squares[d], (y[at] ** 2).sum(axis=0))
        for name in ("trained", "function", "array"):
            np.testing.assert_allclose(errors.errors[name][d], ((x[at] @ weights - y[at]) ** 2).sum(axis=0), rtol=1e-5)
    mse = ((x @ weights - y) ** 2).mean(axis=0)
    np.testing.assert_allclose(errors.mse("array"), mse, rtol=1e-5)
    np.testing.assert_allclose(errors.variance, y.var(axis=0), atol=1e-12)
    np.testing.assert_array_equal(errors.variance[-2:], 0)
    np.testing.assert_allclose(errors.r2("array")[:-2], (1 - mse[:-2] / y.var(axis=0)[:-2]), rtol=1e-5)
    assert np.isnan(errors.r2("array")[-2:]).all()
    np.testing.assert_allclose(errors.density, (y > 0).mean(axis=0))


def test_a_constant_predictor_is_made_of_the_sums(pair):
    y = pair.targets.dense(slice(None)).astype(np.float64)
    value = np.linspace(0, 0.3, OUT)
    errors = document_errors(pair, {}).constant(value)
    np.testing.assert_allclose(errors.mse("constant"), ((y - value) ** 2).mean(axis=0), rtol=1e-9)
    own_mean = document_errors(pair, {}).constant(y.mean(axis=0))
    np.testing.assert_allclose(own_mean.r2("constant")[:-2], 0, atol=1e-9)


def test_many_documents_are_put_together(pair, weights):
    whole = document_errors(pair, {"array": predictors(pair, weights)["array"]})
    few = document_errors(pair, {"array": predictors(pair, weights)["array"]}, max_groups=4, chunk_rows=100)
    assert len(few.tokens) == 4
    assert few.documents == whole.documents
    for group in range(4):
        np.testing.assert_allclose(few.errors["array"][group], whole.errors["array"][group::4].sum(axis=0), rtol=1e-6)
        assert few.tokens[group] == whole.tokens[group::4].sum()


def test_every_token_is_looked_at_once_in_chunks_of_one_shape(pair, weights):
    shapes, rows, told = set(), [], []

    def predict(codes: SparseCodes):
        shapes.add(codes.values.shape)
        rows.append(codes.values)
        return np.zeros((len(codes.values), OUT), np.float32)

    document_errors(pair, {"zero": predict}, chunk_rows=256, progress=told.append)
    assert shapes == {(256, pair.inputs.slots)}
    assert sum(told) == TOKENS
    seen = np.concatenate(rows)
    np.testing.assert_allclose(np.sort(seen.sum(axis=1))[-50:], np.sort(pair.inputs.values.sum(axis=1))[-50:])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (np.zeros((TOKENS, OUT + 1), np.float32), "have shape"),
        (lambda codes: np.zeros((len(codes.values), 2), np.float32), r"gives \[900, 2\]"),
        (lambda codes: np.full((len(codes.values), OUT), np.nan, np.float32), "not finite"),
    ],
)
def test_predictions_that_cannot_be_are_refused(wrong, said, pair):
    with pytest.raises(InputError, match=said):
        document_errors(pair, {"wrong": wrong}, chunk_rows=1000)
