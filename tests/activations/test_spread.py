"""Blocks over a mesh are those of one device: the same tokens in the same batches, each sent to one device once."""

import re

import jax
import numpy as np
import pytest

from benchmarks.sharded_cost import collective_shapes
from sparse_jax.activations import (
    Ahead,
    Blocks,
    BlocksAt,
    Entry,
    Manifest,
    RememberedBlocks,
    Share,
    SiteBlocks,
    StoredBlocks,
    collect_site_statistics,
    collect_statistics,
    open_store,
)
from sparse_jax.activations import spread_harvest as module
from sparse_jax.activations.harvest import harvest
from sparse_jax.activations.spread import Spread, _batch_at, routes
from sparse_jax.errors import InputError
from sparse_jax.lm import Site
from sparse_jax.lm.model import LanguageModel
from sparse_jax.numerics.whole import to_host, to_local
from sparse_jax.training.loop import _slice
from sparse_jax.training.mesh import MeshShape, batch_sharding, make_mesh
from tests.activations.conftest import CONTEXT, N_ROWS, SEPARATOR, VOCAB

SITES = (Site("resid_post", 1), Site("attn_z", 2))
BATCH, ROWS = 48, 32


def spread_over(shape, batch=BATCH):
    shape = MeshShape.parse(shape)
    return Spread(batch_sharding(make_mesh(shape, jax.devices()[: shape.size])), batch)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def check_same_batches(spread, block, whole):
    """Every batch of a spread block is that of a whole one, in order; activations but for rounding."""
    for number in range(len(whole.token) // BATCH):
        taken = spread.batch_at(block, number)
        for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(_slice(whole, number * BATCH, BATCH))):
            close(np.asarray(ours), np.asarray(theirs))
            assert ours.sharding.is_equivalent_to(spread.sharding, ours.ndim)


