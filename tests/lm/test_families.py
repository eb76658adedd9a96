"""What the families say about themselves: configs, sites, widths, windows; gradients through ranges of layers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sparse_jax.errors import InputError
from sparse_jax.lm import SITES, Edit, add, check_site, forward, random_model, reconstruct, site_shape, site_width
from sparse_jax.lm.families import gpt2, llama
from sparse_jax.lm.families.llama import NO_WINDOW, LlamaConfig
from sparse_jax.lm.family import FAMILIES, family_of, of_layer
from sparse_jax.lm.model import _forward_traced
from sparse_jax.lm.rotary import Rotary

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100}


# Configs


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    """Left out or written out in transformers' own style (its configs need no torch), a config is the same."""
    from transformers import AutoConfig

    raw = GPT2 if model_type == "gpt2" else LLAMA | {"model_type": model_type, "num_attention_heads": 32}
    raw.pop("num_key_value_heads", None)
    theirs = AutoConfig.for_model(**raw)
    ours = family_of(model_type).read_config(raw)
    assert ours == family_of(model_type).read_config(json.loads(theirs.to_json_string(use_diff=False)))
    assert hash(ours) == hash(dataclasses.replace(ours))
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    if model_type not in ("gpt2", "gpt_neox"):
        assert ours.n_kv_heads == theirs.num_key_value_heads
        assert ours.norm_epsilon == theirs.rms_norm_eps
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)


def test_every_field_of_a_gpt2_config_is_read():
    raw = GPT2 | {
        "n_inner": 77, "n_positions": 55, "layer_norm_epsilon": 1e-3, "activation_function": "relu",
        "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }  # fmt: skip
    assert gpt2.read_config(raw) == gpt2.GPT2Config(3, 64, 77, 4, 100, 55, 1e-3, "relu", False, True, False, 0.1)


def test_every_field_of_a_llama_config_is_read():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    raw = LLAMA | {
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 55, "rms_norm_eps": 1e-3,
        "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "initializer_range": 0.1, "rope_theta": 5e5,
        "rope_scaling": scaling | {"original_max_position_embeddings": 44},
    }  # fmt: skip
    expected = LlamaConfig(
        3, 64, 96, 4, 2, 8, 100, 55, Rotary(8, 5e5, "llama3", 8.0, 1.0, 4.0, 44), (NO_WINDOW,) * 3, 1e-3, "gelu", True,
        True, True, False, True, 0.1,
    )  # fmt: skip
    assert llama.read_config(raw) == expected
    new = {name: value for name, value in raw.items() if not name.startswith("rope")}
    new["rope_parameters"] = raw["rope_scaling"] | {"rope_theta": 5e5}
    assert llama.read_config(new) == expected


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 5}, [NO_WINDOW] * 3),
        ({"model_type": "mistral", "sliding_window": 5}, [5] * 3),
        ({"model_type": "mistral", "sliding_window": None}, [NO_WINDOW] * 3),
        ({"model_type": "mistral"}, [4096] * 3),
        ({"model_type": "qwen2", "sliding_window": 5}, [NO_WINDOW] * 3),  # use_sliding_window is false
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
         [NO_WINDOW, NO_WINDOW, 5]),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, [5] * 3),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, [NO_WINDOW, NO_WINDOW, 4096]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
            [NO_WINDOW] * 3,
        ),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, [5, NO_WINDOW, 5]),
    ],
)  # fmt: skip
def test_windows(change, windows):
    assert llama.read_config(LLAMA | change).windows == tuple(windows)


