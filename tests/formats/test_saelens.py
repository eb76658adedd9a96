"""SAELens' files: what is written reads back as the same function; what cannot be said in them is refused plainly."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, PCA, Normalised
from sparse_jax.dictionaries.batch_topk import BatchTopK
from sparse_jax.dictionaries.gated import Gated
from sparse_jax.dictionaries.jump_relu import JumpReLU
from sparse_jax.dictionaries.lp import Lp
from sparse_jax.dictionaries.matching_pursuit import MatchingPursuit
from sparse_jax.dictionaries.matryoshka import Matryoshka
from sparse_jax.dictionaries.multi_topk import MultiTopK
from sparse_jax.dictionaries.topk import TopK
from sparse_jax.errors import InputError
from sparse_jax.formats import load_saelens, saelens, save_saelens

D, N = 6, 16
PROVENANCE = {
    "model": "EleutherAI/pythia-70m",
    "revision": "step1000",
    "site": "resid_post.3",
    "context": 128,
    "bos": "none",
    "skip_positions": 1,
    "text": "novels.txt.gz",
    "seed": 7,
}
# (dictionary, what SAELens calls it, the class it comes back as)
KINDS = {
    "l1": (L1(n_features=N), "standard", L1),
    "l1 without centring": (L1(n_features=N, centring=False), "standard", L1),
    "l1 without decoder bias": (L1(n_features=N, decoder_bias=False), "standard", L1),
    "tied l1": (L1(n_features=N, tied=True), "standard", L1),
    "lp": (Lp(n_features=N), "standard", L1),
    "gated": (Gated(n_features=N), "gated", Gated),
    "gated without centring": (Gated(n_features=N, centring=False), "gated", Gated),
    "jump-relu": (JumpReLU(n_features=N), "jumprelu", JumpReLU),
    "centred jump-relu": (JumpReLU(n_features=N, centring=True), "jumprelu", JumpReLU),
    "topk": (TopK(n_features=N, k=3), "topk", TopK),
    "multi-topk": (MultiTopK(n_features=N, k=3), "topk", TopK),
    "batch-topk": (BatchTopK(n_features=N, k=3), "jumprelu", JumpReLU),
    "matryoshka": (Matryoshka(n_features=N, k=3, prefixes=(0.25, 1.0)), "jumprelu", JumpReLU),
}
NORMALISERS = {
    "centre and scale": Normaliser(jnp.arange(D, dtype=jnp.float32), jnp.float32(2.5)),
    "scale": Normaliser(jnp.zeros(D), jnp.float32(2.5)),
    "none": Normaliser(jnp.zeros(D), jnp.float32(1)),
}


def made(dictionary, normaliser=NORMALISERS["centre and scale"]):
    """That dictionary with every parameter away from where it starts."""
    dictionary, generator = dictionary.sized(D), np.random.default_rng(0)
    params = {
        name: value + jnp.array(0.2 * generator.normal(size=value.shape), jnp.float32)
        for name, value in dictionary.init(jax.random.key(0)).items()
    }
    if "threshold" in params:
        params["threshold"] = jnp.float32(0.7)
    if "log_threshold" in params:
        params["log_threshold"] = jnp.array(np.log(generator.uniform(0.1, 0.8, size=N)), jnp.float32)
    return Normalised(dictionary, params, normaliser)


def raw():
    return jnp.array(3 * np.random.default_rng(1).normal(size=(40, D)) + np.arange(D), jnp.float32)


def cfg_of(folder):
    return json.loads((folder / "cfg.json").read_text())


def change(folder, **fields):
    cfg = {**cfg_of(folder), **fields}
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in cfg.items() if value is not None}))


@pytest.mark.parametrize("normaliser", NORMALISERS.values(), ids=NORMALISERS.keys())
@pytest.mark.parametrize("normalisation", ["fold", "keep"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_reads_back_as_the_same_function(tmp_path, kind, normalisation, normaliser):
    dictionary, architecture, returns = KINDS[kind]
    trained, x = made(dictionary, normaliser), raw()
    save_saelens(tmp_path / "a" / "b", trained, PROVENANCE, normalisation)
    again, provenance = load_saelens(tmp_path / "a" / "b")
    assert provenance == PROVENANCE
    cfg = cfg_of(tmp_path / "a" / "b")
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == (architecture, D, N)
    assert type(again.dictionary) is returns
    codes = trained.encode(x)
    assert 40 < np.count_nonzero(codes) < codes.size
    np.testing.assert_allclose(again.encode(x), codes, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(again.decode(codes), trained.decode(codes), rtol=1e-5, atol=1e-5)
    assert {value.dtype for value in jax.tree.leaves(again)} == {jnp.dtype(jnp.float32)}
    if normalisation == "keep":
        # Rounding of 1 / scale is undone by rounding to float32.
        np.testing.assert_array_equal(again.normaliser.scale, normaliser.scale)
        np.testing.assert_array_equal(again.normaliser.centre, normaliser.centre)
    else:
        np.testing.assert_array_equal(again.normaliser.scale, 1)
        assert not np.any(again.normaliser.centre)


@pytest.mark.parametrize(
    ("normaliser", "normalisation", "rule", "files"),
    [
        ("centre and scale", "fold", "none", set()),
        ("centre and scale", "keep", "covariance_whitening", {saelens.SCALER, saelens.WHITENING}),
        ("scale", "keep", "expected_average_only_in", {saelens.SCALER}),
        ("none", "keep", "none", set()),
    ],
)
def test_where_the_normaliser_goes(tmp_path, normaliser, normalisation, rule, files):
    save_saelens(tmp_path, made(L1(n_features=N)), {}, "keep")  # its files must not stay beside another's
    save_saelens(tmp_path, made(L1(n_features=N), NORMALISERS[normaliser]), {}, normalisation)
    assert cfg_of(tmp_path)["normalize_activations"] == rule
    assert {path.name for path in tmp_path.iterdir()} == {saelens.CFG, saelens.WEIGHTS} | files


def test_metadata_in_their_words(tmp_path):
    save_saelens(tmp_path, made(BatchTopK(n_features=N, k=3)), {**PROVENANCE, "bos": "row"})
    metadata = cfg_of(tmp_path)["metadata"]
    ours = metadata.pop("sparse_jax")
    assert ours["dictionary"]["kind"] == "batch-topk"
    assert metadata == {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": None,
        "model_name": "EleutherAI/pythia-70m",
        "model_from_pretrained_kwargs": {"revision": "step1000"},
        "hook_name": "blocks.3.hook_resid_post",
        "context_size": 128,
        "prepend_bos": True,
        "seqpos_slice": [1, None],
        "dataset_path": "novels.txt.gz",
        "training_architecture": "batchtopk",
    }


@pytest.mark.parametrize("bos", ["row", "none"])
@pytest.mark.parametrize("site", ["resid_pre.0", "attn_z.2", "mlp_hidden.11", "mlp_out.1"])
def test_their_metadata_in_our_words(tmp_path, site, bos):
    due = {**PROVENANCE, "site": site, "bos": bos}
    del due["seed"]
    save_saelens(tmp_path, made(L1(n_features=N)), due)
    metadata = cfg_of(tmp_path)["metadata"]
    del metadata["sparse_jax"]
    change(tmp_path, metadata=metadata)
    assert load_saelens(tmp_path)[1] == {**due, "saelens": metadata}


def test_flattened_heads_and_single_ones(tmp_path):
    save_saelens(tmp_path, made(L1(n_features=N)), {"site": "attn_z.2"})
    assert cfg_of(tmp_path)["reshape_activations"] == "hook_z"
    save_saelens(tmp_path, made(L1(n_features=N)), {"site": "attn_z.2", "head": 3})
    assert cfg_of(tmp_path)["reshape_activations"] == "none"
    assert cfg_of(tmp_path)["metadata"]["hook_head_index"] == 3


def test_a_hook_that_is_no_site_does_not_keep_a_dictionary_from_being_read(tmp_path):
    save_saelens(tmp_path, made(L1(n_features=N)), PROVENANCE)
    change(tmp_path, metadata={"hook_name": "blocks.3.ln2.hook_normalized", "sae_lens_version": "6.1.0"})
    _, provenance = load_saelens(tmp_path)
    assert "site" not in provenance
    assert provenance["saelens"]["hook_name"] == "blocks.3.ln2.hook_normalized"


def test_files_of_version_3(tmp_path):
    """Everything flat, hook_point for hook_name, activation_fn_str, a bool for the normalisation, factors of one."""
    trained, x = made(TopK(n_features=N, k=3), NORMALISERS["none"]), raw()
    save_saelens(tmp_path, trained, {})
    weights = load_file(tmp_path / saelens.WEIGHTS)
    save_file({**weights, "scaling_factor": np.ones(N, np.float32)}, tmp_path / saelens.WEIGHTS)
    old = {
        "d_in": D,
        "d_sae": N,
        "dtype": "torch.float32",
        "device": "mps",
        "model_name": "gpt2-small",
        "hook_point": "blocks.5.hook_resid_pre",
        "hook_point_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "normalize_activations": False,
        "context_size": 64,
        "finetuning_scaling_factor": False,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    again, provenance = load_saelens(tmp_path)
    np.testing.assert_allclose(again.encode(x), trained.encode(x), rtol=1e-6)
    assert again.dictionary.k == 3
    theirs = provenance.pop("saelens")
    # Those versions put BOS before every row unless told otherwise.
    assert provenance == {"model": "gpt2-small", "site": "resid_pre.5", "context": 64, "bos": "row"}
    assert theirs["activation_fn_kwargs"] == {"k": 3}


def test_topk_that_rescales_by_decoder_norms(tmp_path):
    """z_i ||d_i|| selects, c_i / ||d_i|| is decoded: by hand in NumPy, from the file as they would write it."""
    trained, x = made(TopK(n_features=N, k=3), NORMALISERS["none"]), np.asarray(raw())
    save_saelens(tmp_path, trained, {})
    change(tmp_path, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    w = load_file(tmp_path / saelens.WEIGHTS)
    norms = np.linalg.norm(w["W_dec"], axis=1)
    z = (x @ w["W_enc"] + w["b_enc"]) * norms
    codes = np.maximum(np.where(z >= np.sort(z, axis=1)[:, [-3]], z, 0), 0)
    again, _ = load_saelens(tmp_path)
    np.testing.assert_allclose(again.encode(jnp.array(x)), codes, rtol=1e-4, atol=1e-5)
    x_hat = codes / norms @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(again.reconstruct(jnp.array(x)), x_hat, rtol=1e-4, atol=1e-4)


def test_a_pursuit_is_kept_and_not_folded(tmp_path):
    trained, x = made(MatchingPursuit(n_features=N, k=3)), raw()
    with pytest.raises(InputError, match="keep the normaliser beside it"):
        save_saelens(tmp_path / "a", trained, PROVENANCE, "fold")
    save_saelens(tmp_path / "a", trained, PROVENANCE, "keep")
    again, _ = load_saelens(tmp_path / "a")
    assert again.dictionary == trained.dictionary
    np.testing.assert_allclose(again.encode(x), trained.encode(x), rtol=1e-5, atol=1e-5)
    change(tmp_path / "a", stop_on_duplicate_support=True)
    with pytest.raises(InputError, match="stops early"):
        load_saelens(tmp_path / "a")


def test_a_threshold_of_zero_or_below_is_a_relu(tmp_path):
    trained = made(JumpReLU(n_features=N), NORMALISERS["none"])
    save_saelens(tmp_path, trained, {})
    weights = load_file(tmp_path / saelens.WEIGHTS)
    weights["threshold"] = np.where(np.arange(N) % 2, 0, -0.5).astype(np.float32)
    save_file(weights, tmp_path / saelens.WEIGHTS)
    again, _ = load_saelens(tmp_path)
    z = raw() @ weights["W_enc"] + weights["b_enc"]
    np.testing.assert_allclose(again.encode(raw()), np.maximum(z, 0), rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_are_read_as_float32(tmp_path):
    trained = made(L1(n_features=N), NORMALISERS["none"])
    save_saelens(tmp_path, trained, {})
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(tmp_path / saelens.WEIGHTS).items()}
    save_file(weights, tmp_path / saelens.WEIGHTS)
    again, _ = load_saelens(tmp_path)
    np.testing.assert_array_equal(again.params["W_dec"], weights["W_dec"].astype(np.float32))
    assert again.params["W_dec"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("dictionary", "provenance", "options", "message"),
    [
        (PCA(n_features=D, k=2), {}, {}, "no architecture for a pca"),
        (L1(n_features=N, activation="softplus"), {}, {}, "no architecture with softplus"),
        (L1(n_features=N), {"site": "mlp_in.2"}, {}, "mlp_in.2: TransformerLens has no hook there"),
        (L1(n_features=N), {}, {"normalisation": "drop"}, "choose fold or keep"),
    ],
)
def test_what_their_format_cannot_say_is_refused_and_nothing_is_written(
    tmp_path, dictionary, provenance, options, message
):
    with pytest.raises(InputError, match=message):
        save_saelens(tmp_path / "new", made(dictionary), provenance, **options)
    assert not (tmp_path / "new").exists()


def test_batch_topk_without_a_threshold_is_refused(tmp_path):
    dictionary = BatchTopK(n_features=N, k=3).sized(D)
    untrained = Normalised(dictionary, dictionary.init(jax.random.key(0)), NORMALISERS["none"])
    with pytest.raises(InputError, match="has no threshold yet"):
        save_saelens(tmp_path, untrained, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "temporal"}, "'temporal' is not known; known are standard"),
        ({"architecture": None}, "'architecture' is None"),
        ({"d_in": None}, "'d_in' is None"),
        ({"d_sae": "16"}, "'d_sae' is '16'"),
        ({"architecture": "topk"}, "'k' is None"),
        ({"d_sae": 17}, r"does not fit cfg\.json"),
        ({"architecture": "gated"}, r"does not fit cfg\.json .* 'b_gate'"),
        ({"normalize_activations": "layer_norm"}, "a number of its own"),
        ({"normalize_activations": "constant_norm_rescale"}, "a number of its own"),
        ({"normalize_activations": "batch_norm"}, "'batch_norm' is not known"),
        ({"normalize_activations": "expected_average_only_in"}, r"activation_scaler\.json, .* is not beside it"),
        ({"normalize_activations": "covariance_whitening"}, r"activation_scaler\.json, .* is not beside it"),
        ({"metadata": None, "activation_fn": "tanh-relu"}, "'tanh-relu' has no counterpart"),
    ],
)
def test_configurations_that_are_refused(tmp_path, fields, message):
    save_saelens(tmp_path, made(L1(n_features=N)), {})
    change(tmp_path, **fields)
    with pytest.raises(InputError, match=message):
        load_saelens(tmp_path)


def test_a_whitening_that_is_no_scale_is_refused(tmp_path):
    save_saelens(tmp_path, made(L1(n_features=N)), {}, "keep")
    whitening = load_file(tmp_path / saelens.WHITENING)
    whitening["inverse_matrix"][0, 1] = 0.1
    save_file(whitening, tmp_path / saelens.WHITENING)
    with pytest.raises(InputError, match="whitens with a matrix"):
        load_saelens(tmp_path)


def test_finetuned_factors_are_refused(tmp_path):
    save_saelens(tmp_path, made(L1(n_features=N)), {})
    weights = load_file(tmp_path / saelens.WEIGHTS)
    save_file({**weights, "scaling_factor": np.full(N, 1.1, np.float32)}, tmp_path / saelens.WEIGHTS)
    with pytest.raises(InputError, match="finetuned"):
        load_saelens(tmp_path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(InputError, match="holds no SAELens dictionary"):
        load_saelens(tmp_path)
    save_saelens(tmp_path, made(L1(n_features=N)), {})
    whole = (tmp_path / saelens.WEIGHTS).read_bytes()
    for damaged in (b"", whole[:60], whole[:-4]):
        (tmp_path / saelens.WEIGHTS).write_bytes(damaged)
        with pytest.raises(InputError, match=r"sae_weights\.safetensors cannot be read"):
            load_saelens(tmp_path)
    (tmp_path / saelens.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"sae_weights\.safetensors cannot be read"):
        load_saelens(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / saelens.CFG).write_text(text)
        with pytest.raises(InputError, match="damaged"):
            load_saelens(tmp_path)


class Full(OSError):
    """The disk is full."""


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_failure_in_the_middle_leaves_no_dictionary(tmp_path, monkeypatch, call):
    save_saelens(tmp_path, made(L1(n_features=N)), {})
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == call:
            raise Full
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(saelens.os, "replace", replace)
        with pytest.raises(Full):
            save_saelens(tmp_path, made(Gated(n_features=N)), {}, "keep")
    with pytest.raises(InputError, match="holds no SAELens dictionary"):
        load_saelens(tmp_path)
    save_saelens(tmp_path, made(Gated(n_features=N)), {}, "keep")
    assert isinstance(load_saelens(tmp_path)[0].dictionary, Gated)


def test_what_cannot_be_written_leaves_the_old_dictionary_alone(tmp_path):
    save_saelens(tmp_path, made(L1(n_features=N)), {"seed": 0})
    with pytest.raises(TypeError):
        save_saelens(tmp_path, made(Gated(n_features=N)), {"seed": object()})
    again, provenance = load_saelens(tmp_path)
    assert (type(again.dictionary), provenance) == (L1, {"seed": 0})
