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

from sparse_jax.activations.spread import Spread
from sparse_jax.errors import InputError
from sparse_jax.lm.edits import Edit
from sparse_jax.lm.model import LanguageModel, forward
from sparse_jax.lm.row_stream import RowStream
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site

# From a batch of token ids [batch, position] to the edits the model runs under.
EditsFor = Callable[[jax.Array], Sequence[Edit]]

# Rows of text that go through the model at once, and tokens that they have at most: few enough for what is made of them
# on the way to stay in a CPU's caches (rows of 1,024 took 1.1 times as long by eight as by two).
CHUNK_ROWS, CHUNK_TOKENS = 8, 2048


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
    return at_sites(lm, tokens, (site,), edits_for)[str(site)]


def rows_in_chunk(rows: int, context: int) -> int:
    """How many rows go through the model at once: CHUNK_ROWS, or a half, a quarter or an eighth of it for long rows."""
    size = CHUNK_ROWS
    while size > 1 and size * context > CHUNK_TOKENS:
        size //= 2
    return size if rows % size == 0 else rows


def at_sites(lm: LanguageModel, tokens: jax.Array, sites: Sequence[Site], edits_for: EditsFor | None = None) -> dict:
    """Site, as `str(Site)` -> `activations` there, from one pass that stops above the highest."""

    def run(chunk):
        edits = edits_for(chunk) if edits_for else ()
        stop = max(site.layer for site in sites) + 1
        captured = forward(lm, chunk, capture=sites, edits=edits, stop=stop).captured
        return {str(site): captured[str(site)].reshape(*chunk.shape, -1).astype(jnp.float32) for site in sites}

    rows, context = tokens.shape
    if rows > CHUNK_ROWS and rows % CHUNK_ROWS:
        raise InputError(f"{rows} rows: give a multiple of {CHUNK_ROWS} (rows of padding fill a batch up), or fewer")
    chunk = rows_in_chunk(rows, context)
    if chunk == rows:
        return run(tokens)
    chunked = lax.map(run, tokens.reshape(-1, chunk, context))
    return {site: x.reshape(rows, context, -1) for site, x in chunked.items()}


@partial(jax.jit, static_argnames=("sites", "edits_for"))
def _harvest(lm, tokens, mask, key, max_norms, sites, edits_for) -> tuple[SiteBlock, dict[str, jax.Array]]:
    """The block, and for each site the first place (before the shuffle) that is not finite, or -1."""
    flat = {site: x.reshape(-1, x.shape[-1]) for site, x in at_sites(lm, tokens, sites, edits_for).items()}
    first_bad = {site: first_not_finite(x) for site, x in flat.items()}
    order = block_order(key, tokens.size)
    shuffled, mask = jax.tree.map(lambda values: values[order], (flat, mask.reshape(-1)))
    return SiteBlock(shuffled, weights_of(shuffled, mask, max_norms), tokens.reshape(-1)[order], order), first_bad


def block_order(key: jax.Array, tokens: int) -> jax.Array:
    """`[tokens]` int32: which token of a block stands at each place after the shuffle."""
    return jax.random.permutation(key, tokens).astype(jnp.int32)


def block_key(seed: int, index: int) -> jax.Array:
    """What block `index` is shuffled with."""
    return jax.random.fold_in(jax.random.key(seed), index)


