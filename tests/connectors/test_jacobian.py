"""The closed-form Jacobian between active features against autodiff's, for every kind of MLP, and its L1's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.connectors import jacobian as module
from sparse_jax.connectors.folded_mlp import FoldedMlp, folded_mlp, from_params
from sparse_jax.connectors.jacobian import Active, active, jacobian, jacobian_l1, tables
from sparse_jax.errors import InputError
from sparse_jax.lm import random_model
from sparse_jax.lm.families.gpt2 import GPT2Config
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.families.llama import LlamaConfig
from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.numerics.sparse_codes import top_k_codes

D, D_MLP, N_IN, N_OUT, K = 6, 10, 16, 12, 4
SIZES = {"n_layers": 2, "d_model": D, "d_mlp": D_MLP, "n_heads": 2, "vocab_size": 20, "max_positions": 16}
MODELS = {
    "neox, exact gelu": GPTNeoXConfig(**SIZES),
    "neox, sequential": GPTNeoXConfig(**SIZES, parallel_residual=False, activation="relu"),
    "gpt2, gelu by tanh": GPT2Config(**SIZES),
    "llama, gated": LlamaConfig(**SIZES, n_kv_heads=1, head_dim=4),
    "llama, gated with biases": LlamaConfig(**SIZES, n_kv_heads=1, head_dim=4, mlp_bias=True, activation="gelu"),
}


def normaliser(seed):
    generator = np.random.default_rng(seed)
    return Normaliser(jnp.array(generator.normal(size=D)), jnp.array(1.0 + generator.random()))


def made(name, dtype=np.float64):
    """A model with weights (biases too) large enough for its nonlinearities to bend; nothing is compiled for it."""
    shapes = jax.eval_shape(lambda key: random_model(MODELS[name], key).params, jax.random.key(0))
    generator = np.random.default_rng(5)
    params = jax.tree.map(lambda a: jnp.array(0.7 * generator.normal(size=a.shape), dtype), shapes)
    return LanguageModel(params, MODELS[name], np.dtype(dtype).name)


@pytest.fixture(params=sorted(MODELS))
def lm(request, x64):
    return made(request.param)


def random_case(rows=5, seed=0):
    """Decoder and encoder, and codes of both sides: some rows have fewer than k active."""
    generator = np.random.default_rng(seed)
    W_dec, W_enc = jnp.array(generator.normal(size=(N_IN, D))), jnp.array(generator.normal(size=(D, N_OUT)))
    z = [jax.nn.relu(jnp.array(generator.normal(size=(rows, n)) - 0.6)) for n in (N_IN, N_OUT)]
    return W_dec, W_enc, *(top_k_codes(values, K) for values in z)


def test_the_folded_mlp_is_the_models_own_between_the_normalisers(lm):
    into, out = normaliser(1), normaliser(2)
    found = forward(lm, np.arange(15).reshape(3, 5) % 20, capture=["mlp_in.1", "mlp_out.1"]).captured
    x, y = (found[name].reshape(-1, D) for name in ("mlp_in.1", "mlp_out.1"))
    mlp = folded_mlp(lm, 1, into, out)
    np.testing.assert_allclose(out.undo(mlp(into.apply(x))), y, atol=1e-12)
    again = from_params(mlp.params(), mlp.activation)
    np.testing.assert_array_equal(again(x), mlp(x))


def test_the_jacobian_is_autodiffs(lm):
    mlp = folded_mlp(lm, 0, normaliser(1), normaliser(2))
    W_dec, W_enc, inputs, outputs = random_case()
    b_dec = np.arange(D) / 7.0
    codes = np.zeros((5, N_IN))
    np.add.at(codes, (np.arange(5)[:, None], np.asarray(inputs.indices)), np.asarray(inputs.values))
    x_hat = jnp.array(codes @ np.asarray(W_dec) + b_dec)
    ours = jax.jit(jacobian)(tables(W_dec, W_enc, mlp), mlp.slopes(x_hat), active(inputs, outputs))
    # From codes to the encoder's pre-activations; TopK passes those of active features on as they are.
    whole = jax.vmap(jax.jacobian(lambda c: mlp((c @ W_dec + b_dec)[None])[0] @ W_enc))(jnp.array(codes))
    assert ours.shape == (5, K, K)
    empty = 0
    for row in range(5):
        for i in range(K):
            for o in range(K):
                on = inputs.values[row, i] > 0 and outputs.values[row, o] > 0
                due = whole[row, outputs.indices[row, o], inputs.indices[row, i]] if on else 0
                empty += not on
                np.testing.assert_allclose(ours[row, o, i], due, atol=1e-10)
    assert 0 < empty < 5 * K * K


def test_slopes_by_hand():
    """relu of (2 x0 - 1, -x0) at x0 = 1 passes the first unit only; the gated form multiplies by the other branch."""
    W = jnp.array([[[2.0, -1.0]]])
    mlp = FoldedMlp(W, jnp.array([[-1.0, 0.0]]), jnp.array([[3.0], [5.0]]), jnp.array([7.0]), "relu")
    np.testing.assert_allclose(mlp(jnp.array([[1.0]])), [[3 * 1 + 7]])
    np.testing.assert_allclose(mlp.slopes(jnp.array([[1.0]])), [[[1, 0]]])
    here = Active(*(jnp.zeros((1, 1), jnp.int32),) * 2, *(jnp.ones((1, 1), bool),) * 2)
    shared = tables(jnp.array([[0.5]]), jnp.array([[4.0]]), mlp)
    # 0.5 x 2 into the first unit, 3 out of it, 4 into the code.
    np.testing.assert_allclose(jacobian(shared, mlp.slopes(jnp.array([[1.0]])), here), [[[12]]])
    gated = FoldedMlp(jnp.concatenate([W, W + 1], 1), jnp.array([[-1.0, 0.0], [0.0, 0.0]]), *mlp_out(), "relu")
    np.testing.assert_allclose(gated.slopes(jnp.array([[1.0]])), [[[3, 0], [1, 0]]])


def mlp_out():
    return jnp.array([[3.0], [5.0]]), jnp.array([7.0])


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_the_gradient_of_the_l1_is_that_of_finite_differences(x64, branches, rows_at_once, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    generator = np.random.default_rng(3)
    _, _, inputs, outputs = random_case(rows=6)
    here, weight = active(inputs, outputs), jnp.array([1.0, 0, 1, 2, 1, 1])
    P, Q, slopes = (generator.normal(size=shape) for shape in ((N_IN, branches * 3), (N_OUT, 3), (6, branches, 3)))
    value = jax.jit(lambda P, Q, slopes: 3 * jacobian_l1(module.Tables(P, Q), slopes, here, weight))
    grads = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(P, Q, slopes)
    by_hand = 3 * np.sum(
        np.asarray(weight)
        * np.abs(np.asarray(jacobian(module.Tables(jnp.array(P), jnp.array(Q)), jnp.array(slopes), here))).sum((1, 2))
    )
    np.testing.assert_allclose(value(P, Q, slopes), by_hand, rtol=1e-12)
    for number, grad in enumerate(grads):
        for index in np.ndindex(*grad.shape):
            ends = []
            for sign in (1, -1):
                moved = [np.array(a) for a in (P, Q, slopes)]
                moved[number][index] += sign * 1e-6
                ends.append(float(value(*moved)))
            np.testing.assert_allclose(grad[index], (ends[0] - ends[1]) / 2e-6, atol=1e-6)


def test_an_mlp_of_another_make_is_refused():
    lm = made("gpt2, gelu by tanh", np.float32)
    odd = {**lm.params, "blocks": {**lm.params["blocks"], "mlp": {"experts": {}}}}
    with pytest.raises(InputError, match="hold experts: a Jacobian in closed form"):
        folded_mlp(type(lm)(odd, lm.config), 0, normaliser(1), normaliser(2))
    with pytest.raises(InputError, match="layers 0 to 1"):
        folded_mlp(lm, 2, normaliser(1), normaliser(2))