@pytest.mark.parametrize("shape", ["data=4", "data=2,features=2", "data=2,ensemble=2", "data=1,features=4"])
def test_batches_are_those_of_one_device(shape, lm, rows):
    spread = spread_over(shape)
    options = {"seed": 5, "block_rows": ROWS, "max_norms": {"resid_post.1": 9.3}}
    whole, over = SiteBlocks(lm, rows, SITES, **options), SiteBlocks(lm, rows, SITES, **options, spread=spread)
    for index in (0, 2):
        block = over[index]
        for leaf in jax.tree.leaves(block):
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {ROWS * CONTEXT // spread.parts}
        check_same_batches(spread, block, whole[index])
        assert np.array_equal(spread.in_order(np.asarray(block.place)), whole[index].place)
        assert 0 < np.asarray(block.weight["resid_post.1"]).mean() < np.asarray(block.weight["attn_z.2"]).mean()


def test_one_site_and_remembered_blocks(lm, rows):
    spread = spread_over("data=4")
    over = RememberedBlocks(Blocks(lm, rows, SITES[0], 5, ROWS, spread=spread), 16)
    assert over.spread is spread
    assert over[1] is over[1]
    check_same_batches(spread, over[1], Blocks(lm, rows, SITES[0], 5, ROWS)[1])
    first = spread.leading(over[1].x, 50)
    close(np.asarray(first), np.asarray(Blocks(lm, rows, SITES[0], 5, ROWS)[1].x)[:48])


def test_statistics_are_those_of_one_device(lm, rows):
    spread = spread_over("data=4")
    ours = collect_site_statistics(SiteBlocks(lm, rows, SITES, 5, ROWS, spread=spread), 2)
    theirs = collect_site_statistics(SiteBlocks(lm, rows, SITES, 5, ROWS), 2)
    for site in map(str, SITES):
        for name in ("tokens", "mean", "covariance", "median_norm", "token_sum", "token_count"):
            close(np.asarray(getattr(ours[site], name)), np.asarray(getattr(theirs[site], name)))
    alone = collect_statistics(Blocks(lm, rows, SITES[0], 5, ROWS, spread=spread), 2)
    close(alone.mean, theirs[str(SITES[0])].mean)


def test_each_token_is_sent_once_and_no_block_is_gathered(lm, rows, monkeypatch):
    """The compiled harvest has all-to-alls of about a device's part; what it gathers is a few numbers."""
    asked = {}
    compiled = module._harvest
    monkeypatch.setattr(
        module,
        "_harvest",
        lambda *args: asked.update(text=compiled.lower(*args).compile().as_text()) or compiled(*args),
    )
    spread = spread_over("data=4")
    SiteBlocks(lm, rows, SITES, 5, ROWS, spread=spread)[0]
    part = ROWS * CONTEXT // 4 * 16
    kinds = ("all-to-all", "all-gather", "all-reduce", "collective-permute")
    shapes = {kind: collective_shapes(asked["text"], kind) for kind in kinds}
    sizes = {kind: max(int(np.prod(shape)) for shape in found) for kind, found in shapes.items() if found}
    assert "all-to-all" in sizes
    assert sizes["all-to-all"] <= 1.5 * part
    assert max([size for kind, size in sizes.items() if kind != "all-to-all"], default=0) <= 64
    batch = spread.batch_at  # and to take a batch nothing is exchanged at all
    x = jax.device_put(np.zeros((ROWS * CONTEXT, 16), np.float32), spread.sharding)
    batch(x, 1)
    assert not re.search(r"all-|collective", _batch_at.lower(x, np.int32(1), spread).compile().as_text())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_routes_bring_every_token_to_its_place(parts):
    sources = np.random.default_rng(0).permutation(64)
    way = routes(sources, parts)
    own = np.arange(64).reshape(parts, -1)
    sent = np.stack([own[sender][way.send[sender]] for sender in range(parts)])  # [sender, receiver, slot]
    received = np.concatenate(
        [sent[:, place].reshape(-1)[way.receive.reshape(parts, -1)[place]] for place in range(parts)]
    )
    np.testing.assert_array_equal(received, sources)


def test_only_the_rows_of_this_processs_devices_are_read(lm, rows):
    """Here one process has all devices: each row is read once, part by part."""
    read = []

    class Watched:
        def __getattr__(self, name):
            return getattr(rows, name)

        def __getitem__(self, numbers):
            read.append(np.asarray(numbers))
            return rows[numbers]

    over = SiteBlocks(lm, Watched(), SITES, 5, ROWS, spread=spread_over("data=4"))
    over[1]
    assert [len(each) for each in read] == [ROWS // 4] * 4
    np.testing.assert_array_equal(np.concatenate(read), over.row_numbers(1))


def test_an_activation_that_is_not_finite_is_named_as_on_one_device(lm, rows):
    embed = lm.params["embed"]["tokens"].at[7].set(np.nan)
    params = {**lm.params, "embed": {**lm.params["embed"], "tokens": embed}}
    broken = LanguageModel(params, lm.config, lm.dtype, lm.name)
    said = []
    for spread in (None, spread_over("data=4")):
        with pytest.raises(InputError, match="not finite") as raised:
            Blocks(broken, rows, SITES[0], 5, ROWS, spread=spread)[0]
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_what_a_mesh_does_not_divide(lm, rows):
    with pytest.raises(InputError, match="data=4 of the mesh does not divide the batch of 6 tokens"):
        spread_over("data=4", batch=6)
    with pytest.raises(InputError, match="data=4 of the mesh does not divide a block of 6 rows"):
        SiteBlocks(lm, rows, SITES, 5, 6, spread=spread_over("data=4"))
    with pytest.raises(InputError, match="96 tokens holds no whole number of batches of 64"):
        SiteBlocks(lm, rows, SITES, 5, 8, spread=spread_over("data=4", batch=64))


def test_arrays_come_back_whole():
    spread = spread_over("data=4")
    values = np.arange(24.0).reshape(8, 3)
    tree = {"x": jax.device_put(values, spread.sharding), "key": jax.random.key(3), "name": "x"}
    host, local = to_host(tree), to_local(tree)
    np.testing.assert_array_equal(host["x"], values)
    assert isinstance(host["x"], np.ndarray)
    assert host["name"] == "x"
    assert len(local["x"].devices()) == 1
    assert jax.random.key_data(local["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()


def test_blocks_from_a_store_are_those_of_one_device_to_the_bit(lm, rows, tmp_path):
    entries = tuple(Entry(site, 16) for site in SITES)
    described = Manifest({"model": "tiny"}, entries, CONTEXT, SEPARATOR, VOCAB, 8, N_ROWS, None)
    harvest(lm, rows, tmp_path / "store", described)
    store, spread = open_store(tmp_path / "store"), spread_over("data=4")
    whole, over = StoredBlocks(store, SITES, 5, ROWS), StoredBlocks(store, SITES, 5, ROWS, spread=spread)
    for ours, theirs in zip(jax.tree.leaves(over[1]), jax.tree.leaves(whole[1])):
        assert ours.sharding.is_equivalent_to(spread.sharding, ours.ndim)
        np.testing.assert_array_equal(spread.in_order(np.asarray(ours)), theirs)
    with Ahead(BlocksAt(over, SITES[1]), 1) as ahead:
        assert ahead.spread is spread
        check_same_batches(spread, ahead[0], whole[0].at(str(SITES[1])))
        check_same_batches(spread, ahead[1], whole[1].at(str(SITES[1])))
    with pytest.raises(InputError, match="leave out the share"):
        StoredBlocks(store, SITES, 5, ROWS, share=Share(0, 2, BATCH), spread=spread)
