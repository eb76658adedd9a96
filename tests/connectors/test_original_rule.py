"""The original rule, and that it passes rare features whatever predicts them."""

import numpy as np
import pytest

from sparse_jax.connectors.document_errors import document_errors
from sparse_jax.connectors.linearity import classify, linearity
from sparse_jax.connectors.original_rule import original_rule
from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.errors import InputError

N, TOKENS = 40, 20_000


@pytest.fixture(scope="module")
def errors():
    """Targets with codes around 1 that fire on 0.05 % (the first half) or 5 % of tokens, of which nothing is known but
    the mean; the MLP knows them exactly. The last two never fire."""
    rng = np.random.default_rng(0)
    density = np.repeat([0.0005, 0.05, 0.0], [N // 2, N // 2 - 2, 2])
    y = (rng.uniform(0.8, 1.2, (TOKENS, N)) * (rng.random((TOKENS, N)) < density)).astype(np.float32)
    place = np.arange(TOKENS, dtype=np.int32)
    nothing = SiteCodes("inputs", 4, np.zeros((TOKENS, 1), np.float32), np.zeros((TOKENS, 1), np.int32))
    targets = SiteCodes("targets", N, y, np.broadcast_to(np.arange(N), y.shape))
    pair = Pair(nothing, targets, Tokens(place, place // 50, place // 100, place % 100))
    mean = np.broadcast_to(y.mean(axis=0), y.shape)
    return document_errors(pair, {"linear": mean, "mlp": y}).constant(y.mean(axis=0))


def rule(errors, **options):
    return original_rule(
        *(errors.mse(name) for name in ("linear", "mlp", "constant")), errors.fired.any(axis=0), **options
    )


def test_a_constant_predictor_passes_for_rare_features(errors):
    found = rule(errors)
    rare, common, dead = slice(0, N // 2), slice(N // 2, N - 2), slice(N - 2, N)
    assert found.linear[rare].all()
    assert found.constant_passes[rare].all()
    assert not found.linear[common].any()
    assert not found.constant_passes[common].any()
    assert found.linear[dead].all()  # and so do dead ones
    assert found.share == 22 / 40
    assert found.share_alive == found.share_constant == 20 / 38
    # Ours: a linear map explains nothing of them, and they are called that.
    measured = linearity(errors, ["linear"], ["mlp"])
    np.testing.assert_allclose(measured.g[:-2], 1, atol=1e-3)
    np.testing.assert_allclose(measured.r2_constant[:-2], 0, atol=1e-6)
    classes = classify(measured, 0.04, min_documents=4)
    assert not (classes == "linear").any()
    assert (classes[rare] == "nonlinear").mean() > 0.7


def test_the_unit_of_the_codes_decides(errors):
    """Norms of layers divide the difference: with ten times the least norm the common ones pass too."""
    found = rule(errors, norm=10.0, min_norm=1.0)
    np.testing.assert_allclose(found.difference, rule(errors).difference / 100)
    assert found.linear.all()


def test_by_hand():
    found = original_rule([0.5, 0.0512], [0.1, 0.05], [0.6, 0.07], [True, True], norm=2.0, min_norm=1.0)
    np.testing.assert_allclose(found.difference, [0.1, 0.0003])
    assert found.linear.tolist() == [False, True]
    assert found.constant_passes.tolist() == [False, False]
    strict = original_rule([0.5, 0.0512], [0.1, 0.05], [0.6, 0.07], [True, True], norm=2.0, threshold=1e-4)
    assert not strict.linear.any()
    nothing = original_rule([0.0], [0.0], [0.0], [False])
    assert np.isnan([nothing.share_alive, nothing.share_constant]).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alive": [True]}, "one number a target"),
        ({"norm": 0.5, "min_norm": 1.0}, "least norm"),
        ({"norm": 1.0, "min_norm": 0.0}, "least norm"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    losses = dict(zip(("loss_linear", "loss_mlp", "loss_constant"), np.zeros((3, 2))))
    with pytest.raises(InputError, match=said):
        original_rule(**{**losses, "alive": [True, True], **given})
