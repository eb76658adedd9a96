"""Blocks of several sites are those of each site alone, from one forward pass; so are their statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import (
    Blocks,
    RememberedBlocks,
    SiteBlocks,
    Statistics,
    collect_site_statistics,
    collect_statistics,
)
from sparse_jax.activations import (
    blocks as module,
)
from sparse_jax.errors import InputError
from sparse_jax.lm import Edit, Site, add

SITES = (Site("resid_post", 1), Site("mlp_hidden", 0), Site("attn_z", 2), Site("resid_post", 0))
NORMS = {"resid_post.1": 9.3, "mlp_hidden.0": 4.0}  # about the medians


def shifted(tokens):
    return (Edit(Site("resid_pre", 0), add, (jnp.ones(16), jnp.float32(1))),)


def several(lm, rows, sites=SITES, **options):
    return SiteBlocks(lm, rows, sites, **{"seed": 5, "block_rows": 16, **options})


@pytest.mark.parametrize("edits", [None, shifted])
@pytest.mark.parametrize("norms", [{}, NORMS])
def test_each_site_is_what_it_would_be_alone(lm, rows, norms, edits):
    together = several(lm, rows, max_norms=norms, edits_for=edits)
    for index in (0, 3):
        block = together[index]
        assert list(block.x) == list(block.weight)
        assert set(block.x) == {str(site) for site in SITES}
        for site in SITES:
            limit = norms.get(str(site), float("inf"))
            alone = Blocks(lm, rows, site, seed=5, block_rows=16, max_norm=limit, edits_for=edits)[index]
            jax.tree.map(np.testing.assert_array_equal, block.at(str(site)), alone)
    if norms:
        counts = {site: float(weight.sum()) for site, weight in together[0].weight.items()}
        assert 0 < counts["resid_post.1"] != counts["resid_post.0"]


def test_the_sites_come_from_one_pass(lm, rows, monkeypatch):
    passes, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kw: passes.append(kw["stop"]) or forward(*args, **kw))
    one = several(lm, rows, SITES[:2], block_rows=8)
    one[0], one[1]
    assert passes == [2]  # traced once, stopping above the highest site


def test_statistics_of_every_site_need_one_pass_over_the_blocks(lm, rows):
    asked = []

    class Counted(SiteBlocks):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    found = collect_site_statistics(Counted(lm, rows, SITES, 5, 8, NORMS), 3)
    assert asked == [0, 1, 2]
    assert set(found) == {str(site) for site in SITES}
    for site in SITES:
        limit = NORMS.get(str(site), float("inf"))
        alone = collect_statistics(Blocks(lm, rows, site, 5, 8, limit), 3)
        for name in Statistics.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(found[str(site)], name), getattr(alone, name))


def test_memory_is_counted_over_all_sites(lm, rows):
    blocks = several(lm, rows, SITES[:2], block_rows=8)
    bytes_of_one = 4 * (16 + 32) * 8 * 12
    assert sum(x.nbytes for x in blocks[0].x.values()) == bytes_of_one
    for room, kept in ((2 * bytes_of_one, 2), (2 * bytes_of_one - 1, 1)):
        remembered = RememberedBlocks(blocks, 16 + 32, room)
        first = [remembered[i] for i in range(3)]
        again = [remembered[i] for i in range(3)]
        assert [one is other for one, other in zip(first, again)] == [i < kept for i in range(3)]


def test_sites_that_cannot_be_are_refused(lm, rows):
    with pytest.raises(InputError, match="each once"):
        several(lm, rows, (SITES[0], SITES[1], SITES[0]))
    with pytest.raises(InputError, match=r"\(none\): give at least one"):
        several(lm, rows, ())
    with pytest.raises(InputError, match=r"norm for resid_pre\.2: only resid_post\.1"):
        several(lm, rows, max_norms={"resid_pre.2": 3.0})
    with pytest.raises(InputError, match=r"resid_post\.2 is not among .*resid_post\.1"):
        several(lm, rows)[0].at("resid_post.2")


def test_what_is_not_finite_is_named_with_its_site(lm, rows):
    def spoiled(tokens):
        bad = jnp.where(tokens == 17, jnp.inf, 0.0)[..., None]
        return (Edit(Site("mlp_hidden", 2), add, (bad * jnp.ones(32), jnp.float32(1))),)

    sites = (Site("resid_post", 1), Site("mlp_hidden", 2))
    with pytest.raises(InputError, match=r"activation at mlp_hidden\.2 is not finite \(block 0"):
        several(lm, rows, sites, edits_for=spoiled)[0]
