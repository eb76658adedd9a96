"""QK and OV maps: sums over features, errors and biases are the model's own logits and outputs; the largest entries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.connectors.attention_heads import heads_of, norm_scale, read_by, turned, written_by
from sparse_jax.connectors.attention_maps import logit_parts, output_parts, ov_map, parts, qk_map, top_ov, top_qk
from sparse_jax.dictionaries import DICTIONARIES, Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm import LanguageModel, forward, load, random_model
from sparse_jax.lm.families.gpt2 import GPT2Config
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.families.llama import LlamaConfig
from sparse_jax.lm.rotary import Rotary
from sparse_jax.numerics.sparse_codes import SparseCodes

D, HEADS, CONTEXT, VOCAB, FEATURES, SLOTS = 16, 4, 9, 30, 40, 6
SIZES = {"n_layers": 2, "d_model": D, "d_mlp": 24, "n_heads": HEADS, "vocab_size": VOCAB, "max_positions": 16}
CONFIGS = {
    "neox, a quarter turned": GPTNeoXConfig(**SIZES | {"d_model": 32}),
    "neox, sequential, no bias": GPTNeoXConfig(
        **SIZES, rotary=Rotary(4), parallel_residual=False, attention_bias=False
    ),
    "gpt2": GPT2Config(**SIZES),
    "gpt2, scaled by layer": GPT2Config(**SIZES, scale_by_layer=True),
    "llama, grouped": LlamaConfig(**SIZES, n_kv_heads=2, head_dim=4),
    "qwen2, biases, window": LlamaConfig(
        **SIZES, n_kv_heads=1, head_dim=6, qkv_bias=True, out_bias=True, windows=(3, 3), model_type="qwen2",
        rotary=Rotary(6, scaling="linear", factor=2.0),
    ),
}  # fmt: skip


def drawn(config, dtype="float32"):
    """A model of which every parameter, norms and biases included, is drawn."""
    lm = random_model(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.array((1.0 if a.ndim == 2 else 0.0) + 0.4 * rng.normal(size=a.shape), dtype), lm.params
    )
    return LanguageModel(params, config, dtype, "drawn")


def place_codes(rng, rows, n, dtype):
    """Codes that have nothing to do with the activations: the error term must take the rest."""
    indices = np.stack([rng.permutation(n)[:SLOTS] for _ in range(rows)]).astype(np.int32)
    values = rng.exponential(size=(rows, SLOTS)) * (rng.random((rows, SLOTS)) < 0.8)
    return SparseCodes(jnp.array(values, dtype), jnp.array(indices))


def summed(lm, layer, x, codes, directions, offset, readers):
    """(logits, pattern, sums x readers of attn_out) of one row `x [position, d]`, from features alone."""
    heads, n = heads_of(lm, layer), len(x)
    i, j = (a.reshape(-1) for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    logits, out = [], heads.b_o @ readers
    for head in range(heads.n_heads):
        q, k, v = (parts(heads, name, head, codes, directions, offset, x) for name in "qkv")
        table = logit_parts(heads, q[i], k[j], jnp.array(i - j, jnp.int32))
        logit = np.asarray(table.sum((1, 2))).reshape(n, n)
        seen = np.tri(n, dtype=bool)
        if heads.window is not None:
            seen &= np.subtract.outer(np.arange(n), np.arange(n)) < heads.window
        weights = np.where(seen, np.exp(logit - logit.max(1, keepdims=True)), 0)
        weights /= weights.sum(1, keepdims=True)
        logits.append((logit, weights))
        out = out + jnp.einsum("ij,jpt->it", jnp.array(weights), output_parts(heads, head, v, readers))
    return logits, out


@pytest.mark.parametrize("name", CONFIGS)
def test_features_errors_and_biases_sum_to_the_models_attention(name, x64):
    config = CONFIGS[name]
    lm, d = drawn(config, "float64"), config.d_model
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (1, CONTEXT)).astype(np.int32)
    sites = [f"{site}.1" for site in ("resid_pre", "attn_q", "attn_k", "attn_pattern", "attn_out")]
    got = {site[:-2]: value[0] for site, value in forward(lm, tokens, capture=sites).captured.items()}
    directions, offset = (jnp.array(rng.normal(size=shape)) for shape in ((FEATURES, d), (d,)))
    readers = jnp.array(rng.normal(size=(d, 7)))
    codes = place_codes(rng, CONTEXT, FEATURES, jnp.float64)
    logits, out = summed(lm, 1, got["resid_pre"], codes, directions, offset, readers)
    np.testing.assert_allclose(out, got["attn_out"] @ readers, rtol=1e-9, atol=1e-9)
    q, k = (turned_by_hand(config, np.asarray(got[site])) for site in ("attn_q", "attn_k"))
    for head, (logit, pattern) in enumerate(logits):
        np.testing.assert_allclose(pattern, got["attn_pattern"][head], rtol=1e-8, atol=1e-10)
        scale = config.head_dim**-0.5 / (2 if getattr(config, "scale_by_layer", False) else 1)
        own = scale * q[:, head] @ k[:, head // (HEADS // config.n_kv_heads)].T
        np.testing.assert_allclose(logit, own, rtol=1e-8, atol=1e-9)


def turned_by_hand(config, x):
    """Rotary embedding of `[position, head, head_dim]` in complex numbers."""
    rotary = getattr(config, "rotary", None)
    if rotary is None:
        return x
    half = rotary.dim // 2
    angle = rotary.base ** (-np.arange(half) / half) / rotary.factor
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * np.arange(len(x))[:, None, None] * angle)
    return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)


def coder_of(kind, d, seed, **fields):
    dictionary = DICTIONARIES[kind](n_features=FEATURES, **fields).sized(d)
    params = dictionary.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = {
        name: value + jnp.array(0.1 * rng.normal(size=value.shape), jnp.float32) for name, value in params.items()
    }
    centre = jnp.array(rng.normal(size=d), jnp.float32)
    return Normalised(dictionary, params, Normaliser(centre, jnp.array(1.7, jnp.float32)))


def test_the_embedded_model_in_float32():
    lm = load("novel-neox")
    layer, d = 3, lm.config.d_model
    tokens = np.random.default_rng(2).integers(0, lm.config.vocab_size, (1, 12)).astype(np.int32)
    sites = [f"{site}.{layer}" for site in ("resid_pre", "attn_pattern", "attn_out")]
    x, pattern, attn_out = (forward(lm, tokens, capture=sites).captured[site][0] for site in sites)
    before, after = coder_of("topk", d, 0, k=SLOTS), coder_of("topk", d, 1, k=SLOTS)
    values, indices = jax.lax.top_k(before.encode(x), SLOTS)
    readers, bias = read_by(after)
    logits, out = summed(lm, layer, x, SparseCodes(values, indices), *written_by(before), readers)
    for head, (_, weights) in enumerate(logits):
        np.testing.assert_allclose(weights, pattern[head], atol=2e-5)
    expected = after.dictionary.preactivations(after.params, after.normaliser.apply(attn_out))
    np.testing.assert_allclose(out + bias, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "fields"), [
    ("topk", {"k": 5}), ("batch-topk", {"k": 5}), ("l1", {}), ("l1", {"tied": True}), ("jump-relu", {}), ("gated", {}),
])  # fmt: skip
def test_what_a_dictionary_reads_and_writes(kind, fields):
    coder = coder_of(kind, D, 3, **fields)
    x = jnp.array(np.random.default_rng(4).normal(size=(50, D)), jnp.float32)
    W, b = read_by(coder)
    codes = np.asarray(coder.encode(x))
    inside = np.asarray(x @ W + b)
    if kind == "gated":
        assert (inside[codes > 0] > 0).all()
    else:
        np.testing.assert_allclose(inside[codes > 0], codes[codes > 0], rtol=1e-3, atol=1e-4)
    assert (codes > 0).sum() > 50
    directions, offset = written_by(coder)
    np.testing.assert_allclose(codes @ np.asarray(directions) + offset, coder.decode(codes), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_read():
    coder = coder_of("fista", D, 0)
    with pytest.raises(InputError, match="fista"):
        read_by(coder)


@pytest.mark.parametrize("limit", [1 << 20, 4 * 2 * FEATURES * 3])
def test_maps_and_their_largest_entries(limit):
    lm = drawn(CONFIGS["neox, sequential, no bias"])
    heads, rng = heads_of(lm, 1), np.random.default_rng(5)
    a, b = (jnp.array(rng.normal(size=(n, D)), jnp.float32) for n in (FEATURES, FEATURES - 2))
    wa, wb = (jnp.array(rng.random(n), jnp.float32) for n in (FEATURES, FEATURES - 2))
    # The map at a distance is what `logit_parts` gives between places so far apart.
    q, k = a @ heads.W_q[2], b @ heads.W_k[2]
    turn = np.asarray(turned(heads, q, jnp.int32(3))) @ np.asarray(k).T * 4**-0.5
    np.testing.assert_allclose(qk_map(heads, 2, 3, a, b, 0.5), 0.5 * turn, rtol=1e-4, atol=1e-5)
    assert np.abs(turn - np.asarray(qk_map(heads, 2, 0, a, b))).max() > 0.1, "the distance must matter"
    ov = np.asarray(a) @ np.asarray(heads.W_v[2] @ heads.W_o[2]) @ np.asarray(b).T
    np.testing.assert_allclose(ov_map(heads, 2, a, b.T), ov, rtol=1e-3, atol=1e-4)
    qk = np.asarray(qk_map(heads, 2, 3, a, b))
    for full, found in (
        (qk * np.outer(wa, wb), top_qk(heads, 2, 3, a, b, 25, query_weight=wa, key_weight=wb, limit_bytes=limit)),
        (ov, top_ov(heads, 2, a, b.T, 25, limit_bytes=limit)),
    ):
        order = np.argsort(-np.abs(full), axis=None)[:25]
        np.testing.assert_array_equal(found.rows * full.shape[1] + found.columns, order)
        np.testing.assert_allclose(found.values, full.reshape(-1)[order], rtol=1e-4, atol=1e-5)
    every = top_ov(heads, 2, a[:3], b[:2].T, 25, limit_bytes=limit)
    assert len(every.values) == 6
    assert len({*zip(every.rows.tolist(), every.columns.tolist())}) == 6


def test_the_scale_of_the_norm():
    x = np.random.default_rng(6).normal(size=(5, D)).astype(np.float32)
    heads = heads_of(drawn(CONFIGS["gpt2"]), 0)
    np.testing.assert_allclose(norm_scale(heads, jnp.array(x)), (x.var(1) + 1e-5) ** -0.5, rtol=1e-5)
    heads = heads_of(drawn(CONFIGS["llama, grouped"]), 0)
    np.testing.assert_allclose(norm_scale(heads, jnp.array(x)), ((x**2).mean(1) + 1e-6) ** -0.5, rtol=1e-5)


def test_what_is_refused():
    heads = heads_of(drawn(CONFIGS["gpt2"]), 0)
    a = jnp.ones((3, D), jnp.float32)
    with pytest.raises(InputError, match="heads 0 to 3"):
        qk_map(heads, 4, 0, a, a)
    with pytest.raises(InputError, match="layers 0 to 1"):
        heads_of(drawn(CONFIGS["gpt2"]), 2)
    with pytest.raises(InputError, match="limit_bytes"):
        top_qk(heads, 0, 0, a, a, limit_bytes=8)
    with pytest.raises(InputError, match="at least 1"):
        top_qk(heads, 0, 0, a, a, 0)
    qwen = dataclasses.replace(CONFIGS["llama, grouped"], qk_norm=True, model_type="qwen3")
    heads = heads_of(drawn(qwen), 0)
    with pytest.raises(InputError, match="Qwen3"):
        qk_map(heads, 0, 0, a, a)
    assert ov_map(heads, 0, a, a.T).shape == (3, 3)
