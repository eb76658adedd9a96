"""What is measured of a pair: against plain NumPy over tokens, and known answers for the counts and the fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.connectors.connection_counts import connection_counts
from sparse_jax.connectors.jacobian_curves import jacobian_figures
from sparse_jax.connectors.scalar_functions import ScalarFunctions, fits, scalar_functions
from sparse_jax.dictionaries import L1, Normalised, TopK
from sparse_jax.errors import InputError
from sparse_jax.lm import LanguageModel, random_model
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.model import forward

CONFIG = GPTNeoXConfig(n_layers=2, d_model=8, d_mlp=12, n_heads=2, vocab_size=16, max_positions=8)
CONTEXT, K, N_IN, N_OUT = 6, 3, 14, 10


def model():
    shapes = jax.eval_shape(lambda key: random_model(CONFIG, key).params, jax.random.key(0))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.array(0.5 * generator.normal(size=a.shape), jnp.float32), shapes)
    return LanguageModel(params, CONFIG)


class PlainRows:
    """Text as `Rows` gives it; -1 is an empty row. The first position of each row is masked."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __getitem__(self, numbers):
        at = np.maximum(numbers, 0)[:, None] * CONTEXT + np.arange(CONTEXT)
        on = (np.asarray(numbers) >= 0)[:, None] & np.ones(CONTEXT, bool)
        tokens, targets = np.where(on, self.tokens[at], 0), np.where(on, self.tokens[at + 1], -1)
        return tokens, targets, on & (np.arange(CONTEXT) > 0), np.zeros_like(tokens)


def coders(seed=3):
    generator = np.random.default_rng(seed)
    made = []
    for n in (N_IN, N_OUT):
        dictionary = TopK(n_features=n, k=K).sized(8)
        shapes = jax.eval_shape(dictionary.init, jax.random.key(0))
        params = {name: jnp.array(generator.normal(size=s.shape), jnp.float32) for name, s in shapes.items()}
        made.append(Normalised(dictionary, params, Normaliser(jnp.full(8, 0.1), jnp.array(1.7))))
    return tuple(made)


def by_autodiff(lm, pair, rows, numbers):
    """x, y, codes of counted tokens, |J| `[n_out, n_in]` of active features by autodiff of the model's own MLP."""
    tokens, _, mask, _ = rows[numbers]
    found = forward(lm, tokens, capture=["mlp_in.1", "mlp_out.1"]).captured
    x, y = (np.asarray(found[name]).reshape(-1, 8)[mask.reshape(-1)] for name in ("mlp_in.1", "mlp_out.1"))
    into, out = pair
    codes, outputs = np.asarray(into.encode(jnp.array(x))), np.asarray(out.encode(jnp.array(y)))
    mlp = jax.tree.map(lambda a: a[1], lm.params["blocks"]["mlp"])

    def function(c):
        hidden = jax.nn.gelu(into.decode(c[None])[0] @ mlp["up"]["kernel"] + mlp["up"]["bias"], approximate=False)
        y = hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]
        return out.dictionary.preactivations(out.params, out.normaliser.apply(y)[None])[0]

    J = np.asarray(jax.jit(jax.vmap(jax.jacobian(function)))(jnp.array(codes)), np.float64)
    return x, y, codes, outputs, np.abs(J) * (outputs > 0)[:, :, None] * (codes > 0)[:, None, :]


