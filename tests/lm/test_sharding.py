"""Weights and batches over a mesh of devices: the same numbers out (eight fake CPU devices, of which it takes four)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, forward, generate, load, zero
from sparse_jax.lm.family import family_of
from sparse_jax.lm.sharding import RULES, parameter_sharding
from sparse_jax.lm.weight_map import leaves

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
# The tiny models' vocabulary of 29 cannot be divided; every other axis can.
RULES_HERE = {"vocab": None}


@pytest.fixture
def mesh():
    """2 x 2 devices: rows of a batch over "data", heads and neurons over "model"."""
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def spec(array):
    return tuple(array.sharding.spec)


def same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["parallel", "gpt2-hub", "mistral", "qwen2-window", "qwen3-bias"])
def test_sharded_logits_are_unsharded_ones(model_folder, mesh, name):
    folder = model_folder(name)
    whole, spread = load(folder), load(folder, mesh=mesh, rules=RULES_HERE)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data")))
    ours, theirs = (
        forward(lm, t, capture=["resid_post.0", "attn_z.1"]) for lm, t in ((spread, tokens), (whole, TOKENS))
    )
    same(ours.logits, theirs.logits)
    for site, value in theirs.captured.items():
        same(ours.captured[site], value)
    # The batch stays where it was: nothing has been gathered to one device.
    assert len({str(shard.index) for shard in ours.logits.addressable_shards}) >= 2


def test_parameters_are_what_they_are_on_one_device(model_folder, mesh):
    folder = model_folder("llama-biases")
    whole = load(folder).params
    for rules in (RULES_HERE, {"vocab": None, "d_model": "data"}, {"vocab": None, "layer": "model", "heads": None,
                  "kv_heads": None, "d_mlp": ("data",)}):  # fmt: skip
        spread = load(folder, mesh=mesh, rules=rules).params
        jax.tree.map(np.testing.assert_array_equal, spread, whole)


def test_each_axis_lies_where_the_table_says(model_folder, mesh):
    lm = load(model_folder("llama-biases"), mesh=mesh, rules={"vocab": None, "d_model": "data"})
    attn, mlp = lm.params["blocks"]["attn"], lm.params["blocks"]["mlp"]
    assert spec(attn["q"]["kernel"]) == (None, "data", "model", None)  # [layer, d_model, heads, head_dim]
    assert spec(attn["k"]["bias"]) == (None, "model", None)
    assert spec(attn["out"]["kernel"]) == (None, "model", None, "data")
    assert spec(mlp["up"]["kernel"]) == (None, "data", "model")
    assert spec(mlp["down"]["kernel"]) == (None, "model", "data")
    assert spec(lm.params["embed"]["tokens"]) == (None, "data")
    kernel = attn["q"]["kernel"]
    shapes = {shard.data.shape for shard in kernel.addressable_shards}
    assert shapes == {(kernel.shape[0], kernel.shape[1] // 2, kernel.shape[2] // 2, kernel.shape[3])}


def test_every_parameter_of_every_family_has_known_axes(loaded):
    for name in ("parallel", "gpt2-hub", "qwen3-bias"):
        lm = loaded(name)
        for path, weight in leaves(lm.family.weights(lm.config)):
            assert {axis for axis, _ in weight.axes} <= set(RULES), path


def test_generation_and_gradients_on_a_mesh(model_folder, mesh):
    folder = model_folder("mistral")
    whole, spread = load(folder), load(folder, mesh=mesh, rules=RULES_HERE)
    edits = [Edit("mlp_out.0", zero)]
    made = [generate(lm, TOKENS, 5, edits=edits, keep_logits=True) for lm in (spread, whole)]
    np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
    same(made[0].logits, made[1].logits)

    def loss(residual, lm):
        return jnp.sum(jnp.sin(forward(lm, residual, start=1).logits))

    residual = np.asarray(forward(whole, TOKENS, stop=1).residual)
    same(jax.grad(loss)(residual, spread), jax.grad(loss)(residual, whole))


@pytest.mark.parametrize(
    ("name", "rules", "shown"),
    [
        (
            "parallel",
            None,
            r"embed.tokens: its axis 'vocab' of 29 cannot be divided over 2 devices \(model\); give the",
        ),
        ("mistral", {"vocab": None, "d_mlp": ("data", "model"), "head_dim": "data"}, None),
        ("llama-linear-old", RULES_HERE, "axis 'kv_heads' of 1 cannot be divided over 2 devices"),
        ("parallel", {"vocab": None, "heads": "tensor"}, "names the mesh axis 'tensor'; this mesh has data, model"),
        ("parallel", {"hidden": "model"}, "sharding rules for hidden: the logical axes are layer, vocab"),
        ("parallel", {"vocab": None, "d_model": "model"}, "divide two of its axes over model"),
    ],
)
def test_rules_that_do_not_fit(model_folder, mesh, name, rules, shown):
    folder = model_folder(name)
    if shown is None:
        same(forward(load(folder, mesh=mesh, rules=rules), TOKENS).logits, forward(load(folder), TOKENS).logits)
        return
    with pytest.raises(InputError, match=shown):
        load(folder, mesh=mesh, rules=rules)


def test_a_mesh_that_does_not_fit_is_told_before_a_tensor_is_read(model_folder, mesh):
    folder = model_folder("parallel")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be divided"):
        load(folder, mesh=mesh)


def released(model_type, width, layers, heads, kv_heads, mlp, vocab, **more):
    """config.json of a released model, as far as shapes go."""
    return {"model_type": model_type, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab} | more  # fmt: skip


@pytest.mark.parametrize(
    ("name", "raw", "billions"),
    [
        ("Pythia 6.9B", released("gpt_neox", 4096, 32, 32, 32, 16384, 50432), 6.9),
        ("Llama 2 7B", released("llama", 4096, 32, 32, 32, 11008, 32000), 6.7),
        ("Llama 3.1 70B", released("llama", 8192, 80, 64, 8, 28672, 128256), 70.6),
        ("Mistral 7B", released("mistral", 4096, 32, 32, 8, 14336, 32000), 7.2),
        ("Qwen3 8B", released("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128), 8.2),
    ],
)
def test_released_models_spread_over_eight_chips(name, raw, billions):
    """With the table as it is each chip holds an eighth, but for norms and output biases."""
    config, mesh = family_of(raw["model_type"]).read_config(raw), AbstractMesh((1, 8), ("data", "model"))
    total = held = 0
    for path, weight in leaves(family_of(raw["model_type"]).weights(config)):
        axes = (("layer", config.n_layers), *weight.axes) if path[0] == "blocks" else weight.axes
        shape = tuple(size for _, size in axes)
        total += math.prod(shape)
        held += math.prod(parameter_sharding(mesh, RULES, axes, ".".join(path)).shard_shape(shape))
    assert total / 1e9 == pytest.approx(billions, rel=0.01), name
    assert held / total < 1.01 / 8
