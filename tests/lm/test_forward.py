"""The forward pass: ranges of layers, captures, edits, compilations, gradients, dtypes, and what is refused."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.lm import (
    SITES,
    Edit,
    Site,
    add,
    check_site,
    cross_entropy,
    forward,
    kl_divergence,
    load,
    random_model,
    site_width,
)
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.model import _forward_static, _forward_traced

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
N_LAYERS = 4


@pytest.fixture(scope="module")
def lm(reference, tmp_path_factory):
    """Four parallel layers with far from default weights."""
    return made(reference, tmp_path_factory.mktemp("four"), "float32")


def made(reference, folder, dtype):
    config = reference.MODELS["parallel"].config | {"num_hidden_layers": N_LAYERS}
    return load(reference.write_model(folder, config, reference.random_tensors(config)), dtype=dtype)


def shift(value, amount):
    return value + amount


def scale(value, factor):
    return value * factor


def narrow(value):
    return value[..., :-1]


def halve_dtype(value):
    return value.astype(jnp.bfloat16)


def close(ours, theirs, tolerance=2e-6):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


# Ranges


@pytest.mark.parametrize("split", range(N_LAYERS + 1))
def test_a_pass_in_two_parts_is_the_whole_pass(lm, split):
    whole = forward(lm, TOKENS)
    lower = forward(lm, TOKENS, stop=split)
    assert lower.logits is None
    upper = forward(lm, lower.residual, start=split)
    close(upper.logits, whole.logits)
    close(upper.residual, whole.residual)
    # The same with arrays as bounds.
    lower = forward(lm, TOKENS, stop=jnp.array(split))
    assert lower.logits is None
    close(forward(lm, lower.residual, start=jnp.array(split)).logits, whole.logits)


def test_a_range_ends_at_the_next_layers_resid_pre(lm):
    captured = forward(lm, TOKENS, capture=["resid_pre.2", "resid_post.1"]).captured
    np.testing.assert_array_equal(captured["resid_pre.2"], captured["resid_post.1"])
    close(forward(lm, TOKENS, stop=2).residual, captured["resid_pre.2"])
    middle = forward(lm, captured["resid_pre.2"], start=2, stop=3, capture=["resid_post.2"])
    close(middle.residual, forward(lm, TOKENS, stop=3).residual)
    np.testing.assert_array_equal(middle.residual, middle.captured["resid_post.2"])


def test_traced_bounds_compile_once_for_every_range(lm):
    residual = jnp.ones((3, 5, lm.config.d_model))  # a shape that no other test here has
    before = _forward_traced._cache_size()
    for start in range(N_LAYERS + 1):
        forward(lm, residual, start=jnp.array(start))
    assert _forward_traced._cache_size() == before + 1
    for start, stop in [(0, 2), (1, 2), (np.int64(1), np.int32(4)), (0, jnp.array(3)), (jnp.array(2), 4)]:
        forward(lm, residual, start=jnp.array(start), stop=stop)
    assert _forward_traced._cache_size() == before + 2  # without the head it is another program


def test_bounds_inside_jit(lm):
    @jax.jit
    def upper(residual, start):
        return forward(lm, residual, start=start).logits

    whole = forward(lm, TOKENS).logits
    for split in range(N_LAYERS + 1):
        close(upper(forward(lm, TOKENS, stop=jnp.array(split)).residual, jnp.array(split)), whole)
    assert upper._cache_size() == 1


def test_a_range_does_not_touch_other_layers(lm):
    """Weights of NaN above and below the range change nothing in it."""

    def poisoned(stacked):
        return stacked.at[jnp.array([0, 3])].set(jnp.nan)

    broken = dataclasses.replace(lm, params=lm.params | {"blocks": jax.tree.map(poisoned, lm.params["blocks"])})
    residual = forward(lm, TOKENS, stop=1).residual
    expected = forward(lm, residual, start=1, stop=3).residual
    close(forward(broken, residual, start=1, stop=3).residual, expected)
    close(forward(broken, residual, start=jnp.array(1), stop=jnp.array(3)).residual, expected)


@pytest.mark.parametrize(
    ("start", "stop", "shown"),
    [
        (-1, None, "start -1, stop 4: give 0 <= start <= stop <= 4"),
        (3, 2, "start 3, stop 2"),
        (0, 5, "start 0, stop 5"),
        (jnp.array(2), jnp.array(9), "start 2, stop 9"),
        (jnp.array(-1), None, "start -1"),
    ],
)
def test_a_range_outside_the_model_is_refused(lm, start, stop, shown):
    with pytest.raises(InputError, match=shown):
        forward(lm, jnp.zeros((1, 4, lm.config.d_model)), start=start, stop=stop)


# Captures and edits


def test_captures_are_what_is_asked_for_and_after_the_edits(lm):
    clean = forward(lm, TOKENS, capture=["attn_out.1", "mlp_out.1", "resid_post.1"])
    assert set(clean.captured) == {"attn_out.1", "mlp_out.1", "resid_post.1"}
    added = jnp.linspace(-3, 3, 16)
    edited = forward(lm, TOKENS, capture=["attn_out.1", "resid_post.1"], edits=[Edit("attn_out.1", shift, (added,))])
    close(edited.captured["attn_out.1"], clean.captured["attn_out.1"] + added)
    close(edited.captured["resid_post.1"], clean.captured["resid_post.1"] + added)  # parallel: the MLP sees no change
    assert np.abs(edited.logits - clean.logits).max() > 0.1


@pytest.mark.parametrize("site", SITES)
def test_an_edit_at_every_site_counts(loaded, site):
    """An edit anywhere changes the logits, and only from its own place on."""
    lm = loaded("sequential")
    clean = forward(lm, TOKENS, capture=[f"{name}.0" for name in SITES])
    edited = forward(lm, TOKENS, capture=[f"{name}.0" for name in SITES], edits=[Edit(f"{site}.0", tilt)])
    assert np.abs(edited.logits - clean.logits).max() > 1e-3
    order = list(SITES)
    parallel_parts = {"attn_q": ("attn_k", "attn_v"), "attn_k": ("attn_q", "attn_v"), "attn_v": ("attn_pattern",)}
    untouched = [*order[: order.index(site)], *parallel_parts.get(site, ())]
    for name in untouched:
        np.testing.assert_array_equal(edited.captured[f"{name}.0"], clean.captured[f"{name}.0"])


def tilt(value):
    """Another factor for each entry: a common one or a common shift would vanish in a norm or a softmax."""
    return value * (1 + jnp.arange(value.shape[-1], dtype=value.dtype) / value.shape[-1])


def test_edits_are_made_in_their_order(lm):
    """Two edits at one site do not commute; each is made on what the one before it left."""
    double, one_more = Edit("resid_post.1", scale, (jnp.array(2.0),)), Edit("resid_post.1", shift, (jnp.array(1.0),))
    clean = forward(lm, TOKENS, stop=2).residual
    site = Site("resid_post", 1)
    for bounds in ({"stop": 2}, {"stop": jnp.array(2)}):
        close(forward(lm, TOKENS, edits=[double, one_more], **bounds).residual, 2 * clean + 1)
        close(forward(lm, TOKENS, edits=(one_more, double), **bounds).residual, 2 * (clean + 1))
    captured = forward(lm, TOKENS, capture=[site], edits=[double, one_more], stop=2).captured
    close(captured["resid_post.1"], 2 * clean + 1)


def test_edits_at_several_layers(lm):
    edits = [Edit("resid_post.3", shift, (jnp.array(1.0),)), Edit("resid_post.0", scale, (jnp.array(3.0),))]
    by_hand = 3 * forward(lm, TOKENS, stop=1).residual
    by_hand = forward(lm, by_hand, start=1, stop=4).residual + 1
    close(forward(lm, TOKENS, edits=edits).residual, by_hand)
    close(forward(lm, TOKENS, edits=edits, stop=jnp.array(4)).residual, by_hand)


def test_an_edit_outside_a_range_known_only_in_jit_changes_nothing(lm):
    @jax.jit
    def lower(stop):
        return forward(lm, TOKENS, edits=[Edit("resid_post.2", shift, (jnp.array(1.0),))], stop=stop).residual

    clean = [forward(lm, TOKENS, stop=stop).residual for stop in (2, 3)]
    close(lower(jnp.array(2)), clean[0])
    close(lower(jnp.array(3)), clean[1] + 1)


def test_other_arguments_of_an_edit_compile_nothing_new(lm):
    tokens = np.ones((1, 6), np.int32)  # a shape that no other test here has
    before = _forward_static._cache_size(), _forward_traced._cache_size()
    for i in range(5):
        edits = [Edit("mlp_out.1", add, (jnp.full(lm.config.d_model, float(i)), jnp.array(0.5 * i)))]
        forward(lm, tokens, edits=edits, capture=["resid_post.2"])
        forward(lm, tokens, edits=edits, stop=jnp.array(2 + i % 2))
    assert (_forward_static._cache_size(), _forward_traced._cache_size()) == (before[0] + 1, before[1] + 1)


def test_many_edits_at_once_by_vmap(lm):
    """A leading axis on an edit's arguments is that many interventions in one compiled program."""
    amounts = jnp.array([0.0, 1.0, -2.0])

    def with_amount(amount):
        return forward(lm, TOKENS, edits=[Edit("resid_post.2", shift, (amount,))]).logits

    for amount, logits in zip(amounts, jax.vmap(with_amount)(amounts), strict=True):
        close(logits, with_amount(amount), 1e-5)


