"""Reading model folders: both styles of config.json, safetensors whole and in shards, and every fault in one line."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparse_jax.errors import InputError
from sparse_jax.lm import forward, load, resolve
from sparse_jax.lm.embedded import MODELS
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig, read_config
from sparse_jax.lm.load import read_config_json
from sparse_jax.lm.rotary import Rotary

TOKENS = np.array([[3, 1, 4, 1, 5]])
LAYER = "gpt_neox.layers.1."


def refused(*args, **kwargs) -> str:
    """The message with which `load` refuses, which must be one line."""
    with pytest.raises(InputError) as raised:
        load(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rewrite(folder, change, **options):
    """`model.safetensors` again, after `change` has been at its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", **options)
    return folder


def reconfigure(folder, **changes):
    """`config.json` with some entries changed, the weights as they were."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# config.json

SIZES = {
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 50304,
}


def test_both_styles_of_config_are_one_config():
    old = SIZES | {"rotary_pct": 0.5, "rotary_emb_base": 20000, "torch_dtype": "float16"}
    new = SIZES | {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 20000.0, "rope_type": "default"}}
    expected = GPTNeoXConfig(6, 512, 2048, 8, 50304, 2048, Rotary(32, 20000.0))
    assert read_config(old) == read_config(new) == expected
    assert hash(read_config(old)) == hash(read_config(new))
    assert expected.head_dim == 64


def test_every_field_of_a_config_is_read():
    raw = SIZES | {
        "max_position_embeddings": 77,
        "rotary_pct": 1.0,
        "layer_norm_eps": 1e-3,
        "hidden_act": "relu",
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    assert read_config(raw) == GPTNeoXConfig(
        6, 512, 2048, 8, 50304, 77, Rotary(64), 1e-3, "relu", False, False, True, 0.1
    )


def test_defaults_are_those_of_transformers():
    """Those of the class that reads the same file there (transformers' configs need no torch)."""
    from transformers import GPTNeoXConfig as Theirs

    theirs, ours = Theirs(**SIZES), read_config(SIZES)
    assert ours.rotary.dim == theirs.rope_parameters["partial_rotary_factor"] * ours.head_dim
    assert ours.rotary.base == theirs.rope_parameters["rope_theta"]
    assert ours == read_config(json.loads(theirs.to_json_string(use_diff=False)))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
        ({"num_attention_heads": 7}, "width 512 is not a multiple of its 7 heads"),
        ({"hidden_act": "snake"}, "'snake' is not known; known are gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "'yarn', 'factor': 4}) is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "supported are default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
        ({"num_hidden_layers": "six"}, "has num_hidden_layers 'six'; it must be an integer, at least 1"),
        ({"num_hidden_layers": True}, "has num_hidden_layers True"),
        ({"vocab_size": 0}, "has vocab_size 0"),
        ({"layer_norm_eps": "tiny"}, "has layer_norm_eps 'tiny'; it must be a number above 0"),
        ({"use_parallel_residual": 1}, "has use_parallel_residual 1; it must be true or false"),
        ({"hidden_act": 3}, "has hidden_act 3; it must be a text"),
        ({"rope_parameters": 4}, "has rope_parameters 4; it must be a JSON object"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change, shown):
    raw = {name: value for name, value in (SIZES | change).items() if value is not None}
    with pytest.raises(InputError) as raised:
        read_config(raw)
    assert shown in str(raised.value)


def test_config_files(tmp_path, model_folder):
    assert "has no config.json" in refused(tmp_path)
    for text, shown in (("{", "is not valid JSON"), ("[1]", "is not a JSON object"), ('"\xff"', "is not valid JSON")):
        (tmp_path / "config.json").write_bytes(text.encode("latin1"))
        assert shown in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "model_type 'mamba' is not supported; supported are " in refused(tmp_path)
    assert "gpt_neox" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model_type None is not supported" in refused(tmp_path)
    assert read_config_json(model_folder("parallel"))["hidden_size"] == 16


