"""R^2 of targets from features of the same position, against NumPy's least squares and planted maps."""

import numpy as np
import pytest

from sparse_jax.connectors.linear_refit import dense_linear
from sparse_jax.connectors.moments import moments
from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.connectors.same_position import by_target, same_position
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
    fitted = dense_linear(moments(train, dtype=np.float64), 1e-9)
    (x, y), (hx, hy) = ([side.dense(slice(None)) for side in (part.inputs, part.targets)] for part in (train, held))
    one = lambda a: np.c_[a, np.ones(len(a))]  # noqa: E731
    W = np.linalg.lstsq(one(x).astype(float), y.astype(float), rcond=None)[0]
    np.testing.assert_allclose(np.r_[fitted.weights[0].toarray(), fitted.bias], W, atol=1e-4)
    found = same_position(held, {"linear": fitted.trained(0)}, y.mean(0), least=5)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = 1 - ((one(hx) @ W - hy) ** 2).mean(0) / hy.var(0)
    good = [*range(9), 11]
    np.testing.assert_allclose(found.r2["linear"][good], expected[good], atol=1e-4)
    assert np.isnan(found.r2["linear"][[9, 10]]).all()
    assert (found.r2["linear"][:8] > 0.999).all()
    assert 0.3 < found.r2["linear"][11] < 0.7
    of_mean = 1 - ((y.mean(0) - hy) ** 2).mean(0)[good] / hy.var(0)[good]
    np.testing.assert_allclose(found.r2["mean"][good], of_mean, atol=1e-5)
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


def test_what_is_refused(pair):
    means = np.zeros(N_OUT)
    with pytest.raises(InputError, match="at least 1"):
        same_position(pair, {}, means, least=0)
    with pytest.raises(InputError, match="bad"):
        same_position(pair, {"bad": np.zeros((3, 2))}, means)
    assert same_position(pair.at(slice(0, 5)), {}, means).summary() == {"mean": {"targets": 0}}
