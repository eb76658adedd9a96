"""The PyTorch reference itself: it is transformers' model, its hooks change what they should, every option counts."""

import numpy as np
import pytest

from tests.lm.reference.models import (
    MODELS,
    random_tensors,
    random_tokens,
    relative_error,
    sites,
    write_model,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

LLAMA3 = MODELS["llama3-old"].config["rope_scaling"]
DEFAULT = {"rope_type": "default"}

# (model, change of its config that keeps the tensors): the logits are others.
OPTIONS = [
    ("parallel", {"use_parallel_residual": False}),
    ("parallel", {"rotary_pct": 1.0}),
    ("tied-theta", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 1.0, "rope_theta": 10000.0}}),
    ("tanh-sequential", {"hidden_act": "gelu"}),
    ("epsilon-relu", {"layer_norm_eps": 1e-5}),
    ("gpt2-unscaled", {"scale_attn_weights": True}),
    ("gpt2-by-layer", {"scale_attn_by_inverse_layer_idx": False}),
    ("gpt2-upcast", {"scale_attn_by_inverse_layer_idx": False}),
    ("gpt2-inner", {"activation_function": "gelu_new"}),
    ("gpt2-untied", {"activation_function": "gelu_new"}),
    ("gpt2-relu-epsilon", {"activation_function": "gelu_new"}),
    ("gpt2-relu-epsilon", {"layer_norm_epsilon": 1e-5}),
    ("llama", {"rope_theta": 500.0}),
    ("llama-biases", {"rms_norm_eps": 1e-6}),
    ("llama3-old", {"rope_scaling": None}),
    ("llama3-old", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("llama3-old", {"rope_scaling": LLAMA3 | {"factor": 4.0}}),
    ("llama3-old", {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}),
    ("llama3-old", {"rope_scaling": LLAMA3 | {"high_freq_factor": 5.5}}),
    ("llama3-old", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}),
    ("llama3-new", {"rope_parameters": {**DEFAULT, "rope_theta": 500.0}}),
    ("llama-linear-old", {"rope_scaling": None}),
    ("llama-linear-gelu", {"hidden_act": "silu"}),
    ("llama-linear-gelu", {"rope_parameters": {**DEFAULT, "rope_theta": 100.0}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 2}),
    ("mistral", {"sliding_window": 4}),
    ("mistral-full", {"sliding_window": 7}),
    ("mistral-full", {"rope_theta": 10000.0}),
    ("mistral-wide", {"sliding_window": None}),
    ("qwen2-window", {"use_sliding_window": False}),
    ("qwen2-window", {"max_window_layers": 0}),
    ("qwen2-window", {"max_window_layers": 2}),
    ("qwen2-tied", {"use_sliding_window": True}),
    ("qwen2-layer-types", {"layer_types": None}),
    ("qwen2-layer-types", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("qwen3-window", {"use_sliding_window": False}),
    ("qwen3-window", {"rope_scaling": None}),
    ("qwen3-window", {"rms_norm_eps": 1e-6}),
]


@pytest.fixture
def made(tmp_path, torch_reference):
    """(name, dtype, changes of the config) -> the PyTorch model."""

    def make(name, dtype="float32", **changes):
        config = MODELS[name].config | changes
        return torch_reference.torch_model(write_model(tmp_path / name, config, random_tensors(config)), dtype)

    return make


@pytest.mark.parametrize("name", MODELS)
def test_in_float32_it_is_transformers_eager_model(name, made, tmp_path, torch_reference):
    """Logits and patterns, to the last digits: only the tap is added.

    Not bit for bit: where the weights lie in memory decides, on some CPUs, in which order their products are added up.
    """
    from transformers import AutoModelForCausalLM

    ours = torch_reference.torch_values(made(name), random_tokens(MODELS[name]))
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        tokens = torch.from_numpy(random_tokens(MODELS[name]))
        theirs = eager.eval()(input_ids=tokens, use_cache=False, output_attentions=True)
    close = {"rtol": 2e-6, "atol": 2e-6}
    np.testing.assert_allclose(ours["logits"], theirs.logits.numpy(), **close)
    for layer, pattern in enumerate(theirs.attentions):
        np.testing.assert_allclose(ours[f"attn_pattern.{layer}"], pattern.numpy(), **close)


@pytest.mark.parametrize(("name", "changes"), OPTIONS)
def test_every_option_counts(name, changes, made, torch_reference):
    """A port that does not read the option cannot have these logits."""
    tokens = random_tokens(MODELS[name])
    logits = torch_reference.torch_values(made(name), tokens)["logits"]
    assert relative_error(torch_reference.torch_values(made(name, **changes), tokens)["logits"], logits) > 5e-5


@pytest.mark.parametrize("name", ["llama3-old", "llama3-new"])
def test_all_branches_of_the_llama3_scaling_are_met(name, made, torch_reference):
    """Frequencies that stay, are mixed, and are divided; and in float64 they are what transformers has in float32."""
    model = made(name)
    plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
    ratio = plain / torch_reference.rotary_frequencies(model.config).numpy()
    assert [np.isclose(ratio, 1).sum(), ((ratio > 1.01) & (ratio < 7.9)).sum(), np.isclose(ratio, 8).sum()] == [1, 2, 5]
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), plain / ratio, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["parallel", "sequential", "gpt2-hub", "llama-biases", "mistral", "qwen2-window", "qwen3"]
)
def test_hooks_change_what_is_read_later(name, made, torch_reference):
    """Writing back what was read changes nothing; an edit of a stream reaches the sums that it is part of."""
    model, tokens = made(name, "float64"), random_tokens(MODELS[name])
    clean = torch_reference.torch_values(model, tokens)
    assert list(clean) == [*sites(MODELS[name].config), "logits"]
    same = torch_reference.torch_values(model, tokens, lambda site, value: value.clone())
    for site, value in clean.items():
        np.testing.assert_array_equal(same[site], value)
    for edited in sites(MODELS[name].config):

        def turn(site, value, at=edited):
            return 2 - value if site == at else None

        found = torch_reference.torch_values(model, tokens, turn)
        np.testing.assert_array_equal(found[edited], 2 - clean[edited])
        assert relative_error(found["logits"], clean["logits"]) > 1e-3, edited
        check_sums(found, edited)


def check_sums(found, edited):
    """What stands at the sites of the residual stream adds up, except at the edited site itself."""
    layers = [site.split(".")[1] for site in found if site.startswith("resid_pre")]
    for i in layers:
        if f"resid_mid.{i}" in found:
            sums = {"resid_mid": ("resid_pre", "attn_out"), "resid_post": ("resid_mid", "mlp_out")}
        else:
            sums = {"resid_post": ("resid_pre", "attn_out", "mlp_out")}
        for total, parts in sums.items():
            if f"{total}.{i}" != edited:
                expected = sum(found[f"{part}.{i}"] for part in parts)
                np.testing.assert_allclose(found[f"{total}.{i}"], expected, rtol=0, atol=1e-10)