@pytest.mark.parametrize(
    ("raw", "change", "shown"),
    [
        (
            LLAMA,
            {"hidden_size": None, "vocab_size": None},
            "config.json of a llama model lacks hidden_size, vocab_size",
        ),
        (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of its num_key_value_heads 3"),
        (LLAMA, {"num_attention_heads": 5, "num_key_value_heads": 5}, "width 64 is not a multiple of its 5 heads"),
        (LLAMA, {"hidden_act": "snake"}, "'snake' is not known"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' .* supported are default, linear, llama3"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor"),
        (
            LLAMA,
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
            "layer_types, which that architecture",
        ),
        (LLAMA, {"model_type": "qwen2", "layer_types": ["full_attention"]}, "for each of its 3 layers"),
        (LLAMA, {"model_type": "qwen2", "layer_types": ["linear_attention"] * 3}, "give one of"),
        (LLAMA, {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        (GPT2, {"n_embd": None}, "config.json of a gpt2 model lacks n_embd"),
        (GPT2, {"n_head": 3}, "width 64 is not a multiple of its 3 heads"),
        (GPT2, {"add_cross_attention": True}, "cross_attention is half of an encoder-decoder"),
        (GPT2, {"activation_function": "snake"}, "'snake' is not known"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(raw, change, shown):
    raw = raw | change
    with pytest.raises(InputError, match=shown):
        family_of(raw["model_type"]).read_config(raw)


def test_a_value_of_one_layer_is_a_number_where_it_can_be():
    assert of_layer((4, 4), jnp.int32(1)) == 4
    assert isinstance(of_layer((4, 4), jnp.int32(1)), int)
    assert of_layer((4, 5), 1) == 5
    assert [int(of_layer((4, 5), jnp.int32(i))) for i in (0, 1)] == [4, 5]


# Sites


@pytest.mark.parametrize("name", ["gpt2-hub", "llama", "mistral", "qwen3"])
def test_sequential_families_have_every_site(loaded, name):
    lm = loaded(name)
    sites = [f"{site}.1" for site in SITES]
    captured = forward(lm, TOKENS, capture=sites).captured
    assert set(captured) == set(sites)
    for site in sites:
        check_site(lm.config, site)
        if not site.startswith("attn_pattern"):
            assert captured[site].shape == (*TOKENS.shape, *site_shape(lm.config, site))
            assert site_width(lm.config, site) == captured[site][0, 0].size


def test_shared_heads_have_fewer_keys_and_values(loaded):
    config = loaded("mistral").config
    assert (config.n_heads, config.n_kv_heads) == (4, 2)
    assert site_shape(config, "attn_q.0") == site_shape(config, "attn_z.0") == (4, config.head_dim)
    assert site_shape(config, "attn_k.0") == site_shape(config, "attn_v.0") == (2, config.head_dim)


def test_query_heads_share_keys_in_order(loaded):
    """Query heads 0 and 1 see key-value head 0, heads 2 and 3 see head 1."""
    lm = loaded("mistral")

    def without_key_head(head):
        edit = Edit("attn_k.0", keep_others, (jnp.array(head),))
        return forward(lm, TOKENS, capture=["attn_pattern.0"], edits=[edit]).captured["attn_pattern.0"]

    clean = forward(lm, TOKENS, capture=["attn_pattern.0"]).captured["attn_pattern.0"]
    changed = [np.abs(without_key_head(head) - clean).max((0, 2, 3)) > 1e-3 for head in (0, 1)]
    np.testing.assert_array_equal(changed, [[True, True, False, False], [False, False, True, True]])


def keep_others(value, head):
    return value.at[:, :, head].set(0)


def test_a_window_hides_what_is_further_back():
    """Three layers with a window of 2 carry a change three positions on, no further, also past a block of queries."""
    config = LlamaConfig(3, 16, 24, 2, 1, 8, 29, 300, windows=(2, 2, 2))
    lm = random_model(dataclasses.replace(config, initializer_range=0.5), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 29, (1, 300))
    other = tokens.copy()
    other[0, 127] += 1 if other[0, 127] < 28 else -1
    clean, changed = (np.asarray(forward(lm, t).residual)[0] for t in (tokens, other))
    differs = np.flatnonzero(np.abs(clean - changed).max(-1) > 1e-4)
    np.testing.assert_array_equal(differs, [127, 128, 129, 130])
    pattern = forward(lm, tokens, capture=["attn_pattern.1"]).captured["attn_pattern.1"]
    offsets = np.arange(300)[:, None] - np.arange(300)
    assert (np.asarray(pattern)[:, :, (offsets < 0) | (offsets > 1)] == 0).all()
    assert (np.asarray(pattern)[:, :, (offsets >= 0) & (offsets <= 1)] > 0).all()


def test_windows_by_layer_in_a_loop_are_those_of_single_layers(loaded):
    """In a loop over layers the window is picked while running; where layers are looked into it is a constant."""
    lm = loaded("qwen2-window")
    assert len(set(lm.config.windows)) == 2
    looped = forward(lm, TOKENS).logits
    single = forward(lm, TOKENS, capture=[f"resid_post.{i}" for i in range(lm.config.n_layers)]).logits
    traced = forward(lm, forward(lm, TOKENS, stop=jnp.array(1)).residual, start=jnp.array(1)).logits
    np.testing.assert_allclose(looped, single, atol=1e-5)
    np.testing.assert_allclose(looped, traced, atol=1e-5)


# Ranges


@pytest.mark.parametrize("name", ["gpt2-by-layer", "llama", "qwen2-window", "qwen3"])
def test_all_split_points_are_one_program(loaded, name):
    lm, tokens = loaded(name), TOKENS[:, :6]  # a shape that no other test here has
    whole = np.asarray(forward(lm, tokens).logits)
    before = _forward_traced._cache_size()
    for split in range(lm.config.n_layers + 1):
        lower = forward(lm, tokens, stop=split).residual
        np.testing.assert_allclose(forward(lm, lower, start=jnp.array(split)).logits, whole, atol=1e-4)
    assert _forward_traced._cache_size() == before + 1


class Linear(dict):
    """A dictionary that is linear in both directions, as a pytree."""


jax.tree_util.register_pytree_node(Linear, lambda d: ((d["w"],), None), lambda _, w: Linear(w=w[0]))
Linear.encode = lambda self, x: jnp.tanh(x @ self["w"])
Linear.decode = lambda self, codes, x=None: codes @ self["w"].T


@pytest.mark.parametrize("name", ["parallel", "gpt2-hub", "mistral", "qwen3-bias"])
@pytest.mark.parametrize(("start", "stop"), [(0, None), (1, 2)])
@pytest.mark.slow
def test_gradients_through_any_range_and_edit(loaded, name, start, stop, x64):
    """Against finite differences: of the residual stream, an edit's argument, and a dictionary in the path."""
    lm = loaded(name, "float64")
    d, rng = lm.config.d_model, np.random.default_rng(0)
    residual, direction = jnp.array(rng.normal(size=(1, 4, d))), jnp.array(rng.normal(size=d))
    coder = jnp.array(rng.normal(size=(d, 5)) / d**0.5)

    def loss(residual, direction, coder):
        edits = [
            Edit("attn_out.1", add, (direction, jnp.array(0.7, jnp.float64))),
            Edit("mlp_in.1", reconstruct, (Linear(w=coder),)),
        ]
        out = forward(lm, residual, edits=edits, start=start, stop=stop)
        return jnp.mean(jnp.sin(out.residual if stop else out.logits))

    check_grads(loss, (residual, direction, coder), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)
