"""Connections at single places: each change by whole passes of the model, and modules of which all is known by hand."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.connectors.between import between, changes, clean_pass
from sparse_jax.connectors.causal import _measured, causal_check
from sparse_jax.connectors.causal_figures import agreement, causal_figures
from sparse_jax.connectors.connection_sample import Sample, maximum_codes, sample_connections
from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.linear import Linear
from sparse_jax.dictionaries import Fista
from sparse_jax.errors import InputError
from sparse_jax.features.causes import Located
from sparse_jax.lm import Edit, Site, at, forward, put
from sparse_jax.numerics.sparse_codes import dense
from tests.connectors.tiny_pairs import located, pair_of, rows_of
from tests.features.tiny_models import WIDTH, tiny

N_IN, N_OUT = 7, 6


def linear(weights) -> Trained:
    connector = Linear().sized(*weights.shape)
    params = connector.init(jax.random.key(0))
    return Trained(connector, {**params, "W_dec": jnp.array(weights, jnp.float32)})


def random_weights(n_in=N_IN, n_out=N_OUT, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n_in, n_out)) * (generator.random((n_in, n_out)) < 0.5)


@partial(jax.jit, static_argnames=("layer", "capture"))
def whole_pass(lm, tokens, edits, ratios, layer, capture):
    """All of the model, the norms of one layer with their gain times a ratio: what another denominator does."""
    blocks = dict(lm.params["blocks"])
    for name, ratio in ratios.items():
        blocks[name] = {**blocks[name], "scale": blocks[name]["scale"].at[layer].multiply(ratio)}
    lm = dataclasses.replace(lm, params={**lm.params, "blocks": blocks})
    return forward(lm, tokens, capture=capture, edits=edits).captured


def denominator(lm, x):
    x = np.asarray(x, np.float64)
    if "bias" in lm.params["blocks"]["ln_mlp"]:
        x = x - x.mean()
    return np.sqrt(np.mean(x * x) + lm.config.norm_epsilon)


def brute_force(lm, source, target, tokens, position, value, held):
    """(target as it is, live, frozen) `[width]` when `value` stands at the source at one place of `tokens [1, n]`."""
    layer = target.layer
    parallel = getattr(lm.config, "parallel_residual", False)
    mid = "resid_pre" if parallel else "resid_mid"
    names = ("resid_pre", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_out", mid, source.name, target.name)
    capture = tuple(sorted({f"{name}.{layer}" for name in names}))
    clean = whole_pass(lm, tokens, (), {}, layer, capture)
    here = np.zeros(tokens.shape, bool)
    here[0, position] = True
    new = clean[str(source)].at[0, position].set(value.reshape(clean[str(source)].shape[2:]))

    def run(ratios):
        edits = [Edit(source, put, (new,), at(mask=here))]
        edits += [Edit(f"{name}.{layer}", put, (clean[f"{name}.{layer}"],)) for name in held]
        # Another gain changes all places: the others keep what they have.
        edits += [
            Edit(f"{name}.{layer}", put, (clean[f"{name}.{layer}"],), at(mask=~here))
            for name in ("attn_q", "attn_k", "attn_v")
        ]
        return {
            name: np.asarray(v)[0, position]
            for name, v in whole_pass(lm, tokens, edits, ratios, layer, capture).items()
        }

    before = {name: np.asarray(value)[0, position] for name, value in clean.items()}
    ratio = lambda after: denominator(lm, after) / denominator(lm, before[f"{mid}.{layer}"])  # noqa: E731
    ratios = {"ln_attn": np.ones(()), "ln_mlp": np.ones(())}
    live = run(ratios)
    if source.name == "resid_pre":
        ratios["ln_attn"] = denominator(lm, live[str(source)]) / denominator(lm, before[str(source)])
    ratios["ln_mlp"] = ratio(run(ratios)[f"{mid}.{layer}"])
    frozen = run(ratios) if source.name in ("resid_pre", "resid_mid") else live
    return tuple(found[str(target)].reshape(-1) for found in (before, live, frozen))


CASES = [
    ("gpt_neox", "resid_pre.1", "mlp_out.1", ()),
    ("gpt2", "resid_pre.1", "mlp_out.1", ("attn_out",)),
    ("llama", "resid_mid.1", "mlp_hidden.1", ()),
    ("gpt2", "mlp_in.1", "mlp_out.1", ()),
    ("gpt_neox", "resid_pre.1", "attn_out.1", ()),
    ("llama", "resid_pre.1", "attn_out.1", ()),
    ("gpt_neox", "resid_pre.2", "resid_post.2", ()),
    ("gpt2", "resid_post.0", "resid_post.1", ()),
]


@pytest.mark.parametrize(("family", "source", "target", "held"), CASES)
def test_equals_whole_passes(x64, family, source, target, held):
    lm, rows = tiny(family, "float64"), rows_of()
    inputs, targets = located(lm, source, N_IN, 1, "float64"), located(lm, target, N_OUT, 2, "float64")
    pair, weights = pair_of(lm, [inputs], targets, rows), random_weights()
    sample = sample_connections(pair, weights, 14, seed=1)
    check = causal_check(lm, rows, [inputs], targets, pair, linear(weights), weights, sample, block_rows=2, batch=4)
    site = Site.parse(source)
    site = Site("resid_pre", 1) if site.name == "resid_post" else site
    columns = np.asarray(targets.coder.params["W_enc"] / targets.coder.normaliser.scale)
    seen = []
    for n, (token, i, j) in enumerate(zip(*sample)):
        tokens = rows[[int(pair.tokens.row[token])]].tokens
        position = int(pair.tokens.position[token])
        code = pair.inputs.values[token, i]
        assert code > 0
        assert check.change[n] == -code
        x = np.asarray(forward(lm, tokens, capture=[str(site)]).captured[str(site)])[0, position]
        value = x - float(code) * np.asarray(inputs.coder.directions())[i].reshape(x.shape)
        before, live, frozen = brute_force(lm, site, Site.parse(target), tokens, position, value, held)
        for name, after in (("live", live), ("frozen", frozen)):
            np.testing.assert_allclose(getattr(check, name)[n], (after - before) @ columns[:, j], atol=2e-6)
            if check.control[n] >= 0:
                expected = (after - before) @ columns[:, check.control[n]]
                np.testing.assert_allclose(getattr(check, f"control_{name}")[n], expected, atol=2e-6)
        np.testing.assert_allclose(check.predicted[n], -code * weights[i, j], rtol=1e-4, atol=1e-6)
        assert check.document[n] == pair.tokens.document[token]
        assert check.target_active[n] == (pair.targets.values[token, j] > 0)
        seen.append(abs(check.live[n] - check.frozen[n]))
    assert (max(seen) > 1e-3) == (site.name != "mlp_in")
    assert np.abs(check.live).max() > 0.05


def test_inputs_side_by_side_are_added_up():
    """resid_post = resid_pre + attn_out + mlp_out: a part's change is the change."""
    lm, rows = tiny("gpt_neox"), rows_of()
    inputs = [located(lm, f"{name}.1", N_IN, k) for k, name in enumerate(("resid_pre", "attn_out", "mlp_out"))]
    target = located(lm, "resid_post.1", N_OUT, 5)
    pair = pair_of(lm, inputs, target, rows)
    directions = np.concatenate([np.asarray(place.coder.directions()) for place in inputs])
    weights = directions @ np.asarray(target.coder.params["W_enc"] / target.coder.normaliser.scale)
    sample = sample_connections(pair, weights, 300)
    assert len(set(sample.input // N_IN)) == 3
    check = causal_check(lm, rows, inputs, target, pair, linear(weights), weights, sample)
    np.testing.assert_allclose(check.live, check.predicted, atol=1e-5)
    np.testing.assert_array_equal(check.live, check.frozen)
    assert (check.control == -1).all()  # every pair is a connection
    assert np.isnan(check.control_live).all()
    figures, none = causal_figures(check)["frozen", "all"]
    assert none is None
    assert figures.connections == len(sample.token)


def known_module():
    """An MLP behind mlp_in.1 that is linear where it is run: 8 numbers, each target the weighted sum of 3 of them."""
    lm, generator = tiny("gpt_neox"), np.random.default_rng(7)
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, activation="relu"))
    mlp = jax.tree.map(lambda leaf: np.array(leaf), lm.params["blocks"]["mlp"])
    weights = np.zeros((WIDTH, WIDTH), np.float32)
    for j in range(WIDTH):
        weights[generator.permutation(WIDTH)[:3], j] = generator.normal(size=3) + np.array([2, -2, 2])
    mlp["up"]["kernel"][1] = np.concatenate([np.eye(WIDTH), np.zeros((WIDTH, WIDTH))], axis=1)
    mlp["up"]["bias"][1] = 30  # far from the kink
    mlp["down"]["kernel"][1] = np.concatenate([weights, generator.normal(size=(WIDTH, WIDTH))])
    blocks = {**lm.params["blocks"], "mlp": jax.tree.map(jnp.array, mlp)}
    return dataclasses.replace(lm, params={**lm.params, "blocks": blocks}), weights