def weights_of(x: dict[str, jax.Array], mask: jax.Array, max_norms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`[tokens]` float32 of each site: 1 where the mask lets the token count and its norm is not too large."""
    return {
        site: (mask & (jnp.sum(values * values, axis=-1) <= max_norms[site] ** 2)).astype(jnp.float32)
        for site, values in x.items()
    }


def first_not_finite(x: jax.Array) -> jax.Array:
    """The first row of `x [tokens, width]` with an entry that is not finite; -1 if there is none."""
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    return jnp.where(jnp.all(finite), -1, jnp.argmin(finite))


def limits_of(sites: Sequence[Site], max_norms: dict[str, float]) -> dict[str, jax.Array]:
    """The largest norm that counts at each site, infinite where none is given."""
    return {str(site): jnp.array(max_norms.get(str(site), jnp.inf), jnp.float32) for site in sites}


def check_finite(first_bad: dict[str, int], numbers: np.ndarray, tokens: np.ndarray, where: str = "") -> None:
    """Raises InputError for the first activation that is not finite.

    Args:
        first_bad: site -> `first_not_finite` of the rows' tokens one after the other.
        numbers: `[rows]` their numbers in the text.
        tokens: `[rows, position]` their ids.
        where: what the message adds.
    """
    for site, bad in first_bad.items():
        if bad >= 0:
            row, position = divmod(int(bad), tokens.shape[1])
            raise InputError(
                f"the activation at {site} is not finite ({where}row {numbers[row]} of the text, "
                f"position {position}, token id {tokens[row, position]}): see the weights and the compute dtype"
            )


def check_sites(sites: Sequence[Site], max_norms: dict[str, float]) -> None:
    """Raises InputError for no sites, one twice, or a norm for a site that is not there."""
    names = [str(site) for site in sites]
    if not names or len(set(names)) < len(names):
        raise InputError(f"sites {', '.join(names) or '(none)'}: give at least one, each once")
    if unknown := sorted(set(max_norms) - set(names)):
        raise InputError(f"a largest norm for {', '.join(unknown)}: only {', '.join(names)} are harvested")


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
        spread: how blocks lie over a mesh, that of the model's weights; tokens of a block then stand device by device,
            batches as they are without one. None: on one device.

    Raises:
        InputError: no sites, one twice, or a norm for a site that is not harvested; a mesh that does not divide blocks.
    """

    lm: LanguageModel
    rows: Rows | RowStream
    sites: tuple[Site, ...]
    seed: int
    block_rows: int = 256
    max_norms: dict[str, float] = field(default_factory=dict)
    edits_for: EditsFor | None = None
    spread: Spread | None = None

    def __post_init__(self):
        check_sites(self.sites, self.max_norms)
        if self.spread is not None:
            self.spread.check(self.block_rows, self.rows.context)

    @property
    def tokens_per_block(self) -> int:
        return self.block_rows * self.rows.context

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

    def row_numbers(self, index: int) -> np.ndarray:
        """Which rows of the text block `index` holds; epochs follow each other without a gap."""
        return self.rows.ordered(self.seed, index * self.block_rows, self.block_rows)

    def __getitem__(self, index: int) -> SiteBlock:
        """Block `index`.

        Raises:
            InputError: an activation in it is not finite; says where.
        """
        if self.spread is not None:
            from sparse_jax.activations.spread_harvest import harvest_spread  # which is written in terms of this file

            return harvest_spread(self, index, self.spread)
        numbers = self.row_numbers(index)
        tokens, _, mask, _ = self.rows[numbers]
        # jnp.array copies: device_put may alias a host buffer on CPU.
        block, first_bad = _harvest(
            self.lm,
            jnp.array(tokens),
            jnp.array(mask),
            block_key(self.seed, index),
            limits_of(self.sites, self.max_norms),
            tuple(self.sites),
            self.edits_for,
        )
        check_finite(jax.device_get(first_bad), numbers, tokens, f"block {index}, ")
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
        spread: as in `SiteBlocks`.
    """

    lm: LanguageModel
    rows: Rows | RowStream
    site: Site
    seed: int
    block_rows: int = 256
    max_norm: float = float("inf")
    edits_for: EditsFor | None = None
    spread: Spread | None = None

    @property
    def _at_site(self) -> SiteBlocks:
        norms = {str(self.site): self.max_norm}
        return SiteBlocks(
            self.lm, self.rows, (self.site,), self.seed, self.block_rows, norms, self.edits_for, self.spread
        )

    @property
    def tokens_per_block(self) -> int:
        return self.block_rows * self.rows.context

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

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
        self.blocks, self.vocab_size, self.tokens_per_block = blocks, blocks.vocab_size, blocks.tokens_per_block
        self.spread: Spread | None = getattr(blocks, "spread", None)
        self._room = limit_bytes // (4 * width * blocks.tokens_per_block)
        self._kept: dict[int, Block | SiteBlock] = {}

    def __getitem__(self, index: int) -> Block | SiteBlock:
        if index in self._kept:
            return self._kept[index]
        block = self.blocks[index]
        if len(self._kept) < self._room:
            self._kept[index] = block
        return block