def test_the_figures_are_those_of_every_token_by_autodiff():
    lm, pair, rows, numbers = model(), coders(), PlainRows(text_tokens()), np.arange(11)
    figures = jacobian_figures(lm, 1, pair, rows, numbers)
    x, y, codes, outputs, J = by_autodiff(lm, pair, rows, numbers)
    assert figures.tokens == len(x) == 55
    assert figures.counts.sum() == 55 * K * K
    norms = np.sqrt((J**2).sum((1, 2)))
    np.testing.assert_allclose(figures.mean_norm, norms.mean(), rtol=1e-4)
    np.testing.assert_allclose(figures.mean_absolute, J.sum() / (55 * K * K), rtol=1e-4)
    some = norms > 0
    due = np.sum(J.sum((1, 2))[some] / norms[some]) / (K * 55)
    np.testing.assert_allclose(figures.concentration, due, rtol=1e-4)
    entries = J[J > 0]
    for threshold in (0.05, 0.3, 1.0):
        for relative in (False, True):
            limit = threshold * (norms.mean() if relative else 1)
            share = figures.share_above(threshold, relative)
            assert (entries > limit * 1.07).sum() - 1e-6 <= share * 55 * K * K <= (entries > limit / 1.07).sum() + 1e-6
    fired = (outputs > 0).sum(0)
    np.testing.assert_array_equal(figures.fired_out, fired)
    np.testing.assert_array_equal(figures.fired_in, (codes > 0).sum(0))
    np.testing.assert_allclose(figures.mean_slopes, J.sum(0) / np.maximum(fired, 1)[:, None], rtol=1e-4, atol=1e-6)
    for found, coder, value in ((figures.fvu_in, pair[0], x), (figures.fvu_out, pair[1], y)):
        error = value - np.asarray(coder.reconstruct(jnp.array(value)))
        np.testing.assert_allclose(found, (error**2).sum() / ((value - value.mean(0)) ** 2).sum(), rtol=1e-4)
    assert_losses(figures, lm, pair, rows, numbers)


def assert_losses(figures, lm, pair, rows, numbers):
    """CE with the input, the output and both replaced, block 1 written out by hand."""
    tokens, targets, mask, _ = rows[numbers]
    found = forward(lm, tokens, capture=["mlp_in.1", "mlp_out.1", "resid_post.1"]).captured
    x, y, after = (found[name] for name in ("mlp_in.1", "mlp_out.1", "resid_post.1"))
    mlp = jax.tree.map(lambda a: a[1], lm.params["blocks"]["mlp"])
    rebuilt = lambda coder, v: jnp.where(mask[..., None], coder.reconstruct(v.reshape(-1, 8)).reshape(v.shape), v)  # noqa: E731

    def run(x):
        hidden = jax.nn.gelu(x @ mlp["up"]["kernel"] + mlp["up"]["bias"], approximate=False)
        return hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]

    def ce(out):
        log_p = jax.nn.log_softmax(forward(lm, after - y + out, start=2).logits)
        chosen = np.take_along_axis(np.asarray(log_p), targets[..., None], -1)[..., 0]
        return -chosen[mask].mean()

    clean = ce(y)
    np.testing.assert_allclose(figures.ce_clean, clean, rtol=1e-5)
    moved = run(rebuilt(pair[0], x))
    for name, out in (("input", moved), ("output", rebuilt(pair[1], y)), ("both", rebuilt(pair[1], moved))):
        assert abs(ce(out) - clean) > 1e-3
        np.testing.assert_allclose(figures.ce_increase[name], ce(out) - clean, atol=2e-5, err_msg=name)


def text_tokens():
    return np.random.default_rng(1).integers(1, 16, 11 * CONTEXT + 1).astype(np.int32)


def test_dictionaries_that_do_not_fit_are_refused():
    lm, (into, out) = model(), coders()
    other = TopK(n_features=10, k=2).sized(8)
    rows, numbers = PlainRows(text_tokens()), np.arange(3)
    with pytest.raises(InputError, match="give equal k"):
        jacobian_figures(lm, 1, (into, Normalised(other, out.params, out.normaliser)), rows, numbers)
    with pytest.raises(InputError, match="mlp_in is l1"):
        jacobian_figures(lm, 1, (Normalised(L1(n_features=9).sized(8), {}, out.normaliser), out), rows, numbers)
    wrong = Normalised(TopK(n_features=9, k=K).sized(7), {}, out.normaliser)
    with pytest.raises(InputError, match="reads 7 numbers"):
        jacobian_figures(lm, 1, (wrong, out), rows, numbers)
    with pytest.raises(InputError, match="no token counts"):
        jacobian_figures(lm, 1, (into, out), rows, np.array([-1]))