@pytest.mark.parametrize(("fn", "shown"), [(narrow, r"\[2, 7, 15\]"), (halve_dtype, "bfloat16")])
@pytest.mark.parametrize("stop", [None, jnp.array(2)])
def test_an_edit_that_changes_shape_or_dtype_is_refused(lm, fn, shown, stop):
    with pytest.raises(ValueError, match=rf"resid_post\.1 turned float32.*{shown}.* keeps shape and dtype"):
        forward(lm, TOKENS, edits=[Edit("resid_post.1", fn)], stop=stop)


# Sites


def test_site_names():
    with pytest.raises(InputError, match=r"site 'nowhere\.1': give NAME\.LAYER with NAME one of resid_pre"):
        Site("nowhere", 1)
    assert Site.parse("resid_post.3") == Site("resid_post", 3) == Site.parse(Site("resid_post", 3))
    assert str(Site("attn_z", 11)) == "attn_z.11"
    assert {Site.parse(f"{name}.2").name for name in SITES} == set(SITES)
    assert Edit("blocks.1.hook_resid_pre", narrow).site == Site("resid_pre", 1)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.3.hook_resid_pre", "resid_pre.3"),
        ("blocks.3.hook_resid_mid", "resid_mid.3"),
        ("blocks.10.hook_resid_post", "resid_post.10"),
        ("blocks.0.hook_attn_out", "attn_out.0"),
        ("blocks.0.hook_mlp_out", "mlp_out.0"),
        ("blocks.0.attn.hook_q", "attn_q.0"),
        ("blocks.0.attn.hook_k", "attn_k.0"),
        ("blocks.0.attn.hook_v", "attn_v.0"),
        ("blocks.0.attn.hook_pattern", "attn_pattern.0"),
        ("blocks.0.attn.hook_z", "attn_z.0"),
        ("blocks.0.mlp.hook_post", "mlp_hidden.0"),
    ],
)
def test_transformer_lens_names(theirs, ours):
    assert str(Site.parse(theirs)) == ours