# Names and shapes


def test_parameters_are_stacked_by_layer_in_the_ports_layout(reference, model_folder):
    """One number of each kind followed from the file to its place; parity holds the rest."""
    tensors = reference.random_tensors(reference.MODELS["parallel"].config)
    params = load(model_folder("parallel")).params
    attn = params["blocks"]["attn"]
    assert attn["qkv"]["kernel"].shape == (3, 16, 4, 3, 4)
    assert attn["out"]["kernel"].shape == (3, 4, 4, 16)
    # Head 2's key, dimension 3, from input 5: row (2 * 3 + 1) * 4 + 3 of the fused matrix.
    assert attn["qkv"]["kernel"][1, 5, 2, 1, 3] == tensors[LAYER + "attention.query_key_value.weight"][31, 5]
    assert attn["qkv"]["bias"][1, 2, 1, 3] == tensors[LAYER + "attention.query_key_value.bias"][31]
    assert attn["out"]["kernel"][1, 2, 3, 7] == tensors[LAYER + "attention.dense.weight"][7, 2 * 4 + 3]
    assert attn["out"]["bias"][1, 7] == tensors[LAYER + "attention.dense.bias"][7]
    assert params["blocks"]["ln_mlp"]["scale"][1, 3] == tensors[LAYER + "post_attention_layernorm.weight"][3]
    assert params["head"]["unembed"].shape == (29, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_all_faults_are_in_one_error(model_folder):
    def spoil(tensors):
        del tensors[LAYER + "mlp.dense_h_to_4h.bias"]
        tensors["gpt_neox.embed_in.weight"] = np.zeros((31, 16), np.float32)
        tensors["gpt_neox.embed_positions.weight"] = np.zeros((64, 16), np.float32)

    message = refused(rewrite(model_folder("parallel"), spoil))
    assert "do not fit config.json (3 tensors)" in message
    assert LAYER + "mlp.dense_h_to_4h.bias: missing, expected [24]" in message
    assert "gpt_neox.embed_in.weight: expected [29, 16], found [31, 16]" in message
    assert "gpt_neox.embed_positions.weight: not part of this architecture, found [64, 16]" in message


def test_a_transposed_matrix_is_refused(model_folder):
    def turn(tensors):
        name = LAYER + "mlp.dense_h_to_4h.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    assert "expected [24, 16], found [16, 24]" in refused(rewrite(model_folder("parallel"), turn))


def test_a_long_list_of_faults_is_cut(model_folder):
    message = refused(reconfigure(model_folder("parallel"), hidden_size=32))
    assert message.count("expected") == 12
    assert message.endswith("; and 25 more")
    assert len(message) < 2000


def test_a_wrong_number_of_layers_is_refused(model_folder):
    folder = model_folder("parallel")
    message = refused(reconfigure(folder, num_hidden_layers=4))
    assert "gpt_neox.layers.3.input_layernorm.weight: missing, expected [16]" in message
    message = refused(reconfigure(folder, num_hidden_layers=2))
    assert "gpt_neox.layers.2.attention.dense.bias: not part of this architecture, found [16]" in message


def test_buffers_in_the_file_are_ignored(model_folder):
    """Pythia's files on the hub hold causal masks and rotary tables beside the weights."""

    def add_buffers(tensors):
        for layer in range(3):
            at = f"gpt_neox.layers.{layer}.attention."
            tensors[at + "bias"] = np.tril(np.ones((1, 1, 64, 64), bool))
            tensors[at + "masked_bias"] = np.array(-1e9, np.float32)
            tensors[at + "rotary_emb.inv_freq"] = np.ones(2, np.float32)

    plain = load(model_folder("parallel")).params
    same(load(rewrite(model_folder("parallel"), add_buffers)).params, plain)


@pytest.mark.parametrize("name", ["attention.dense.bias", "attention.query_key_value.bias"])
def test_a_bias_is_never_taken_for_a_buffer(model_folder, name):
    """Neither when it is missing, nor when the config says that there is none."""
    message = refused(rewrite(model_folder("parallel"), lambda tensors: tensors.pop(LAYER + name)))
    assert f"{LAYER}{name}: missing, expected" in message
    message = refused(reconfigure(model_folder("no-attention-bias"), attention_bias=True))
    assert f"{LAYER}{name}: missing, expected" in message

    def add_bias(tensors):
        tensors[LAYER + name] = np.zeros(16, np.float32)

    message = refused(rewrite(model_folder("no-attention-bias"), add_bias))
    assert f"{LAYER}{name}: not part of this architecture, found [16]" in message


@pytest.mark.parametrize("copy", ["embed_out.weight", "lm_head.weight"])
def test_a_tied_models_second_copy_is_ignored(model_folder, copy):
    def add_copy(tensors):
        tensors[copy] = tensors["gpt_neox.embed_in.weight"].copy()

    params = load(rewrite(model_folder("tied-theta"), add_copy)).params
    assert set(params["head"]) == {"norm"}
    np.testing.assert_array_equal(params["embed"]["tokens"], load(model_folder("tied-theta")).params["embed"]["tokens"])
    untied = model_folder("parallel")
    tensors = load_file(untied / "model.safetensors")
    np.testing.assert_array_equal(load(untied).params["head"]["unembed"], tensors["embed_out.weight"])


def test_a_second_copy_that_differs_from_the_embedding_is_refused(model_folder):
    """One of the config and the file is wrong; which cannot be known."""

    def add_other(tensors):
        tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"] + 1

    message = refused(rewrite(model_folder("tied-theta"), add_other))
    assert "ties the embeddings (tie_word_embeddings), but embed_out.weight differs from gpt_neox.embed_in" in message


def test_names_without_the_prefix_are_the_same_model(model_folder):
    """As files that were saved without the head have them."""
    whole = load(model_folder("parallel"))

    def strip(tensors):
        for name in [name for name in tensors if name.startswith("gpt_neox.")]:
            tensors[name.removeprefix("gpt_neox.")] = tensors.pop(name)

    same(load(rewrite(model_folder("parallel"), strip)).params, whole.params)


def test_quantised_weights_are_refused(model_folder):
    message = refused(reconfigure(model_folder("parallel"), quantization_config={"bits": 4}))
    assert "quantised weights (quantization_config in config.json), which are not supported" in message


# Files


def shard(folder, n):
    """The single file as `n` shards and an index."""
    tensors, where = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        part = dict(list(tensors.items())[i::n])  # one layer's tensors in several files
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_shards_are_the_single_file(model_folder):
    whole = load(model_folder("sequential"))
    same(load(shard(model_folder("sequential"), 3)).params, whole.params)


def test_faults_of_shards(model_folder):
    folder = shard(model_folder("sequential"), 3)
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = refused(folder)
    assert "lacks model-00002-of-00003.safetensors, which its model.safetensors.index.json names" in message
    for text in ("{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": null}'):
        index.write_text(text)
        assert "is not a safetensors index" in refused(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(model_folder, share):
    folder = model_folder("parallel")
    file = folder / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * share))
    message = refused(folder)
    assert f"{file} cannot be read as safetensors" in message
    assert "it may be cut short" in message


