"""The stochastic trainer: known connections come back, resuming changes no bit, units do not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors import fit_run
from sparse_jax.connectors.autoencoder import AutoencoderConnector
from sparse_jax.connectors.fit import FitOptions, Member, fit
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.mlp_on_linear import MLPOnLinear
from sparse_jax.connectors.pair_batches import PairBatches
from sparse_jax.connectors.refit import least_squares_on_support, refit, with_weights
from sparse_jax.connectors.scaling import scales_of
from sparse_jax.errors import InputError
from tests.connectors.small_pairs import pair_of, sparse_inputs

N_IN, N_OUT, TOKENS = 30, 8, 3000
OPTIONS = FitOptions(tokens=150_000, batch=250, learning_rate=0.03)
FEW = FitOptions(tokens=3000, batch=250, log_every=4)


@pytest.fixture(scope="module")
def planted():
    """(pair, weights): each target a sum of two inputs, targets in units of their own, 5 % noise."""
    rng = np.random.default_rng(0)
    x = sparse_inputs(rng, TOKENS, N_IN)
    W = np.zeros((N_IN, N_OUT))
    for j in range(N_OUT):
        W[rng.choice(N_IN, 2, replace=False), j] = rng.choice([-1.0, 1.0], 2) * (1 + rng.random(2))
    W = W / np.sqrt((x**2).mean(0))[:, None] * np.exp(2 * rng.normal(size=N_OUT))
    y = x @ W
    return pair_of(x, y + 0.05 * y.std(0) * rng.normal(size=y.shape)), W


@pytest.fixture(scope="module")
def fitted(planted):
    return fit(Linear(), planted[0], OPTIONS, [Member({"alpha": 0.1}), Member({"alpha": 0.4})])


def test_known_connections_come_back(planted, fitted):
    pair, W = planted
    for trained, alpha in zip(fitted.trained, (0.1, 0.4)):
        found = np.asarray(trained.weights())
        np.testing.assert_array_equal(found != 0, W != 0)
        # Shrunk as the optimality condition says: the gradient of each weight on the support is alpha, in its units.
        x, y = pair.inputs.dense(slice(None)), pair.targets.dense(slice(None))
        error = np.asarray(trained.predict(x)) - y
        unit = fitted.scales.target_scale / fitted.scales.input_norm[:, None]
        g = 2 * unit * (x.T @ (error / fitted.scales.target_scale**2)) / len(pair)
        np.testing.assert_allclose(g[W != 0], -alpha * np.sign(W[W != 0]), rtol=0.05)
        assert np.abs(g[W == 0]).max() < alpha


def test_members_share_a_compiled_step_and_a_single_run_gives_their_bits(planted, fitted):
    options = dataclasses.replace(OPTIONS, tokens=2500)
    fit_run._step.clear_cache()
    both = fit(Linear(), planted[0], options, [Member({"alpha": 0.1}), Member({"alpha": 0.4})])
    alone = fit(Linear(alpha=0.4), planted[0], options)
    assert fit_run._step._cache_size() == 1
    np.testing.assert_array_equal(both.trained[1].weights(), alone.trained[0].weights())
    assert both.trained[1].connector == alone.trained[0].connector


@pytest.mark.parametrize("connector", [Linear(), MLP(n_features=6), AutoencoderConnector(n_features=6)])
def test_resuming_changes_no_bit(planted, connector, tmp_path):
    members = [Member({"alpha": 1e-3}), Member({"alpha": 1e-2}, seed=5, learning_rate=0.01)]
    whole = fit(connector, planted[0], FEW, members)
    path, asked = tmp_path / "fit.safetensors", iter(range(100))
    first = fit(connector, planted[0], FEW, members, checkpoint=path, should_stop=lambda: next(asked) == 5)
    rest = fit(connector, planted[0], FEW, members, checkpoint=path)
    assert (first.steps, rest.steps, whole.steps) == (5, 12, 12)
    for one, other in zip(whole.trained, rest.trained):
        jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(InputError, match=r"another run.*seeds"):
        fit(connector, planted[0], FEW, [members[0], Member({"alpha": 1e-2})], checkpoint=path)
    path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        fit(connector, planted[0], FEW, members, checkpoint=path)


@pytest.mark.parametrize("connector", [Linear(alpha=0.1), MLP(n_features=6, alpha=0.01)])
def test_units_of_codes_do_not_matter(planted, connector):
    """Other units of inputs and targets, by powers of two: the same predictions in the new units, to the bit."""
    pair, _ = planted
    rng = np.random.default_rng(1)
    up, out = (2.0 ** rng.integers(-3, 4, n).astype(np.float32) for n in (N_IN, N_OUT))
    x, y = pair.inputs.dense(slice(None)), pair.targets.dense(slice(None))
    one, other = fit(connector, pair, FEW).trained[0], fit(connector, pair_of(x * up, y * out), FEW).trained[0]
    np.testing.assert_array_equal(np.asarray(other.predict(x * up)), np.asarray(one.predict(x)) * out)


def test_gathers_and_dense_products_train_the_same(planted, monkeypatch):
    pair = planted[0]
    rng = np.random.default_rng(3)
    x, y = np.zeros((len(pair), 64), np.float32), np.zeros((len(pair), 40), np.float32)
    x[np.arange(len(x)), rng.integers(0, 64, len(x))] = 1
    y[np.arange(len(y)), rng.integers(0, 40, len(y))] = 1
    pair = pair_of(x, y)
    made = {}
    for sparse in (True, False):
        monkeypatch.setattr("sparse_jax.connectors.pair_batches.gather_is_faster", lambda *_, sparse=sparse: sparse)
        made[sparse] = fit(MLP(n_features=6, alpha=0.01), pair, FEW).trained[0].predict(x[:50])
    np.testing.assert_allclose(made[True], made[False], rtol=1e-3, atol=1e-4)


def test_an_mlp_learns_what_a_linear_connector_cannot():
    rng = np.random.default_rng(2)
    x = (rng.random((TOKENS, 6)) < 0.4).astype(np.float32)
    y = np.stack([x[:, 0] * x[:, 1], (x[:, 2] + x[:, 3] > 0) * 2.0], 1).astype(np.float32)
    options = dataclasses.replace(OPTIONS, learning_rate=0.01, tokens=250_000)
    errors = {}
    for connector in (Linear(), MLP(n_features=16)):
        found = fit(connector, pair_of(x, y), options)
        errors[connector.kind] = np.mean((np.asarray(found.trained[0].predict(x)) - y) ** 2, 0) / y.var(0)
    assert errors["linear"].min() > 0.2
    assert errors["mlp"].max() < 0.02


def test_an_mlp_on_a_linear_connector_starts_there_and_adds_what_it_cannot():
    rng = np.random.default_rng(2)
    x = ((rng.random((TOKENS, 6)) < 0.4) * [1, 2, 3, 1, 1, 1]).astype(np.float32)
    y = np.stack([x[:, 0] * x[:, 1], x[:, 2] + 2 * x[:, 3] + 1], 1).astype(np.float32)
    pair = pair_of(x, y)
    options = dataclasses.replace(OPTIONS, learning_rate=0.01, tokens=250_000)
    linear = fit(Linear(), pair, options).trained[0]
    connector = MLPOnLinear(n_features=16)
    start = connector.start(linear, jax.random.key(0))
    np.testing.assert_allclose(start.predict(x), linear.predict(x), rtol=1e-5, atol=1e-5)
    end = fit(connector, pair, options, start=[start]).trained[0]
    np.testing.assert_allclose(end.params["W_skip"], linear.weights(), rtol=1e-5, atol=1e-6)  # units there and back
    errors = [np.mean((np.asarray(each.predict(x)) - y) ** 2, 0) / y.var(0) for each in (linear, end)]
    assert errors[0][0] > 0.2
    assert errors[1][0] < 0.02
    assert errors[1][1] < errors[0][1] + 1e-3
    # The penalty is of what is trained.
    np.testing.assert_allclose(connector.sized(6, 2).weight_l1(start.params), connector.sized(6, 2).weight_l1(
        start.params | {"W_skip": 0 * linear.weights()}), rtol=1e-6)  # fmt: skip


def test_refits_have_no_shrinkage(planted, fitted):
    pair, W = planted
    x, y = pair.inputs.dense(slice(None)).astype(np.float64), pair.targets.dense(slice(None)).astype(np.float64)
    sums = {"input_sum": x.sum(0), "target_sum": y.sum(0), "tokens": len(x)}
    support = np.asarray(fitted.trained[1].weights()) != 0
    weights, bias = least_squares_on_support(support, x.T @ x, x.T @ y, **sums)
    for j in range(N_OUT):
        design = np.column_stack([x[:, support[:, j]], np.ones(len(x))])
        best = np.linalg.lstsq(design, y[:, j], rcond=None)[0]
        np.testing.assert_allclose(weights[support[:, j], j], best[:-1], rtol=1e-6)
        np.testing.assert_allclose(bias[j], best[-1], rtol=1e-6, atol=1e-9)
    closed = with_weights(fitted.trained[1], weights, bias)
    by_steps = refit([fitted.trained[1]], pair, OPTIONS).trained[0]
    np.testing.assert_array_equal(np.asarray(by_steps.weights()) != 0, support)
    np.testing.assert_allclose(np.asarray(by_steps.weights()), np.asarray(closed.weights()), rtol=0.02, atol=0)
    np.testing.assert_allclose(np.asarray(closed.weights())[W != 0], W[W != 0], rtol=0.05)
    without, zero = least_squares_on_support(support, x.T @ x, x.T @ y)
    assert not zero.any()
    assert np.abs(without - weights).max() > 0
    with pytest.raises(InputError, match="all three or none"):
        least_squares_on_support(support, x.T @ x, x.T @ y, tokens=3)
    with pytest.raises(InputError, match="no connectors"):
        refit([], pair)


def test_batches_are_a_function_of_seed_and_step(planted):
    pair = planted[0]
    scales = scales_of(pair)
    one, other = (PairBatches(pair, scales, 700, 3) for _ in range(2))
    jumped = other.rows(5)
    rows = [one.rows(i) for i in range(8)]
    np.testing.assert_array_equal(rows[5], jumped)
    assert len(np.unique(np.concatenate(rows[:4]))) == 4 * 700  # a pass takes no token twice
    assert not np.array_equal(np.sort(np.concatenate(rows[:4])), np.sort(np.concatenate(rows[4:])))
    assert not np.array_equal(PairBatches(pair, scales, 700, 4).rows(0), rows[0])


def test_what_is_refused(planted):
    pair = planted[0]
    with pytest.raises(InputError, match="not one full batch"):
        fit(Linear(), pair, FitOptions(batch=TOKENS + 1))
    with pytest.raises(InputError, match="no members"):
        fit(Linear(), pair, FEW, [])
    with pytest.raises(InputError, match="coefficients hidden_l1 of a linear"):
        fit(Linear(), pair, FEW, [Member({"hidden_l1": 1.0})])
    with pytest.raises(InputError, match="positive"):
        FitOptions(learning_rate=0.0)
    with pytest.raises(InputError, match="shares"):
        FitOptions(warmup=0.6, decay=0.6)
    with pytest.raises(InputError, match="diverges"):
        fit(MLP(n_features=6), pair, dataclasses.replace(FEW, learning_rate=1e4))
    values = pair.targets.values.copy()
    values[7, 0] = np.nan
    broken = dataclasses.replace(pair, targets=dataclasses.replace(pair.targets, values=values))
    with pytest.raises(InputError, match="finite"):
        fit(Linear(), broken, FEW)


def test_the_log_and_the_bar(planted, capsys):
    rows = []
    found = fit(Linear(alpha=0.1), planted[0], FEW, log=rows.append, progress=True)
    assert rows == found.history
    assert [row["step"] for row in rows] == [1, 4, 8, 12]
    assert rows[-1].keys() >= {"tokens", "member", "reconstruction", "nonzero", "weight_l1_norm"}
    assert "tok" in capsys.readouterr().err
    assert jnp.isfinite(jnp.array(rows[-1]["reconstruction"]))