def test_transformer_lens_names_capture(lm):
    captured = forward(lm, TOKENS, capture=["blocks.1.hook_resid_post", "resid_post.1", "blocks.0.attn.hook_pattern"])
    assert set(captured.captured) == {"resid_post.1", "attn_pattern.0"}


@pytest.mark.parametrize(
    ("site", "shown"),
    [
        ("resid_psot.1", "site 'resid_psot.1': give NAME.LAYER with NAME one of resid_pre, attn_q"),
        ("resid_post", "give NAME.LAYER"),
        ("resid_post.-1", "give NAME.LAYER"),
        ("resid_post.4", "site resid_post.4: the model has layers 0 to 3"),
        ("blocks.1.hook_mlp_in", "corresponds to TransformerLens' 'hook_mlp_in'; known are hook_resid_pre"),
        ("resid_mid.1", "attention and MLP run in parallel here"),
        (Site("resid_mid", 1), "site resid_mid.1: a gpt_neox model of this config has none"),
        (Site("resid_post", -1), "layers 0 to 3"),
    ],
)
def test_a_site_that_is_not_there_is_refused(lm, site, shown):
    for stop in (None, jnp.array(4)):
        with pytest.raises(InputError) as raised:
            forward(lm, TOKENS, edits=[Edit(site, scale, (jnp.array(1.0),))], stop=stop)
        assert shown in str(raised.value)
    with pytest.raises(InputError) as raised:
        forward(lm, TOKENS, capture=[site])
    assert shown in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (3, None), (2, 2)])