def test_weights_that_are_causal():
    lm, weights = known_module()
    rows, inputs, target = rows_of(), Located("mlp_in.1", None), Located("mlp_out.1", None)
    pair = pair_of(lm, [inputs], target, rows)
    sample = sample_connections(pair, weights, 400)
    scale = np.linspace(0.5, 2, WIDTH)
    check = causal_check(
        lm, rows, [inputs], target, pair, linear(weights), weights, sample, target_scale=scale, batch=64
    )
    np.testing.assert_allclose(check.live, check.predicted, atol=2e-4)
    np.testing.assert_allclose(check.target_scale, scale[sample.target], rtol=1e-6)
    assert (check.control >= 0).all()
    np.testing.assert_allclose(check.control_live, 0, atol=2e-4)
    found, control = causal_figures(check)["live", "all"]
    assert found.connections == len(sample.token)
    assert found.documents == len(np.unique(check.document))
    for interval in found[2:]:  # correlation, slope, sign, size
        np.testing.assert_allclose(interval, 1, atol=1e-3)
    assert abs(control.slope.value) < 1e-3
    assert control.size.high < 1e-3
    # Weights that are twice too large, or of the wrong sign, are seen.
    twice, _ = causal_figures(dataclasses.replace(check, predicted=-2 * check.predicted))["live", "all"]
    np.testing.assert_allclose(twice[2:5], [[-1] * 3, [-0.5] * 3, [0] * 3], atol=1e-3)
    active, _ = causal_figures(check)["live", "active"]
    assert active.connections == check.target_active.sum() < len(sample.token)


