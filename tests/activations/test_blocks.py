"""Blocks of activations are a function of their number, and hold what the model computes at the site."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Blocks, activations
from sparse_jax.activations.blocks import rows_in_chunk
from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, Site, add, forward, put

SITE = Site("resid_post", 1)


def blocks(lm, rows, **options):
    return Blocks(lm, rows, **{"site": SITE, "seed": 5, "block_rows": 8, **options})


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# The order


def test_a_block_is_a_function_of_its_number(lm, rows):
    one, other = blocks(lm, rows), blocks(lm, rows)
    forwards = [one[i] for i in range(4)]
    for i in (3, 1, 1, 0, 2):
        assert_equal(other[i], forwards[i])


def test_blocks_differ_from_each_other_and_by_seed(lm, rows):
    first, second = blocks(lm, rows)[0], blocks(lm, rows)[1]
    assert np.any(first.place != second.place)
    assert np.any(first.token != second.token)
    other = blocks(lm, rows, seed=6)
    assert np.any(other[0].place != first.place)
    assert np.any(other.row_numbers(0) != blocks(lm, rows).row_numbers(0))
    # The same rows in another epoch are shuffled otherwise.
    whole = blocks(lm, rows, block_rows=24)
    assert sorted(whole.row_numbers(0)) == sorted(whole.row_numbers(1))
    assert np.any(whole[0].place != whole[1].place)


@pytest.mark.parametrize("n_rows", [24, 20])
def test_an_epoch_holds_each_row_once(lm, make_rows, n_rows):
    cut = blocks(lm, make_rows(n_rows))
    numbers = np.concatenate([cut.row_numbers(i) for i in range(10)])
    for epoch in range(80 // n_rows):
        assert sorted(numbers[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_tokens_are_mixed_and_each_is_there_once(lm, rows):
    block = blocks(lm, rows)[0]
    assert blocks(lm, rows).tokens_per_block == len(block.place) == 8 * 12
    assert sorted(block.place) == list(range(8 * 12))
    assert np.mean(np.diff(block.place) == 1) < 0.2


# What stands in it


def test_places_tokens_and_activations_belong_together(lm, rows):
    cut = blocks(lm, rows)
    for i in (0, 2):
        block = cut[i]
        tokens, _, mask, _ = rows[cut.row_numbers(i)]
        x = forward(lm, tokens, capture=[SITE]).captured[str(SITE)]
        row, position = np.divmod(block.place, 12)
        np.testing.assert_array_equal(block.token, tokens[row, position])
        np.testing.assert_allclose(block.x, x[row, position], atol=1e-5)
        np.testing.assert_array_equal(block.weight, mask[row, position])
        assert (block.x.dtype, block.weight.dtype, block.token.dtype) == (jnp.float32, jnp.float32, jnp.int32)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_separators_and_first_positions_do_not_count(lm, make_rows, skip):
    block = blocks(lm, make_rows(skip_positions=skip))[0]
    np.testing.assert_array_equal(block.weight, (block.token != 0) & (block.place % 12 >= skip))
    assert 0 < block.weight.sum() < len(block.weight)


def test_large_norms_do_not_count(lm, rows):
    every = blocks(lm, rows)[0]
    norms = np.linalg.norm(every.x, axis=1)
    limit = float(np.median(norms))
    some = blocks(lm, rows, max_norm=limit)[0]
    sure = np.abs(norms - limit) > 1e-4
    np.testing.assert_array_equal(some.weight[sure], (np.asarray(every.weight) * (norms <= limit))[sure])
    assert_equal(some._replace(weight=every.weight), every)
    assert not np.any(blocks(lm, rows, max_norm=0.0)[0].weight)


def test_bfloat16_models_give_float32(lm, rows):
    block = blocks(dataclasses.replace(lm, dtype="bfloat16"), rows)[0]
    exact = blocks(lm, rows)[0]
    assert block.x.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(block.x - exact.x) / np.linalg.norm(exact.x) < 0.05


# Not finite


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_named(lm, rows, value):
    token = 17
    embedding = lm.params["embed"]["tokens"].at[token, 3].set(value)
    poisoned = dataclasses.replace(lm, params={**lm.params, "embed": {"tokens": embedding}})
    cut = blocks(poisoned, rows, site=Site("resid_pre", 0))
    tokens = rows[cut.row_numbers(1)].tokens
    row, position = np.argwhere(tokens == token)[0]
    with pytest.raises(InputError, match="not finite") as caught:
        cut[1]
    for part in (
        "resid_pre.0",
        "block 1",
        f"row {cut.row_numbers(1)[row]} of the text",
        f"position {position}",
        f"token id {token}",
    ):
        assert part in str(caught.value)


def spoil(value, bad):
    return jnp.where(bad[..., None], jnp.nan, value)


def at_token_17(tokens):
    return (Edit(SITE, spoil, (tokens == 17,)),)


def test_a_masked_place_may_not_be_bad_either(lm, make_rows):
    """It would reach the statistics as 0 x NaN."""
    rows = make_rows(masked_ids=(0, 17))
    cut = blocks(lm, rows, edits_for=at_token_17)
    numbers = cut.row_numbers(0)
    row, position = np.argwhere(rows[numbers].tokens == 17)[0]
    with pytest.raises(InputError, match=f"row {numbers[row]} of the text, position {position}, token id 17"):
        cut[0]


# activations()


def test_activations_are_the_captured_values(lm, rows):
    tokens = jnp.array(rows[0:8].tokens)
    sites = ("resid_pre.0", "attn_z.1", "mlp_hidden.1", "resid_post.2")
    captured = forward(lm, tokens, capture=sites).captured
    for site in sites:
        expected = np.asarray(captured[site])
        if site == "attn_z.1":
            expected = np.concatenate([expected[..., head, :] for head in range(4)], axis=-1)
        x = activations(lm, tokens, Site.parse(site))
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, expected, atol=1e-5)


def test_chunks_change_nothing(lm, rows):
    tokens = jnp.array(rows[0:16].tokens)
    apart = [activations(lm, tokens[i : i + 4], SITE) for i in range(0, 16, 4)]
    np.testing.assert_allclose(activations(lm, tokens, SITE), np.concatenate(apart), atol=1e-5)


@pytest.mark.parametrize("n_rows", [4, 16])
def test_nothing_above_the_site_is_needed(lm, rows, n_rows):
    tokens = jnp.array(rows[0:n_rows].tokens)
    above = jax.tree.map(lambda value: value.at[2:].set(jnp.nan), lm.params["blocks"])
    broken = dataclasses.replace(
        lm,
        params={**lm.params, "blocks": above, "head": jax.tree.map(lambda v: v * jnp.nan, lm.params["head"])},
    )
    np.testing.assert_array_equal(activations(broken, tokens, SITE), activations(lm, tokens, SITE))


def test_nothing_above_the_site_is_in_the_program(lm, rows):
    """Layers below, between which nobody looks, are one loop there."""
    tokens = jnp.array(rows[0:8].tokens)
    first, third = (
        activations.lower(lm, tokens, Site("resid_post", layer)).cost_analysis()["flops"] for layer in (0, 2)
    )
    assert first < 0.6 * third


def by_token(tokens):
    """An edit below the site that depends on the token ids."""
    return (
        Edit(Site("resid_pre", 0), put, (jnp.sin(tokens.astype(jnp.float32)[..., None] + jnp.arange(16.0)),)),
        Edit(Site("mlp_out", 1), add, (jnp.ones(16), jnp.float32(2))),
    )


@pytest.mark.parametrize("n_rows", [8, 16])
def test_edits_are_those_for_the_rows_at_hand(lm, rows, n_rows):
    tokens = jnp.array(rows[0:n_rows].tokens)
    expected = forward(lm, tokens, capture=[SITE], edits=by_token(tokens)).captured[str(SITE)]
    np.testing.assert_allclose(activations(lm, tokens, SITE, by_token), expected, atol=1e-5)
    assert np.abs(activations(lm, tokens, SITE) - expected).max() > 0.1


def test_blocks_run_under_their_edits(lm, rows):
    cut = blocks(lm, rows, edits_for=by_token)
    tokens = jnp.array(rows[cut.row_numbers(0)].tokens)
    expected = activations(lm, tokens, SITE, by_token).reshape(-1, 16)
    np.testing.assert_allclose(cut[0].x, expected[cut[0].place], atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "context", "chunk"), [(16, 256, 8), (16, 1024, 2), (8, 4096, 1), (3, 256, 3), (6, 512, 6)]
)
def test_long_rows_go_through_the_model_fewer_at_a_time(rows, context, chunk):
    assert rows_in_chunk(rows, context) == chunk


def test_the_values_do_not_depend_on_how_many_rows_go_through_at_once(lm, rows, monkeypatch):
    tokens = jnp.array(rows[np.arange(16)].tokens)
    due = activations(lm, tokens, SITE)
    monkeypatch.setattr("sparse_jax.activations.blocks.CHUNK_TOKENS", 2 * 12)
    jax.clear_caches()
    np.testing.assert_allclose(activations(lm, tokens, SITE), due, rtol=0, atol=1e-5)