def test_a_site_outside_the_range_is_refused(lm, start, stop):
    inputs = jnp.zeros((2, 5, lm.config.d_model))
    shown = f"site attn_out.2 lies outside the layers that are run, {start} <= layer < {4 if stop is None else stop}"
    with pytest.raises(InputError, match=shown):
        forward(lm, inputs, capture=["attn_out.2"], start=start, stop=stop)
    edits = [Edit("attn_out.2", scale, (jnp.array(1.0),))]
    for bound in (start, jnp.array(start)):
        with pytest.raises(InputError, match=shown):
            forward(lm, inputs, edits=edits, start=bound, stop=stop)


def test_captures_with_array_bounds_are_refused(lm):
    with pytest.raises(InputError, match="captures need a range given by Python ints"):
        forward(lm, TOKENS, capture=["resid_post.0"], stop=jnp.array(2))


def test_a_sequential_model_has_resid_mid(loaded):
    lm = loaded("sequential")
    assert check_site(lm.config, "resid_mid.1") == Site("resid_mid", 1)
    values = forward(lm, TOKENS, capture=["resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1"])
    values = values.captured
    close(values["resid_mid.1"], values["resid_pre.1"] + values["attn_out.1"])
    close(values["resid_post.1"], values["resid_mid.1"] + values["mlp_out.1"])


def test_site_widths(lm):
    sites = [f"{name}.1" for name in SITES if name not in ("resid_mid", "attn_pattern")]
    captured = forward(lm, TOKENS, capture=sites).captured
    for site in sites:
        assert captured[site].shape[:2] == TOKENS.shape
        assert captured[site][0, 0].size == site_width(lm.config, site)
    with pytest.raises(InputError, match="attention pattern has no fixed width"):
        site_width(lm.config, "attn_pattern.0")


def test_the_pattern_is_a_causal_distribution(lm):
    pattern = forward(lm, TOKENS, capture=["attn_pattern.1"]).captured["attn_pattern.1"]
    assert pattern.shape == (2, lm.config.n_heads, 7, 7)
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-6)
    assert np.all(np.triu(pattern, 1) == 0)


# Inputs


@pytest.mark.parametrize(
    ("inputs", "start", "shown"),
    [
        (np.zeros(7, np.int32), 0, r"token ids have shape \[7\]; give \[batch, position\]"),
        (np.zeros((1, 2, 3), np.int32), 0, "give .batch, position."),
        (np.zeros((2, 7), np.int32), 1, "token ids enter at layer 0, not at start=1; give the residual stream"),
        (np.zeros((2, 7), np.int32), jnp.array(0), "give the residual stream"),
        (np.zeros((2, 7), np.float32), 0, r"\[batch, position, 16\]; got \[2, 7\] \(token ids must be integers\)"),
        (np.zeros((2, 7, 15), np.float32), 0, r"got \[2, 7, 15\]"),
        (np.zeros((1, 65), np.int32), 0, "65 positions: the model takes 1 to 64"),
        (np.zeros((1, 65, 16), np.float32), 0, "65 positions: the model takes 1 to 64"),
    ],
)
def test_wrong_inputs_are_refused(lm, inputs, start, shown):
    with pytest.raises(InputError, match=shown):
        forward(lm, inputs, start=start)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.int8])