def test_inputs_at_their_maximum():
    """Neurons in mid-MLP: an input is raised to the largest code it has anywhere, also where it is silent."""
    lm, rows = tiny("gpt_neox"), rows_of()
    inputs, target = located(lm, "resid_pre.1", N_IN, 1), Located("mlp_hidden.1", None)
    pair = pair_of(lm, [inputs], target, rows)
    weights = random_weights(N_IN, 16)
    top = maximum_codes(pair.inputs)
    np.testing.assert_array_equal(top, pair.inputs.values.max(axis=0))
    silent = np.argwhere(pair.inputs.values[:, 2] == 0)[0, 0]
    sample = sample_connections(pair, weights, 20)
    sample = Sample(*(np.append(old, new) for old, new in zip(sample, (silent, 2, 3))))
    check = causal_check(lm, rows, [inputs], target, pair, linear(weights), weights, sample, set_to=top)
    assert check.change[-1] == top[2] > 0
    assert (check.change >= 0).all()
    np.testing.assert_allclose(check.predicted, check.change * weights[sample.input, sample.target], atol=1e-5)
    for n in (0, 7, 20):
        token, i, j = (int(part[n]) for part in sample)
        row, position = int(pair.tokens.row[token]), int(pair.tokens.position[token])
        tokens = rows[[row]].tokens
        clean = forward(lm, tokens, capture=["resid_pre.1", "mlp_hidden.1"]).captured
        added = (top[i] - pair.inputs.values[token, i]) * inputs.coder.directions()[i]
        raised = clean["resid_pre.1"].at[0, position].add(added)
        after = forward(lm, tokens, capture=["mlp_hidden.1"], edits=[Edit("resid_pre.1", put, (raised,))]).captured
        expected = (after["mlp_hidden.1"] - clean["mlp_hidden.1"])[0, position, j]
        np.testing.assert_allclose(check.live[n], expected, atol=1e-5)


