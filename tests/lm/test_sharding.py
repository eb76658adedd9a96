"""Parameters over a mesh: laid out as they are read, the same numbers out (four fake CPU devices, see conftest)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, forward, generate, load, zero
from sparse_jax.lm.sharding import RULES
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


@pytest.mark.parametrize("name", ["parallel", "gpt2-hub", "llama-biases", "mistral", "qwen2-window", "qwen3-bias"])
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