def test_any_integer_dtype_is_a_token_id(lm, dtype):
    np.testing.assert_array_equal(forward(lm, TOKENS.astype(dtype)).logits, forward(lm, TOKENS).logits)


def test_a_changed_token_changes_nothing_before_it(lm):
    sites = [f"{name}.{layer}" for name in SITES if name != "resid_mid" for layer in range(N_LAYERS)]
    clean = forward(lm, TOKENS, capture=sites)
    for position in (3, 6):
        tokens = TOKENS.copy()
        tokens[:, position] = (tokens[:, position] + 1) % lm.config.vocab_size
        other = forward(lm, tokens, capture=sites)
        np.testing.assert_array_equal(other.logits[:, :position], clean.logits[:, :position])
        assert np.abs(other.logits[:, position:] - clean.logits[:, position:]).max(-1).min() > 1e-4
        for site in sites:
            ours, theirs = other.captured[site], clean.captured[site]
            if site.startswith("attn_pattern"):
                ours, theirs = ours.swapaxes(1, 2), theirs.swapaxes(1, 2)
            np.testing.assert_array_equal(ours[:, :position], theirs[:, :position])


def test_rows_do_not_see_each_other(lm):
    close(forward(lm, TOKENS[1:]).logits, forward(lm, TOKENS).logits[1:])


# Gradients


def loss_of(lm, residual, amount, params):
    """Mean cross-entropy of running layers 1 to 4 from a residual stream, with a direction added on the way."""
    lm = dataclasses.replace(lm, params=params)
    direction = jnp.linspace(-1, 1, lm.config.d_model, dtype=residual.dtype)
    edits = [Edit("resid_post.1", add, (direction, amount))]
    logits = forward(lm, residual, edits=edits, start=1).logits
    return cross_entropy(logits, jnp.roll(TOKENS, -1, axis=1)).mean()


def test_gradients_through_a_range_are_finite_differences(reference, tmp_path, x64):
    lm = made(reference, tmp_path / "model", "float64")
    residual, amount = forward(lm, TOKENS, stop=1).residual, jnp.array(0.3)
    loss, random, step = jax.jit(partial(loss_of, lm)), np.random.default_rng(0), 1e-5
    at = jax.tree.map(np.asarray, (residual, amount, lm.params))
    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(partial(loss_of, lm), (0, 1, 2)))(*at))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    for part in (0, 0, 0, 1, 2, 2, 2):
        way = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), at[part])

        def moved(factor, part=part, way=way):
            there = jax.tree.map(lambda leaf, along: leaf + factor * along, at[part], way)
            return float(loss(*at[:part], there, *at[part + 1 :]))

        slope = (moved(step) - moved(-step)) / (2 * step)
        inner = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient[part]), jax.tree.leaves(way), strict=True))
        np.testing.assert_allclose(inner, slope, rtol=1e-6)
    # Layer 0 and the embedding lie outside the range.
    by_params = gradient[2]
    assert not np.any(by_params["embed"]["tokens"])
    assert all(not np.any(leaf[0]) and np.any(leaf[1:]) for leaf in jax.tree.leaves(by_params["blocks"]))


def test_an_array_bound_is_not_differentiable(lm):
    """Said in the docstring; the static range is the one to differentiate."""
    residual = forward(lm, TOKENS, stop=1).residual

    def loss(residual):
        return forward(lm, residual, start=jnp.array(1)).logits.sum()

    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        jax.grad(loss)(residual)


# Dtypes and random models