@partial(jax.tree_util.register_dataclass, data_fields=["W"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Bent:
    """Predicts relu(c W - 0.3)."""

    W: jax.Array

    def predict(self, x):
        return jax.nn.relu(dense(x, self.W.shape[0]) @ self.W - 0.3)


def test_other_connectors_predict_by_themselves():
    lm, rows = tiny("gpt_neox"), rows_of()
    inputs, target = located(lm, "resid_pre.1", N_IN, 1), located(lm, "mlp_out.1", N_OUT, 2)
    pair, weights = pair_of(lm, [inputs], target, rows), random_weights()
    sample = sample_connections(pair, weights, 50)
    check = causal_check(lm, rows, [inputs], target, pair, Bent(jnp.array(weights, jnp.float32)), weights, sample)
    full = pair.inputs.values[sample.token]
    less = full.copy()
    less[np.arange(len(full)), sample.input] = 0
    bent = lambda codes: np.maximum(codes @ weights - 0.3, 0)[np.arange(len(full)), sample.target]  # noqa: E731
    np.testing.assert_allclose(check.predicted, bent(less) - bent(full), atol=1e-5)
    assert len(np.unique(check.predicted != 0)) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_norms_live_and_frozen_by_hand(family):
    lm, rows = tiny(family), rows_of()
    tokens = rows[np.arange(2)].tokens
    part = between(lm.config, ["resid_pre.1"], "mlp_in.1")
    assert (part.part, str(part.source)) == ("mlp", "resid_mid.1")
    clean = clean_pass(lm, part, tokens)
    change = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    where = np.array([0, 1, 1], np.int32), np.array([3, 0, 11], np.int32)
    live, frozen = changes(lm, part, clean, *where, jnp.array(change))
    x = np.asarray(clean.x)[where].astype(np.float64)
    scale = np.asarray(lm.params["blocks"]["ln_mlp"]["scale"][1])

    def normed(value, like):
        mean = lambda a: a.mean(axis=1, keepdims=True) if family == "gpt2" else 0 * a[:, :1]  # noqa: E731
        spread = np.sqrt(np.mean((like - mean(like)) ** 2, axis=1, keepdims=True) + 1e-5)
        return scale * (value - mean(value)) / spread

    np.testing.assert_allclose(live, normed(x + change, x + change) - normed(x, x), atol=1e-4)
    np.testing.assert_allclose(frozen, normed(x + change, x) - normed(x, x), atol=1e-4)


def test_agreement_equals_numpy():
    generator = np.random.default_rng(0)
    document = generator.integers(0, 40, 500)
    predicted = generator.normal(size=500) + 0.5
    measured = 0.7 * predicted + generator.normal(size=500) + 0.1 * generator.normal(size=40)[document]
    found = agreement(predicted, measured, document)
    assert (found.connections, found.documents) == (500, 40)
    assert found.correlation.value == pytest.approx(np.corrcoef(predicted, measured)[0, 1])
    assert found.slope.value == pytest.approx(np.polyfit(predicted, measured, 1)[0])
    assert found.same_sign.value == pytest.approx(np.mean(predicted * measured > 0))
    assert found.size.value == pytest.approx(np.sqrt(np.mean(measured**2) / np.mean(predicted**2)))
    for interval in found[2:]:
        assert interval.low < interval.value < interval.high
    # About as wide as a normal approximation says.
    error = np.sqrt(np.var(measured - 0.7 * predicted) / 500 / np.var(predicted))
    assert found.slope.high - found.slope.low == pytest.approx(2 * 1.96 * error, rel=0.35)
    assert np.isnan(agreement(predicted, measured, np.zeros(500, int)).slope.low)
    # Copies of the same document add no certainty.
    twice = agreement(*(np.tile(part, 4) for part in (predicted, measured, document)))
    assert twice.slope.high - twice.slope.low == pytest.approx(found.slope.high - found.slope.low, rel=1e-6)


def test_compiled_once():
    lm, rows = tiny("gpt_neox"), rows_of()
    inputs, target = located(lm, "resid_pre.1", N_IN, 1), located(lm, "mlp_out.1", N_OUT, 2)
    pair = pair_of(lm, [inputs], target, rows)
    weights = random_weights()
    causal_check(lm, rows, [inputs], target, pair, linear(weights), weights, sample_connections(pair, weights, 30))
    before = _measured._cache_size()
    weights = random_weights(seed=5)
    causal_check(lm, rows, [inputs], target, pair, linear(weights), weights, sample_connections(pair, weights, 41))
    assert _measured._cache_size() == before


def test_errors():
    lm, rows = tiny("gpt2"), rows_of()
    for inputs, target in (
        (["resid_pre.0"], "mlp_out.1"),
        (["mlp_out.1"], "attn_out.1"),
        (["resid_mid.1"], "resid_post.1"),
        (["resid_pre.1", "mlp_out.1"], "mlp_out.1"),
        (["resid_pre.1", "resid_pre.1"], "resid_post.1"),
        ([], "mlp_out.1"),
    ):
        with pytest.raises(InputError, match="from "):
            between(lm.config, inputs, target)
    inputs, target = located(lm, "resid_mid.1", N_IN, 1), located(lm, "mlp_out.1", N_OUT, 2)
    pair, weights = pair_of(lm, [inputs], target, rows), random_weights()
    sample = sample_connections(pair, weights, 5)

    def run(inputs=inputs, target=target):
        return causal_check(lm, rows, [inputs], target, pair, linear(weights), weights, sample)

    with pytest.raises(InputError, match="has 8 numbers, site mlp_hidden"):
        run(target=Located("mlp_hidden.1", target.coder))
    with pytest.raises(InputError, match="pair of 7 inputs"):
        run(inputs=located(lm, "resid_mid.1", N_IN + 1, 1))
    with pytest.raises(InputError, match="pair of 6 targets"):
        run(target=located(lm, "mlp_out.1", N_OUT + 1, 1))
    iterative = dataclasses.replace(target.coder, dictionary=Fista(n_features=N_OUT).sized(WIDTH))
    with pytest.raises(InputError, match="no pre-activations"):
        run(target=Located("mlp_out.1", iterative))
