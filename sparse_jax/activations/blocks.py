"""Activations in seeded blocks: block `b` of a run is a pure function of the text, the model, the seed and `b`.

A block is `block_rows` rows of text, run through the model up to the site and shuffled by token. Which rows it holds
follows from `rows.row_indices(seed, ...)`, the shuffle from `fold_in(key, b)`: (block, offset) is the whole position
in the data, so a run can be continued anywhere and no buffer is ever saved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@partial(jax.jit, static_argnames=("site", "edits_for"))
def activations(lm: LanguageModel, tokens: jax.Array, site: Site, edits_for: EditsFor | None = None) -> jax.Array:
    """Raw activations `[rows, position, width]` float32 at a site; nothing above the site is computed.

    Args:
        lm: the model.
        tokens: `[rows, position]` token ids; rows a multiple of CHUNK_ROWS, or fewer than that.
        site: a site with a vector per token; heads are flattened.
        edits_for: the edits the model runs under, given the token ids of a chunk.
    """

    def run(chunk):
        edits = edits_for(chunk) if edits_for else ()
        captured = forward(lm, chunk, capture=[site], edits=edits, stop=site.layer + 1).captured[str(site)]
        return captured.reshape(*chunk.shape, -1).astype(jnp.float32)

    rows, context = tokens.shape
    if rows <= CHUNK_ROWS:
        return run(tokens)
    if rows % CHUNK_ROWS:
        raise InputError(f"{rows} rows: give a multiple of {CHUNK_ROWS} (rows of padding fill a batch up), or fewer")
    return lax.map(run, tokens.reshape(-1, CHUNK_ROWS, context)).reshape(rows, context, -1)


@partial(jax.jit, static_argnames=("site", "edits_for"))
def _harvest(lm, tokens, mask, key, max_norm, site, edits_for) -> tuple[Block, jax.Array]:
    x = activations(lm, tokens, site, edits_for)
    x = x.reshape(-1, x.shape[-1])
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    weight = (mask.reshape(-1) & (jnp.sum(x * x, axis=-1) <= max_norm**2)).astype(jnp.float32)
    order = jax.random.permutation(key, x.shape[0])
    block = Block(x[order], weight[order], tokens.reshape(-1)[order], order.astype(jnp.int32))
    first_bad = jnp.where(jnp.all(finite), -1, jnp.argmin(finite))
    return block, first_bad


@dataclass(frozen=True)
class Blocks:
    """The endless sequence of blocks of a run.

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
    def tokens_per_block(self) -> int:
        return self.block_rows * self.rows.context

    def row_numbers(self, index: int) -> np.ndarray:
        """Which rows of the text block `index` holds; epochs follow each other without a gap."""
        return row_indices(len(self.rows), self.seed, index * self.block_rows, self.block_rows)

    def __getitem__(self, index: int) -> Block:
        """Block `index`.

        Raises:
            InputError: an activation in it is not finite; says where.
        """
        numbers = self.row_numbers(index)
        tokens, _, mask, _ = self.rows[numbers]
        key = jax.random.fold_in(jax.random.key(self.seed), index)
        # jnp.array copies: device_put may alias a host buffer on CPU.
        block, first_bad = _harvest(
            self.lm,
            jnp.array(tokens),
            jnp.array(mask),
            key,
            jnp.array(self.max_norm, jnp.float32),
            self.site,
            self.edits_for,
        )
        if (bad := int(first_bad)) >= 0:
            row, position = divmod(bad, self.rows.context)
            raise InputError(
                f"the activation at {self.site} is not finite (block {index}, row {numbers[row]} of the text, "
                f"position {position}, token id {tokens[row, position]}): see the weights and the compute dtype"
            )
        return block


class RememberedBlocks:
    """Blocks of which the first few that are asked for stay in memory: a second pass over them costs nothing.

    Their values are those of the blocks, so nothing depends on what is remembered.
    """

    def __init__(self, blocks: Blocks, width: int, limit_bytes: int = 1 << 30):
        """Args: the blocks; numbers per token at their site; how much memory may be kept."""
        self.blocks, self.lm, self.tokens_per_block = blocks, blocks.lm, blocks.tokens_per_block
        self._room = limit_bytes // (4 * width * blocks.tokens_per_block)
        self._kept: dict[int, Block] = {}

    def __getitem__(self, index: int) -> Block:
        if index in self._kept:
            return self._kept[index]
        block = self.blocks[index]
        if len(self._kept) < self._room:
            self._kept[index] = block
        return block