def test_bfloat16_is_near_float32():
    tokens = np.random.default_rng(0).integers(2, 4096, (2, 32))
    sites = ["attn_pattern.2", "mlp_hidden.2", "resid_post.2", "resid_post.5"]
    exact, rounded = (forward(load(dtype=dtype), tokens, capture=sites) for dtype in ("float32", "bfloat16"))
    assert rounded.logits.dtype == jnp.float32
    assert {value.dtype for value in rounded.captured.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {value.dtype for value in exact.captured.values()} == {jnp.dtype(jnp.float32)}
    for ours, theirs in [(rounded.captured[site], exact.captured[site]) for site in sites]:
        close(ours.astype(np.float32), theirs, 3e-2)
    close(rounded.logits, exact.logits, 3e-2)


def test_bfloat16_with_edits_and_array_bounds(reference, model_folder):
    lm = load(model_folder("parallel"), dtype="bfloat16")
    edits = [Edit("resid_post.1", add, (jnp.ones(16), jnp.array(0.5)))]
    static = forward(lm, TOKENS, edits=edits)
    traced = forward(lm, forward(lm, TOKENS, stop=1).residual, edits=edits, start=jnp.array(1))
    assert static.residual.dtype == traced.residual.dtype == jnp.bfloat16
    close(traced.logits, static.logits, 3e-2)


def test_float64_with_array_bounds(loaded, x64):
    lm = loaded("parallel", "float64")
    whole = forward(lm, TOKENS)
    upper = forward(lm, forward(lm, TOKENS, stop=2).residual, start=jnp.array(2, jnp.int32))
    assert whole.logits.dtype == jnp.float64
    close(upper.logits, whole.logits, 1e-13)


CONFIG = GPTNeoXConfig(
    n_layers=3, d_model=64, d_mlp=128, n_heads=4, vocab_size=200, max_positions=32, initializer_range=0.05
)


def test_random_model():
    draw = jax.jit(partial(random_model, CONFIG))
    lm, same, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), lm.params, same.params))
    attn, mlp = lm.params["blocks"]["attn"], lm.params["blocks"]["mlp"]
    drawn = [attn["qkv"]["kernel"], attn["out"]["kernel"], mlp["up"]["kernel"], mlp["down"]["kernel"]]
    drawn += [lm.params["embed"]["tokens"], lm.params["head"]["unembed"]]
    for matrix in drawn:
        np.testing.assert_allclose(jnp.std(matrix), 0.05, rtol=0.05)
        assert abs(jnp.mean(matrix)) < 0.002
    assert np.abs(attn["out"]["kernel"][0] - attn["out"]["kernel"][1]).max() > 0.05  # each layer has its own
    assert not np.array_equal(lm.params["embed"]["tokens"], lm.params["head"]["unembed"])
    assert not np.array_equal(lm.params["embed"]["tokens"], other.params["embed"]["tokens"])
    for norm in (lm.params["blocks"]["ln_attn"], lm.params["blocks"]["ln_mlp"], lm.params["head"]["norm"]):
        assert np.all(norm["scale"] == 1)
        assert not np.any(norm["bias"])
    assert not any(np.any(layer["bias"]) for layer in (attn["qkv"], attn["out"], mlp["up"], mlp["down"]))
    logits = forward(lm, TOKENS).logits
    assert logits.shape == (2, 7, 200)
    assert np.isfinite(logits).all()


def test_a_random_model_has_the_shapes_of_a_loaded_one(lm):
    drawn = jax.eval_shape(partial(random_model, lm.config), jax.random.key(0)).params
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, lm.params)


def test_a_random_model_of_a_tied_config_is_tied():
    tied = dataclasses.replace(CONFIG, tied_embeddings=True)
    params = jax.jit(partial(random_model, tied))(jax.random.key(0)).params
    assert set(params["head"]) == {"norm"}  # the embedding is used again
    lm = random_model(tied, jax.random.key(0))
    out = forward(lm, TOKENS)
    residual = np.asarray(out.residual - out.residual.mean(-1, keepdims=True))
    normed = residual / np.sqrt((residual**2).mean(-1, keepdims=True) + 1e-5)
    close(out.logits, normed @ np.asarray(lm.params["embed"]["tokens"]).T, 1e-5)


# Losses


def test_cross_entropy_and_kl_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]])) + 3  # a common shift changes nothing
    losses = cross_entropy(logits, jnp.array([[1, -1]]))
    np.testing.assert_allclose(losses, [[np.log(4), 0]], rtol=1e-6)
    other = jnp.log(jnp.array([[[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]]))
    np.testing.assert_allclose(kl_divergence(logits, other), [[0.25 * np.log(2), 0]], atol=1e-6)