def test_a_file_of_something_else_is_refused(model_folder):
    folder = model_folder("parallel")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "cannot be read as safetensors" in refused(folder)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
def test_pickled_weights_are_refused(model_folder, pickled):
    folder = model_folder("parallel")
    (folder / "model.safetensors").rename(folder / pickled)
    message = refused(folder)
    assert f"only pickled weights ({pickled}), which can run code when loaded" in message
    assert "save_pretrained" in message
    assert "revision that has safetensors" in message


def test_no_weights_at_all(model_folder):
    folder = model_folder("parallel")
    (folder / "model.safetensors").unlink()
    assert "has no weights: expected model.safetensors or model.safetensors.index.json" in refused(folder)


# dtypes


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_on_disk(model_folder, stored):
    """Parameters are the file's numbers, converted."""

    def convert(tensors):
        tensors |= {name: tensor.astype(stored) for name, tensor in tensors.items()}

    folder = rewrite(model_folder("parallel"), convert)
    params = load(folder).params
    tensors = load_file(folder / "model.safetensors")
    assert tensors["embed_out.weight"].dtype == stored
    np.testing.assert_array_equal(params["head"]["unembed"], tensors["embed_out.weight"].astype(np.float32))
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel[1], tensors[LAYER + "mlp.dense_h_to_4h.weight"].T.astype(np.float32))


