"""Activations in seeded blocks: block `b` of a run is a pure function of the text, the model, the seed and `b`.

A block is `block_rows` rows of text, run through the model up to the site and shuffled by token. Which rows it holds
follows from `rows.row_indices(seed, ...)`, the shuffle from `fold_in(key, b)`: (block, offset) is the whole position
in the data, so a run can be continued anywhere and no buffer is ever saved.

`SiteBlocks` takes several sites from one forward pass, under one shuffle; `Blocks` is the case of one site. In float32
a site's values are, bit for bit, what they are alone. In bfloat16 they may differ by its rounding: which sites are read
decides where XLA rounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.lm.edits import Edit
from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.lm.order import row_indices
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site

# From a batch of token ids [batch, position] to the edits the model runs under.
EditsFor = Callable[[jax.Array], Sequence[Edit]]

# Rows of text that go through the model at once: small enough for their attention patterns to stay in cache.
CHUNK_ROWS = 8


class Block(NamedTuple):
    """Shuffled activations of one block.

    Attributes:
        x: `[tokens, width]` float32 raw activations.
        weight: `[tokens]` float32, 1 where the mask lets the token count.
        token: `[tokens]` int32 token id at that place.
        place: `[tokens]` int32 where the token stood: row within the block x context + position.
    """

    x: jax.Array
    weight: jax.Array
    token: jax.Array
    place: jax.Array


class SiteBlock(NamedTuple):
    """Shuffled activations of one block at several sites; tokens are in the same order at each.

    Attributes:
        x: site, as `str(Site)` -> `[tokens, width]` float32 raw activations.
        weight: site -> `[tokens]` float32, 1 where the mask lets the token count there.
        token, place: as in `Block`.
    """

    x: dict[str, jax.Array]
    weight: dict[str, jax.Array]
    token: jax.Array
    place: jax.Array

    def at(self, site: str) -> Block:
        """What a block of this site alone would be.

        Raises:
            InputError: the site was not harvested.
        """
        if site not in self.x:
            raise InputError(f"site {site} is not among those that are harvested ({', '.join(self.x)})")
        return Block(self.x[site], self.weight[site], self.token, self.place)


@partial(jax.jit, static_argnames=("site", "edits_for"))
def activations(lm: LanguageModel, tokens: jax.Array, site: Site, edits_for: EditsFor | None = None) -> jax.Array:
    """Raw activations `[rows, position, width]` float32 at a site; nothing above the site is computed.

    Args:
        lm: the model.
        tokens: `[rows, position]` token ids; rows a multiple of CHUNK_ROWS, or fewer than that.
        site: a site with a vector per token; heads are flattened.
        edits_for: the edits the model runs under, given the token ids of a chunk.
    """
    return _at_sites(lm, tokens, (site,), edits_for)[str(site)]


def _at_sites(lm, tokens, sites, edits_for) -> dict[str, jax.Array]:
    """`activations` at each of the sites, from one pass that stops above the highest."""

    def run(chunk):
        edits = edits_for(chunk) if edits_for else ()
        stop = max(site.layer for site in sites) + 1
        captured = forward(lm, chunk, capture=sites, edits=edits, stop=stop).captured
        return {str(site): captured[str(site)].reshape(*chunk.shape, -1).astype(jnp.float32) for site in sites}

    rows, context = tokens.shape
    if rows <= CHUNK_ROWS:
        return run(tokens)
    if rows % CHUNK_ROWS:
        raise InputError(f"{rows} rows: give a multiple of {CHUNK_ROWS} (rows of padding fill a batch up), or fewer")
    chunked = lax.map(run, tokens.reshape(-1, CHUNK_ROWS, context))
    return {site: x.reshape(rows, context, -1) for site, x in chunked.items()}


@partial(jax.jit, static_argnames=("sites", "edits_for"))
def _harvest(lm, tokens, mask, key, max_norms, sites, edits_for) -> tuple[SiteBlock, dict[str, jax.Array]]:
    """The block, and for each site the first place (before the shuffle) that is not finite, or -1."""
    flat = {site: x.reshape(-1, x.shape[-1]) for site, x in _at_sites(lm, tokens, sites, edits_for).items()}
    order = jax.random.permutation(key, tokens.size)
    weights, first_bad = {}, {}
    for site, x in flat.items():
        finite = jnp.all(jnp.isfinite(x), axis=-1)
        first_bad[site] = jnp.where(jnp.all(finite), -1, jnp.argmin(finite))
        weights[site] = (mask.reshape(-1) & (jnp.sum(x * x, axis=-1) <= max_norms[site] ** 2)).astype(jnp.float32)
    shuffled, weights = jax.tree.map(lambda values: values[order], (flat, weights))
    return SiteBlock(shuffled, weights, tokens.reshape(-1)[order], order.astype(jnp.int32)), first_bad


@dataclass(frozen=True)
class SiteBlocks:
    """The endless sequence of blocks of a run, each with the activations of several sites.

    Attributes:
        lm: the model.
        rows: the packed text.
        sites: where activations are taken, in one forward pass.
        seed: decides the order of rows and the shuffles.
        block_rows: rows of text in a block, a multiple of CHUNK_ROWS.
        max_norms: site, as `str(Site)` -> tokens whose activation there has a larger norm do not count there.
        edits_for: the edits the model runs under.

    Raises:
        InputError: no sites, one twice, or a norm for a site that is not harvested.
    """

    lm: LanguageModel
    rows: Rows
    sites: tuple[Site, ...]
    seed: int
    block_rows: int = 256
    max_norms: dict[str, float] = field(default_factory=dict)
    edits_for: EditsFor | None = None

    def __post_init__(self):
        names = [str(site) for site in self.sites]
        if not names or len(set(names)) < len(names):
            raise InputError(f"sites {', '.join(names) or '(none)'}: give at least one, each once")
        if unknown := sorted(set(self.max_norms) - set(names)):
            raise InputError(f"a largest norm for {', '.join(unknown)}: only {', '.join(names)} are harvested")

    @property
    def tokens_per_block(self) -> int:
        return self.block_rows * self.rows.context

    def row_numbers(self, index: int) -> np.ndarray:
        """Which rows of the text block `index` holds; epochs follow each other without a gap."""
        return row_indices(len(self.rows), self.seed, index * self.block_rows, self.block_rows)

    def __getitem__(self, index: int) -> SiteBlock:
        """Block `index`.

        Raises:
            InputError: an activation in it is not finite; says where.
        """
        numbers = self.row_numbers(index)
        tokens, _, mask, _ = self.rows[numbers]
        # jnp.array copies: device_put may alias a host buffer on CPU.
        block, first_bad = _harvest(
            self.lm,
            jnp.array(tokens),
            jnp.array(mask),
            jax.random.fold_in(jax.random.key(self.seed), index),
            {str(site): jnp.array(self.max_norms.get(str(site), jnp.inf), jnp.float32) for site in self.sites},
            tuple(self.sites),
            self.edits_for,
        )
        for site, bad in jax.device_get(first_bad).items():
            if bad >= 0:
                row, position = divmod(int(bad), self.rows.context)
                raise InputError(
                    f"the activation at {site} is not finite (block {index}, row {numbers[row]} of the text, "
                    f"position {position}, token id {tokens[row, position]}): see the weights and the compute dtype"
                )
        return block


@dataclass(frozen=True)
class Blocks:
    """The endless sequence of blocks of a run at one site.

    Attributes:
        lm: the model.
        rows: the packed text.
        site: where activations are taken.
        seed: decides the order of rows and the shuffles.
        block_rows: rows of text in a block, a multiple of CHUNK_ROWS.
        max_norm: tokens whose activation has a larger norm do not count (inf: all count).
        edits_for: the edits the model runs under.
    """

    lm: LanguageModel
    rows: Rows
    site: Site
    seed: int
    block_rows: int = 256
    max_norm: float = float("inf")
    edits_for: EditsFor | None = None

    @property
    def _at_site(self) -> SiteBlocks:
        norms = {str(self.site): self.max_norm}
        return SiteBlocks(self.lm, self.rows, (self.site,), self.seed, self.block_rows, norms, self.edits_for)

    @property
    def tokens_per_block(self) -> int:
        return self.block_rows * self.rows.context

    def row_numbers(self, index: int) -> np.ndarray:
        """As `SiteBlocks.row_numbers`."""
        return self._at_site.row_numbers(index)

    def __getitem__(self, index: int) -> Block:
        """Block `index`.

        Raises:
            InputError: an activation in it is not finite; says where.
        """
        return self._at_site[index].at(str(self.site))


class RememberedBlocks:
    """Blocks of which the first few that are asked for stay in memory: a second pass over them costs nothing.

    Their values are those of the blocks, so nothing depends on what is remembered.
    """

    def __init__(self, blocks: Blocks | SiteBlocks, width: int, limit_bytes: int = 1 << 30):
        """Args: the blocks; numbers per token, at all their sites together; how much memory may be kept."""
        self.blocks, self.lm, self.tokens_per_block = blocks, blocks.lm, blocks.tokens_per_block
        self._room = limit_bytes // (4 * width * blocks.tokens_per_block)
        self._kept: dict[int, Block | SiteBlock] = {}

    def __getitem__(self, index: int) -> Block | SiteBlock:
        if index in self._kept:
            return self._kept[index]
        block = self.blocks[index]
        if len(self._kept) < self._room:
            self._kept[index] = block
        return block
