"""R^2 of targets from features of the same position, against NumPy's least squares and planted maps."""

import numpy as np
import pytest

from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.connectors.same_position import by_target, choose_ridge, constant, fit_ridge, same_position
from sparse_jax.connectors.same_position_mlp import fit_mlp, spreads
from sparse_jax.errors import InputError

N_IN, N_OUT, TOKENS = 30, 12, 3000


def sparse_site(name, x):
    order = np.argsort(-x, axis=1, kind="stable")[:, : int((x > 0).sum(1).max())]
    return SiteCodes(name, x.shape[1], np.take_along_axis(x, order, 1).astype(np.float32), order.astype(np.int32))


@pytest.fixture(scope="module")
def pair():
    """Targets 0 to 7 are linear in the inputs, 8 is noise, 9 fires three times, 10 never, 11 half explained."""
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(TOKENS, N_IN)) * (rng.random((TOKENS, N_IN)) < 0.15)
    y = x @ np.abs(rng.normal(size=(N_IN, N_OUT)))
    y[:, 8] = rng.exponential(size=TOKENS)
    y[:, 9:11] = 0
    y[[5, 700, 2900], 9] = 1
    y[:, 11] = 3 * x[:, 0] + 3 * rng.permutation(x[:, 0])
    tokens = Tokens(*(np.zeros(TOKENS, np.int32), np.arange(TOKENS, dtype=np.int32) // 50), np.arange(TOKENS),
                    np.zeros(TOKENS, np.int32))  # fmt: skip
    return Pair(sparse_site("resid_pre.0", x), sparse_site("attn_out.0", y), tokens)


def test_r2_against_least_squares(pair):
    train, held = pair.split(0.2)
    fitted = fit_ridge(train, 1e-9)
    (x, y), (hx, hy) = ([side.dense(slice(None)) for side in (part.inputs, part.targets)] for part in (train, held))
    one = lambda a: np.c_[a, np.ones(len(a))]  # noqa: E731
    W = np.linalg.lstsq(one(x).astype(float), y.astype(float), rcond=None)[0]
    np.testing.assert_allclose(np.r_[fitted.weights, fitted.bias[None]], W, atol=1e-4)
    found = same_position(held, {"linear": fitted.predict, "mean": constant(train)}, rows=333, least=5)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = 1 - ((one(hx) @ W - hy) ** 2).mean(0) / hy.var(0)
    good = [*range(9), 11]
    np.testing.assert_allclose(found.r2["linear"][good], expected[good], atol=1e-4)
    assert np.isnan(found.r2["linear"][[9, 10]]).all()
    assert (found.r2["linear"][:8] > 0.999).all()
    assert 0.3 < found.r2["linear"][11] < 0.7
    assert (found.r2["mean"][good] <= 1e-6).all()
    np.testing.assert_allclose(found.variance, hy.var(0), rtol=1e-4)
    np.testing.assert_array_equal(found.fired, (hy > 0).sum(0))
    assert found.tokens == len(held)
    summary = found.summary()["linear"]
    assert summary["targets"] == 10
    assert summary["above 0.9"] == 0.8
    assert summary["q50"] == pytest.approx(np.median(expected[good]), abs=1e-4)
    weights = hy.var(0)[good]
    assert summary["pooled"] == pytest.approx((expected[good] * weights).sum() / weights.sum(), abs=1e-4)
    assert [j for j, _ in by_target(found.r2["linear"], 2)] == [8, 11]


def test_the_ridge_is_chosen_on_documents_of_its_own(pair):
    few = pair.at(slice(0, 200))  # overfits without a ridge
    noise = np.random.default_rng(1).exponential(size=(200, 3)).astype(np.float32)
    noisy = Pair(few.inputs, SiteCodes("noise", 3, noise, np.tile(np.arange(3, dtype=np.int32), (200, 1))), few.tokens)
    assert choose_ridge(noisy).ridge == 1.0
    assert choose_ridge(pair.at(slice(0, 1500))).ridge == 1e-3


def test_an_mlp_explains_what_is_not_linear(pair):
    x = pair.inputs.dense(slice(None))
    both = np.c_[np.maximum(x[:, :8].sum(1) - 2, 0), np.minimum(x[:, 2], 1) * 5, x[:, 3]].astype(np.float32)
    train, held = Pair(pair.inputs, sparse_site("attn_out.0", both), pair.tokens).split(0.2)
    mlp = fit_mlp(train, 32, 40, learning_rate=1e-2, batch=256)
    found = same_position(held, {"linear": fit_ridge(train).predict, "MLP": mlp.predict})
    assert (found.r2["MLP"] > 0.88).all()
    assert (found.r2["linear"][:2] < 0.84).all()
    assert found.r2["linear"][2] > 0.99
    std, norm = spreads(train.targets)
    dense = train.targets.dense(slice(None)).astype(np.float64)
    np.testing.assert_allclose(std, dense.std(0), rtol=1e-6)
    np.testing.assert_allclose(norm, np.sqrt((dense**2).mean(0)), rtol=1e-6)
    with pytest.raises(InputError, match="at least 1"):
        fit_mlp(train, 0)


def test_what_is_refused(pair):
    with pytest.raises(InputError, match="above 0"):
        fit_ridge(pair, 0)
    with pytest.raises(InputError, match="at least 1"):
        same_position(pair, {}, least=0)
    with pytest.raises(InputError, match="'bad'"):
        same_position(pair, {"bad": lambda codes: np.zeros((3, 2))})
    silent = SiteCodes("silent", 4, np.zeros((TOKENS, 2), np.float32), np.zeros((TOKENS, 2), np.int32))
    with pytest.raises(InputError, match="varies"):
        fit_ridge(Pair(silent, pair.targets, pair.tokens))
    assert same_position(pair.at(slice(0, 5)), {"mean": constant(pair)}).summary() == {"mean": {"targets": 0}}
