"""Which connections are looked at, and which targets beside them, by plain counting."""

import numpy as np
import pytest

from sparse_jax.connectors.connection_sample import code_at, matched_targets, maximum_codes, sample_connections
from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.errors import InputError

N_IN, N_OUT, TOKENS = 12, 30, 4000


def sparse(dense, slots):
    order = np.argsort(-dense, axis=1)[:, :slots]
    values = np.take_along_axis(dense, order, axis=1).astype(np.float32)
    assert (values[:, -1] == 0).all(), "slots for all"
    return SiteCodes("resid_pre.0", dense.shape[1], values, order)


@pytest.fixture(scope="module")
def dense():
    """Codes of inputs and targets: features fire on 0 to a fifth of the tokens; input 3 and target 5 never."""
    generator = np.random.default_rng(0)
    made = []
    for n, silent in ((N_IN, 3), (N_OUT, 5)):
        codes = generator.exponential(size=(TOKENS, n)) * (generator.random((TOKENS, n)) < np.linspace(0.01, 0.2, n))
        codes[:, silent] = 0
        made.append(codes)
    return made


@pytest.fixture(scope="module")
def pair(dense):
    places = np.arange(TOKENS)
    tokens = Tokens(
        places.astype(np.int32), (places // 50).astype(np.int32), places // 10, (places % 10).astype(np.int32)
    )
    return Pair(sparse(dense[0], N_IN), sparse(dense[1], 20), tokens)


@pytest.fixture(scope="module")
def weights():
    generator = np.random.default_rng(1)
    return generator.normal(size=(N_IN, N_OUT)) * (generator.random((N_IN, N_OUT)) < 0.3)


def test_samples_are_connections_where_the_input_is_active(pair, dense, weights):
    sample = sample_connections(pair, weights, 500, seed=3)
    assert len(sample.token) == 500
    assert len({*zip(*sample)}) == 500
    assert (weights[sample.input, sample.target] != 0).all()
    assert (dense[0][sample.token, sample.input] > 0).all()
    assert (np.diff(sample.token) >= 0).all()
    again, other = (sample_connections(pair, weights, 500, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(np.stack(sample), np.stack(again))
    assert not np.array_equal(sample.token, other.token)
    together = sample_connections(pair, weights, 300, both_active=True)
    assert len(together.token) == 300
    assert (dense[0][together.token, together.input] > 0).all()
    assert (dense[1][together.token, together.target] > 0).all()


def test_each_connection_or_each_firing_is_as_likely(pair, dense):
    weights = np.zeros((N_IN, N_OUT))
    weights[0, 1] = weights[11, 2] = weights[3, 4] = 1
    fires = (dense[0] > 0).sum(axis=0)
    assert fires[0] * 10 < fires[11]
    shares = {}
    for draw in ("connection", "firing"):
        drawn = [sample_connections(pair, weights, 20, seed, draw=draw).input for seed in range(40)]
        shares[draw] = np.mean(np.concatenate(drawn) == 0)
    assert shares["connection"] == pytest.approx(0.45, abs=0.06)  # the rare one runs out of places now and then
    assert shares["firing"] == pytest.approx(fires[0] / (fires[0] + fires[11]), abs=0.04)
    # All of them, once each.
    assert len(sample_connections(pair, weights, 10_000).token) <= fires[0] + fires[11]


def test_controls_are_matched(pair, dense, weights):
    sample = sample_connections(pair, weights, 300)
    counts = (dense[1] > 0).sum(axis=0)
    control = matched_targets(pair, weights, sample, neighbours=4)
    rank = np.argsort(np.argsort(counts, kind="stable"), kind="stable")
    for i, j, other in zip(sample.input, sample.target, control):
        pool = [k for k in range(N_OUT) if weights[i, k] == 0 and counts[k] > 0]
        allowed = sorted(pool, key=lambda k: abs(rank[k] - rank[j]))[:4]
        assert other != j
        assert abs(rank[other] - rank[j]) <= abs(rank[allowed[-1]] - rank[j])
        assert other in pool
    assert np.corrcoef(counts[sample.target], counts[control])[0, 1] > 0.9
    here = matched_targets(pair, weights, sample, both_active=True)
    found = here >= 0
    assert 0 < found.mean() < 1 or found.all()
    assert (dense[1][sample.token[found], here[found]] > 0).all()
    assert (weights[sample.input[found], here[found]] == 0).all()
    full = np.ones_like(weights)
    assert (matched_targets(pair, full, sample) == -1).all()


def test_codes_at_places(pair, dense):
    token, feature = np.array([5, 90, 7]), np.array([1, 11, 3])
    np.testing.assert_allclose(code_at(pair.inputs, token, feature), dense[0][token, feature], rtol=1e-6)
    np.testing.assert_allclose(maximum_codes(pair.targets), dense[1].max(axis=0), rtol=1e-6)


def test_errors(pair, weights):
    with pytest.raises(InputError, match="shape"):
        sample_connections(pair, weights.T, 5)
    with pytest.raises(InputError, match="at least 1"):
        sample_connections(pair, weights, 0)
    with pytest.raises(InputError, match="connection or firing"):
        sample_connections(pair, weights, 5, draw="token")
    nothing = np.zeros_like(weights)
    nothing[3] = 1  # an input that never fires
    with pytest.raises(InputError, match="no connection"):
        sample_connections(pair, nothing, 5)
    nothing[:] = 0
    nothing[:, 5] = 1  # a target that never does
    with pytest.raises(InputError, match="active together"):
        sample_connections(pair, nothing, 5, both_active=True)
