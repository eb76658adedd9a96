"""The GPT-NeoX port against transformers' PyTorch model, live: every site, edits, and the trained model on real text.

The float32 reference is transformers' own eager model. transformers takes the softmax and the rotary tables in float32
even in a float64 model, so the float64 reference has both replaced by their textbook forms in float64
(`make_golden.torch_model`); everything else is transformers' own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.lm import Edit, add, forward, load, replace
from sparse_jax.lm.documents import documents
from sparse_jax.lm.embedded import MODELS
from sparse_jax.lm.layers import ACTIVATIONS
from sparse_jax.lm.rotary import rotary_angles
from sparse_jax.lm.rows import pack
from sparse_jax.lm.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
DTYPES = list(TOLERANCE)
NAMES = (
    "epsilon-relu", "no-attention-bias", "one-head", "one-position", "parallel", "sequential", "tanh-sequential",
    "tied-theta",
)  # fmt: skip


def errors_at(reference, out, theirs: dict) -> dict[str, float]:
    """Site or "logits" -> relative error of what `forward` gave."""
    errors = {site: reference.relative_error(value, theirs[site]) for site, value in out.captured.items()}
    return errors | {"logits": reference.relative_error(out.logits, theirs["logits"])}


def worst(errors: dict[str, float]) -> float:
    print({site: f"{error:.1e}" for site, error in errors.items()})
    return max(errors.values())


def without_patterns(sites: list[str]) -> list[str]:
    """Where nobody looks at the pattern, attention runs in blocks of queries and never makes it whole."""
    return [site for site in sites if not site.startswith("attn_pattern")]


def test_names(reference):
    assert set(NAMES) == set(reference.MODELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_site_of_a_saved_model(name, dtype, reference, model_folder, tmp_path):
    """What `save_pretrained` wrote, in transformers 5's own style, is what `load` reads."""
    model = reference.torch_model(model_folder(name), dtype)
    model.save_pretrained(tmp_path / "saved")
    tokens = reference.random_tokens(reference.MODELS[name], seed=7)
    theirs = reference.torch_values(model, tokens)
    with jax.enable_x64(dtype == "float64"):
        lm = load(tmp_path / "saved", dtype=dtype)
        out = forward(lm, tokens, capture=reference.sites(reference.MODELS[name].config))
        assert out.captured.keys() == theirs.keys() - {"logits"}
        assert worst(errors_at(reference, out, theirs)) <= TOLERANCE[dtype]


