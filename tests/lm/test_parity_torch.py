"""The ports against transformers' PyTorch models, live: every site, long rows, and the trained model on real text.

The float32 reference is transformers' own eager model, the float64 one the same made float64 throughout
(`reference/torch_models.py`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.lm import forward, load
from sparse_jax.lm.documents import documents
from sparse_jax.lm.embedded import MODELS as EMBEDDED
from sparse_jax.lm.layers import ACTIVATIONS
from sparse_jax.lm.packing import pack
from sparse_jax.lm.rotary import Rotary, rotary_angles
from sparse_jax.lm.tokenizer import load_tokenizer
from tests.lm.reference.models import MODELS, errors_at, random_tensors, random_tokens, sites, write_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
DTYPES = list(TOLERANCE)


def worst(errors: dict[str, float]) -> float:
    print({site: f"{error:.1e}" for site, error in errors.items()})
    return max(errors.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_site_of_a_saved_model(name, dtype, torch_reference, model_folder, tmp_path):
    """What `save_pretrained` wrote, in transformers 5's own style, is what `load` reads."""
    model = torch_reference.torch_model(model_folder(name), dtype)
    model.save_pretrained(tmp_path / "saved")
    tokens = random_tokens(MODELS[name], seed=7)
    theirs = torch_reference.torch_values(model, tokens)
    with jax.enable_x64(dtype == "float64"):
        lm = load(tmp_path / "saved", dtype=dtype)
        out = forward(lm, tokens, capture=sites(MODELS[name].config))
        assert out.captured.keys() == theirs.keys() - {"logits"}
        assert worst(errors_at(out, theirs)) <= TOLERANCE[dtype]
        if dtype == "float32":  # `test_golden.py` has float64
            assert worst(errors_at(forward(lm, tokens), theirs)) <= TOLERANCE[dtype]


# In files of a few kB each: a model's tensors lie in many.
@pytest.mark.parametrize("name", ["sequential", "gpt2-untied", "gpt2-hub", "llama-biases", "qwen3-bias"])
def test_a_model_saved_in_shards_is_the_same(name, torch_reference, model_folder, tmp_path):
    folder = model_folder(name)
    torch_reference.torch_model(folder, "float32").save_pretrained(tmp_path / "saved", max_shard_size="4KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    whole, sharded = load(folder), load(tmp_path / "saved")
    assert sharded.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, sharded.params, whole.params)