def test_a_scalar_function_is_the_models_own():
    lm, pair, rows, numbers = model(), coders(), PlainRows(text_tokens()), np.arange(11)
    found = scalar_functions(lm, 1, pair, rows, numbers, functions=20, where="reconstruction", seed=1)
    _, _, codes, outputs, J = by_autodiff(lm, pair, rows, numbers)
    mlp = jax.tree.map(lambda a: a[1], lm.params["blocks"]["mlp"])
    for number, (i, o) in enumerate(zip(found.inputs, found.outputs)):
        np.testing.assert_allclose(found.codes[number, -1], np.quantile(codes[codes[:, i] > 0, i], 0.99), rtol=1e-4)
        np.testing.assert_allclose(found.size[number], outputs[outputs[:, o] > 0, o].mean(), rtol=1e-4)
        token = np.argmin(np.abs(J[:, o, i] - abs(found.slope[number])))
        np.testing.assert_allclose(J[token, o, i], abs(found.slope[number]), rtol=1e-3, atol=1e-5)
        c = np.repeat(codes[token][None], len(found.codes[number]), 0)
        c[:, i] = found.codes[number]
        x = pair[0].decode(jnp.array(c, jnp.float32))
        hidden = jax.nn.gelu(x @ mlp["up"]["kernel"] + mlp["up"]["bias"], approximate=False)
        y = hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]
        np.testing.assert_allclose(found.curves[number], pair[1].encode(y)[:, o], atol=2e-4)
    assert sum(found.shares().values()) == pytest.approx(1)


def test_fits_of_known_curves():
    t = np.linspace(0, 2, 41)
    curves = {
        "linear": 3 * t - 1,
        "jump": np.where(t > 0.9, 2 * t + 1, 0),
        "jump down": np.where(t < 0.9, 5 - 2 * t, 0),
        "bent": np.sin(3 * t) + 2,
        "constant": np.full_like(t, 1.25),
        "bent behind zeros": np.where(t > 0.5, np.sin(4 * t) + 2, 0),
    }
    y = np.stack(list(curves.values()))
    r2_line, worst_line, r2_jump, worst_jump = fits(np.repeat(t[None], len(y), 0), y)
    np.testing.assert_allclose(r2_line[0], 1)
    np.testing.assert_allclose(r2_jump[:3], 1)
    assert np.isnan(r2_line[4])
    line = np.polyval(np.polyfit(t, y[1], 1), t)
    np.testing.assert_allclose(r2_line[1], 1 - np.sum((y[1] - line) ** 2) / np.sum((y[1] - y[1].mean()) ** 2))
    assert r2_jump[5] < 0.9
    nothing = np.zeros(len(y))
    made = ScalarFunctions(
        nothing, nothing, nothing, np.repeat(t[None], len(y), 0), y, np.ones(len(y)), r2_line, r2_jump, worst_line,
        worst_jump, nothing > 1,
    )  # fmt: skip
    np.testing.assert_array_equal(made.classes(), [1, 2, 2, 3, 0, 3])
    assert made.shares() == {"constant": 1 / 6, "linear": 1 / 6, "jump": 2 / 6, "neither": 2 / 6}
    assert np.isnan(made.shares(made.strong)["linear"])


def test_connections_by_hand():
    table = np.array([[4.0, -3, 2, 1], [0, 0, 0, 0], [0, -5, 0, 0], [1, 1, 1, 1]])
    found = connection_counts(table, threshold=0.5, share=0.9)
    np.testing.assert_array_equal(found.above, [2, 0, 1, 4])  # over half of the largest
    np.testing.assert_array_equal(found.holding, [3, 0, 1, 4])  # 4 + 3 + 2 of 10 hold 0.9
    np.testing.assert_array_equal(found.alive, [True, False, True, True])
    assert found.medians() == {"above": 2, "holding": 3}
    found = connection_counts(table, threshold=1.5, relative=False, share=0.5, input_norms=np.array([1, 1, 1, 5.0]))
    np.testing.assert_array_equal(found.above, [4, 0, 1, 1])  # sizes 4 3 2 5
    np.testing.assert_array_equal(found.holding, [2, 0, 1, 1])
    assert np.isnan(connection_counts(table, alive=np.zeros(4)).medians()["above"])
    for wrong, message in (({"share": 0.0}, "share 0.0"), ({"input_norms": np.ones(3)}, "3 input norms for 4")):
        with pytest.raises(InputError, match=message):
            connection_counts(table, **wrong)