@pytest.mark.parametrize(
    ("asked", "params", "computed"),
    [
        ({}, "float32", "float32"),
        ({"dtype": "bfloat16"}, "float32", "bfloat16"),
        ({"dtype": "bfloat16", "param_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ({"param_dtype": "bfloat16"}, "bfloat16", "float32"),
        ({"dtype": "float16", "param_dtype": "float16"}, "float16", "float16"),
    ],
)
def test_parameters_and_computing_have_their_own_dtypes(model_folder, asked, params, computed):
    lm = load(model_folder("parallel"), **asked)
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype(params)}
    out = forward(lm, TOKENS)
    assert out.residual.dtype == jnp.dtype(computed)
    assert out.logits.dtype == jnp.float32
    exact = forward(load(model_folder("parallel")), TOKENS).logits
    assert np.abs(out.logits - exact).max() < 0.1 * np.abs(exact).max()


def test_float64(model_folder, x64):
    params = load(model_folder("parallel"), dtype="float64").params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float64")}


@pytest.mark.parametrize("which", ["dtype", "param_dtype"])
def test_dtypes_that_are_refused(which):
    assert "'float64' needs jax_enable_x64 (for example JAX_ENABLE_X64=1)" in refused(**{which: "float64"})
    assert "dtype 'int8' is not known; known are float32, bfloat16" in refused(**{which: "int8"})


# Names


def test_the_embedded_model_is_the_default():
    lm = load()
    assert lm.name == "novel-neox"
    assert lm.revision is None
    assert resolve("novel-neox") == MODELS["novel-neox"]
    assert lm.config.n_layers == 6
    assert lm.dtype == "float32"


def test_a_folder_by_path_or_text(model_folder, monkeypatch):
    folder = model_folder("parallel")
    lm = load(folder)
    same(load(str(folder)).params, lm.params)
    assert lm.name == str(folder)
    monkeypatch.chdir(folder.parent)
    same(load("parallel").params, lm.params)


def test_names_that_are_no_model(tmp_path, model_folder):
    missing = tmp_path / "nothing"
    assert f"model folder {str(missing)!r} does not exist" in refused(missing)
    assert "model folder './nothing' does not exist" in refused("./nothing")
    assert "model folder 'a/b/c' does not exist" in refused("a/b/c")
    file = model_folder("parallel") / "config.json"
    assert "is a file; give the folder" in refused(file)


def test_a_revision_of_something_local_is_refused(model_folder):
    assert "--revision 'step0' is for hub models; 'novel-neox' is local" in refused("novel-neox", "step0")
    assert "is local and has no revisions" in refused(model_folder("parallel"), revision="main")


@pytest.mark.parametrize("name", ["novel-neo", "EleutherAI/pythia-70m-nonexistent", "not a name!", "a/"])
def test_a_hub_that_does_not_answer(name):
    """conftest sets HF_HUB_OFFLINE: no request leaves the machine."""
    message = refused(name, revision="step1000" if "/" in name else None)
    assert f"model {name!r}" in message
    assert "neither embedded (novel-neox) nor a local folder, and the hub did not give it: " in message
    assert ("at revision 'step1000'" in message) == ("/" in name)
    assert len(message) < 500