@pytest.fixture(scope="module")
def text():
    """[3, 256] tokens of Austen, from three places."""
    rows = pack(documents("austen"), load_tokenizer(EMBEDDED["novel-neox"]), 256)
    return rows[np.array([0, 1500, 4000])].tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trained_model_on_real_text(dtype, torch_reference, text):
    theirs = torch_reference.torch_values(torch_reference.torch_model(EMBEDDED["novel-neox"], dtype), text)
    some = [site for site in theirs if site.endswith((".0", ".3", ".5"))]
    assert len(some) == 3 * 11
    with jax.enable_x64(dtype == "float64"):
        lm = load("novel-neox", dtype=dtype)
        for captured in (some, []):  # without captures nobody looks at the patterns: attention in blocks
            out = forward(lm, text, capture=captured)
            assert worst(errors_at(out, theirs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_longest_context(dtype, torch_reference, model_folder):
    """2,048 positions: large rotary angles, and attention in many blocks of queries."""
    changes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    folder, tokens = model_folder("parallel", **changes), np.random.default_rng(3).integers(0, 29, (1, 2048))
    theirs = torch_reference.torch_values(torch_reference.torch_model(folder, dtype), tokens)
    with jax.enable_x64(dtype == "float64"):
        all_sites = [site for site in theirs if site != "logits"]
        for captured in (all_sites, [site for site in all_sites if not site.startswith("attn_pattern")]):
            out = forward(load(folder, dtype=dtype), tokens, capture=captured)
            assert worst(errors_at(out, theirs)) <= TOLERANCE[dtype]


# Grouped queries, windows that end inside a block of queries and reach into the one before, learned positions.
LONG = {
    "gpt2-hub": {"n_positions": 300, "n_ctx": 300},
    "llama3-old": {"max_position_embeddings": 300},
    "mistral": {"max_position_embeddings": 300, "sliding_window": 50},
    "mistral-wide": {"max_position_embeddings": 300, "sliding_window": 129},
    "qwen2-window": {"max_position_embeddings": 300, "sliding_window": 50},
    "qwen3-window": {"max_position_embeddings": 300, "sliding_window": 50},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LONG)
def test_contexts_of_several_blocks(name, dtype, torch_reference, model_folder):
    """Whole where the patterns are captured, else in blocks: the layers one by one, and as one loop."""
    folder, tokens = model_folder(name, **LONG[name]), np.random.default_rng(3).integers(0, 29, (1, 300))
    theirs = torch_reference.torch_values(torch_reference.torch_model(folder, dtype), tokens)
    with jax.enable_x64(dtype == "float64"):
        lm = load(folder, dtype=dtype)
        for captured in (sites(MODELS[name].config), ["attn_z.0", "attn_z.1"], []):
            assert worst(errors_at(forward(lm, tokens, capture=captured), theirs)) <= TOLERANCE[dtype]


# (model, what its config says in full, keys that config.json then lacks): their values are transformers' defaults.
DEFAULTS = [
    (
        "parallel",
        {"rotary_pct": 0.25, "rotary_emb_base": 10000},
        ("rotary_pct", "rotary_emb_base", "hidden_act", "layer_norm_eps", "use_parallel_residual",
         "tie_word_embeddings", "max_position_embeddings"),
    ),
    (
        "gpt2-inner",
        {"activation_function": "gelu_new", "n_inner": 64, "n_positions": 1024},
        ("activation_function", "n_inner", "layer_norm_epsilon", "n_positions"),
    ),
    (
        "llama",
        {"rms_norm_eps": 1e-6},
        ("rms_norm_eps", "rope_theta", "rope_scaling", "num_key_value_heads", "hidden_act", "tie_word_embeddings",
         "max_position_embeddings"),
    ),
    (
        "mistral",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "sliding_window": 4096},
        ("num_key_value_heads", "sliding_window", "rope_theta", "rms_norm_eps", "hidden_act", "tie_word_embeddings",
         "max_position_embeddings"),
    ),
    (
        "qwen2-tied",
        {},
        ("use_sliding_window", "sliding_window", "max_window_layers", "rope_theta", "rms_norm_eps", "hidden_act",
         "max_position_embeddings"),
    ),
    (
        "qwen3",
        {"head_dim": 128, "rope_theta": 10000.0},
        ("head_dim", "attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "rope_theta",
         "rms_norm_eps", "hidden_act", "tie_word_embeddings", "max_position_embeddings"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "full", "absent"), DEFAULTS, ids=[name for name, *_ in DEFAULTS])
def test_keys_that_are_left_out_have_transformers_defaults(name, full, absent, torch_reference, tmp_path):
    full = MODELS[name].config | full
    config = {key: value for key, value in full.items() if key not in absent}
    folder = write_model(tmp_path / "model", config, random_tensors(full))
    check_logits(folder, random_tokens(MODELS[name]), torch_reference)


# Nulls where the older and the newer files have them: what the key would have said is derived.
NULLS = [
    ("qwen2-window", {"sliding_window": None, "rope_scaling": None, "layer_types": None}),
    ("qwen3-window", {"sliding_window": None, "layer_types": None}),
    ("llama", {"num_key_value_heads": None, "head_dim": None, "rope_parameters": None}),
    ("mistral-full", {"head_dim": None, "rope_scaling": None}),
]


@pytest.mark.parametrize(("name", "nulls"), NULLS)
def test_nulls_mean_what_they_mean_to_transformers(name, nulls, torch_reference, tmp_path):
    full = MODELS[name].config | {"num_key_value_heads": MODELS[name].config["num_attention_heads"]}
    full |= {key: None for key in nulls if key == "head_dim"}
    folder = write_model(tmp_path / "model", full | nulls, random_tensors(full))
    check_logits(folder, random_tokens(MODELS[name]), torch_reference)


def check_logits(folder, tokens, torch_reference):
    theirs = torch_reference.torch_values(torch_reference.torch_model(folder, "float32"), tokens)
    assert worst(errors_at(forward(load(folder), tokens), theirs)) <= TOLERANCE["float32"]


@pytest.mark.parametrize(
    "dim", [2, 16, 20, 24, 32, 64]
)  # the rotary dimensions of Pythia and GPT-NeoX-20B, and one pair
def test_rotary_tables_are_those_the_models_were_trained_with(dim):
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    angles = torch.arange(2048).float()[:, None] * frequencies
    cos, sin = rotary_angles(Rotary(dim), jnp.arange(2048), "float32")
    np.testing.assert_allclose(cos, angles.cos().numpy(), rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin, angles.sin().numpy(), rtol=0, atol=2e-7)


# The released models': Llama 2, Qwen2, Llama 3, Llama 3.1 and 3.2, and a linear one.
@pytest.mark.parametrize(
    ("rotary", "rope"),
    [
        (Rotary(128, 10000.0), {"rope_type": "default"}),
        (Rotary(64, 1000000.0), {"rope_type": "default"}),
        (Rotary(128, 500000.0), {"rope_type": "default"}),
        (
            Rotary(128, 500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
        ),
        (
            Rotary(64, 500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
            {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
        ),
        (Rotary(128, 10000.0, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    ],
)  # fmt: skip
def test_rotary_tables_are_those_of_transformers(rotary, rope):
    """Over 8,192 positions, where one unit in the last place of a frequency is an angle of 5e-4."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(head_dim=rotary.dim, max_position_embeddings=131072,
                         rope_parameters=rope | {"rope_theta": rotary.base})  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(8192)[None])
    for ours, table in zip(rotary_angles(rotary, jnp.arange(8192), "float32"), theirs, strict=True):
        np.testing.assert_allclose(ours, table[0, :, : rotary.dim // 2].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_that_transformers_names(name, x64):
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 241)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.array(x)), ACT2FN[name](torch.from_numpy(x)).numpy(), atol=1e-10)


@pytest.mark.parametrize("name", ["parallel", "gpt2-untied", "qwen3-bias"])
def test_lower_precision_files_load_as_transformers_loads_them(name, torch_reference, model_folder, tmp_path):
    """A bfloat16 checkpoint: the same float32 parameters on both sides."""
    model = torch_reference.torch_model(model_folder(name), "float32").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    tokens = random_tokens(MODELS[name])
    theirs = torch_reference.torch_values(torch_reference.torch_model(tmp_path / "saved", "float32"), tokens)
    out = forward(load(tmp_path / "saved"), tokens, capture=sites(MODELS[name].config))
    assert worst(errors_at(out, theirs)) <= TOLERANCE["float32"]