@pytest.fixture(scope="module")
def text():
    """[3, 256] tokens of Austen, from three places."""
    rows = pack(documents("austen"), load_tokenizer(MODELS["novel-neox"]), 256)
    return rows[np.array([0, 1500, 4000])].tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trained_model_on_real_text(dtype, reference, text):
    theirs = reference.torch_values(reference.torch_model(MODELS["novel-neox"], dtype), text)
    sites = [site for site in theirs if site.endswith((".0", ".3", ".5"))]
    assert len(sites) == 3 * 11
    with jax.enable_x64(dtype == "float64"):
        lm = load("novel-neox", dtype=dtype)
        for captured in (sites, []):  # without captures nobody looks at the patterns: attention in blocks
            out = forward(lm, text, capture=captured)
            assert worst(errors_at(reference, out, theirs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_longest_context(dtype, reference, model_folder):
    """2,048 positions: large rotary angles, and attention in many blocks of queries."""
    changes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    folder = model_folder("parallel", **changes)
    tokens = np.random.default_rng(3).integers(0, 29, (1, 2048))
    theirs = reference.torch_values(reference.torch_model(folder, dtype), tokens)
    with jax.enable_x64(dtype == "float64"):
        sites = [site for site in theirs if site != "logits"]
        for captured in (sites, without_patterns(sites)):
            out = forward(load(folder, dtype=dtype), tokens, capture=captured)
            assert worst(errors_at(reference, out, theirs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    "dim", [2, 16, 20, 24, 32, 64]
)  # the rotary dimensions of Pythia and GPT-NeoX-20B, and one pair
def test_rotary_tables_are_those_the_models_were_trained_with(dim):
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    angles = torch.arange(2048).float()[:, None] * frequencies
    cos, sin = rotary_angles(jnp.arange(2048), dim, 10000.0, "float32")
    np.testing.assert_allclose(cos, angles.cos().numpy(), rtol=0, atol=2e-7)
    np.testing.assert_allclose(sin, angles.sin().numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_that_transformers_names(name, x64):
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 241)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.array(x)), ACT2FN[name](torch.from_numpy(x)).numpy(), atol=1e-10)


def zero_head(value, head):
    return value.at[:, :, head].set(0)


def scaled(value, factor):
    return value * factor


# name -> (model's residual, site, edit made in JAX from the arrays, the same made by a PyTorch hook from the arrays)
EDITS = {
    "attn_out replaced at some positions": (
        "attn_out.1",
        lambda new, mask, _: Edit("attn_out.1", replace, (jnp.array(new), jnp.array(mask))),
        lambda value, new, mask, _: torch.where(torch.from_numpy(mask)[..., None], torch.from_numpy(new), value),
    ),
    "a head's z set to zero": (
        "attn_z.0",
        lambda *_: Edit("attn_z.0", zero_head, (jnp.array(1),)),
        lambda value, *_: value * torch.tensor([1.0, 0.0] + [1.0] * (value.shape[2] - 2), dtype=value.dtype)[:, None],
    ),
    "a direction added to resid_post": (
        "resid_post.0",
        lambda new, _, direction: Edit("resid_post.0", add, (jnp.array(direction), jnp.array(1.5, new.dtype))),
        lambda value, _, __, direction: value + 1.5 * torch.from_numpy(direction),
    ),
    "keys doubled before the rotation": (
        "attn_k.1",
        lambda new, *_: Edit("attn_k.1", scaled, (jnp.array(2, new.dtype),)),
        lambda value, *_: 2 * value,
    ),
    "neurons halved": (
        "mlp_hidden.1",
        lambda new, *_: Edit("mlp_hidden.1", scaled, (jnp.array(0.5, new.dtype),)),
        lambda value, *_: 0.5 * value,
    ),
}


@pytest.mark.parametrize("name", ["parallel", "sequential"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_a_hook(edit, name, reference, loaded, model_folder, x64):
    """The same intervention gives the same values downstream, and they are not those of the clean pass."""
    tiny = reference.MODELS[name]
    tokens, d = reference.random_tokens(tiny, seed=8), tiny.config["hidden_size"]
    random = np.random.default_rng(5)
    arrays = random.normal(size=(*tokens.shape, d)), random.random(tokens.shape) < 0.5, random.normal(size=d)
    at, ours, hook = EDITS[edit]
    model = reference.torch_model(model_folder(name), "float64")
    clean = reference.torch_values(model, tokens)
    theirs = reference.torch_values(model, tokens, lambda site, value: hook(value, *arrays) if site == at else None)
    out = forward(loaded(name, "float64"), tokens, capture=reference.sites(tiny.config), edits=[ours(*arrays)])
    assert reference.relative_error(clean["logits"], theirs["logits"]) > 1e-2
    assert worst(errors_at(reference, out, theirs)) <= TOLERANCE["float64"]


def test_an_edit_of_the_trained_model(reference, text):
    """Mean-ablating the attention of layer 3 on half of the positions of real text, in float32."""
    mask = np.arange(256)[None] % 2 == np.zeros((3, 1))
    clean = reference.torch_values(reference.torch_model(MODELS["novel-neox"], "float32"), text)
    new = np.broadcast_to(clean["attn_out.3"].mean((0, 1)), clean["attn_out.3"].shape).copy()

    def hook(site, value):
        if site == "attn_out.3":
            return torch.where(torch.from_numpy(mask)[..., None], torch.from_numpy(new), value)
        return None

    theirs = reference.torch_values(reference.torch_model(MODELS["novel-neox"], "float32"), text, hook)
    out = forward(load(), text, edits=[Edit("attn_out.3", replace, (jnp.array(new), jnp.array(mask)))])
    assert reference.relative_error(clean["logits"], theirs["logits"]) > 1e-2
    assert reference.relative_error(out.logits, theirs["logits"]) <= TOLERANCE["float32"]


def test_lower_precision_files_load_as_transformers_loads_them(reference, model_folder, tmp_path):
    """A bfloat16 checkpoint: the same float32 parameters on both sides."""
    model = reference.torch_model(model_folder("parallel"), "float32").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    tokens = reference.random_tokens(reference.MODELS["parallel"])
    theirs = reference.torch_values(reference.torch_model(tmp_path / "saved", "float32"), tokens)
    out = forward(load(tmp_path / "saved"), tokens, capture=reference.sites(reference.MODELS["parallel"].config))
    assert worst(errors_at(reference, out, theirs)) <= TOLERANCE["float32"]
