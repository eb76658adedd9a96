"""Blocks of activations from a store: for the same text, model and seed the same blocks as from the model itself.

Block `b` holds the rows that `SiteBlocks` would run through the model, in the same shuffle; a store in float32 gives
the same bits, one in bfloat16 or int8 what that rounding leaves of them. Several processes each read their own tokens
of every batch and no others: those that their devices hold (`Spread`), or a share that is theirs alone (`Share`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.blocks import (
    Block,
    SiteBlock,
    block_key,
    block_order,
    check_sites,
    limits_of,
    weights_of,
)
from sparse_jax.activations.row_encoding import Entry, decode
from sparse_jax.activations.shares import Share
from sparse_jax.activations.spread import Spread
from sparse_jax.activations.store import ActivationStore
from sparse_jax.errors import InputError
from sparse_jax.lm.sites import Site


@partial(jax.jit, static_argnames="entries")
def _decoded(entries: Sequence[Entry], arrays, mask, max_norms):
    x = {str(entry.site): decode(entry, arrays[str(entry.site)]) for entry in entries}
    return x, weights_of(x, mask, max_norms)


@partial(jax.jit, static_argnames="tokens")
def _order(key, tokens):
    return block_order(key, tokens)


@dataclass(frozen=True)
class StoredBlocks:
    """The endless sequence of blocks of a run, read from a store.

    Attributes:
        store: what to read.
        sites: which of its sites.
        seed: decides the order of rows and the shuffles.
        block_rows: rows of text in a block.
        max_norms: site, as `str(Site)` -> tokens whose activation there has a larger norm do not count there.
        share: the part of each batch to read; None: all.
        spread: how blocks lie over a mesh; None: on one device.

    Raises:
        InputError: a site of which the store has no activations; no sites, one twice, a norm for another site; a share
            of blocks that are spread; a mesh that does not divide a block.
    """

    store: ActivationStore
    sites: tuple[Site, ...]
    seed: int
    block_rows: int = 256
    max_norms: dict[str, float] = field(default_factory=dict)
    share: Share | None = None
    spread: Spread | None = None

    def __post_init__(self):
        check_sites(self.sites, self.max_norms)
        if self.spread is not None:
            self.spread.check(self.block_rows, self.store.context)
            if self.share is not None:
                raise InputError("blocks that are spread over a mesh are whole: leave out the share")
        _ = self.entries  # raises for a site that is not there

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the store has of the sites."""
        return tuple(self.store.entry(str(site)) for site in self.sites)

    @property
    def tokens_per_block(self) -> int:
        """Of this process, where there are several."""
        return self.block_rows * self.store.context // (self.share.processes if self.share else 1)

    @property
    def vocab_size(self) -> int:
        return self.store.manifest.vocab_size

    def row_numbers(self, index: int) -> np.ndarray:
        """Which rows of the text block `index` holds: as without a store."""
        return self.store.ordered(self.seed, index * self.block_rows, self.block_rows)

    def __getitem__(self, index: int) -> SiteBlock:
        """Block `index`.

        Raises:
            InputError: a shard is damaged (named).
        """
        numbers, context = self.row_numbers(index), self.store.context
        place = np.asarray(_order(block_key(self.seed, index), self.block_rows * context))
        place = place if self.share is None else self.share.of(place)
        if self.spread is not None:
            return self._spread(numbers, self.spread.arranged(place), self.spread)
        # jnp.array copies: device_put may alias a host buffer on CPU.
        part = jax.tree.map(jnp.array, self._part(numbers, place))
        x, weight = _decoded(self.entries, part.arrays, part.mask, limits_of(self.sites, self.max_norms))
        return SiteBlock(x, weight, part.token, jnp.array(place))

    def _part(self, numbers: np.ndarray, place: np.ndarray) -> "_Part":
        """The tokens that stand at some places of a block, from the rows they are in."""
        context = self.store.context
        # Rows are read one after the other, each for all of its tokens that are wanted; then the tokens are shuffled.
        by_row = np.argsort(place, kind="stable")
        rows, positions = np.divmod(place[by_row], context)
        bounds = np.searchsorted(rows, np.arange(self.block_rows + 1))
        wanted = [positions[bounds[i] : bounds[i + 1]] for i in range(self.block_rows)]
        back = np.empty_like(by_row)
        back[by_row] = np.arange(len(by_row))
        arrays = {
            str(site): {name: values[back] for name, values in self.store.arrays(str(site), numbers, wanted).items()}
            for site in self.sites
        }
        batch = self.store[numbers]
        row, position = np.divmod(place, context)
        return _Part(arrays, batch.mask[row, position], batch.tokens[row, position])

    def _spread(self, numbers: np.ndarray, place: np.ndarray, spread: Spread) -> SiteBlock:
        """The block over the mesh; only what this process's devices hold is read."""
        parts = {bounds: self._part(numbers, place[slice(*bounds)]) for bounds in spread.own_parts(len(place))}

        def over_the_mesh(*leaves: np.ndarray) -> jax.Array:
            own = dict(zip(parts, leaves))
            shape = (len(place), *leaves[0].shape[1:])
            return spread.array(shape, leaves[0].dtype, lambda start, stop: own[start, stop])

        part = jax.tree.map(over_the_mesh, *parts.values())
        limits = {site: np.asarray(limit) for site, limit in limits_of(self.sites, self.max_norms).items()}
        x, weight = _decoded(self.entries, part.arrays, part.mask, limits)
        own_places = spread.array(place.shape, place.dtype, lambda start, stop: place[start:stop])
        return SiteBlock(x, weight, part.token, own_places)


class _Part(NamedTuple):
    """Tokens of a block as the store has them: arrays by site and name, mask, ids; a leading axis of tokens."""

    arrays: dict[str, dict[str, np.ndarray]]
    mask: np.ndarray
    token: np.ndarray


@dataclass(frozen=True)
class BlocksAt:
    """One site of blocks that hold several.

    Attributes:
        blocks: of several sites.
        site: which of them.
    """

    blocks: StoredBlocks
    site: Site

    @property
    def tokens_per_block(self) -> int:
        return self.blocks.tokens_per_block

    @property
    def vocab_size(self) -> int:
        return self.blocks.vocab_size

    @property
    def spread(self) -> Spread | None:
        """As that of the blocks."""
        return self.blocks.spread

    def row_numbers(self, index: int) -> np.ndarray:
        """As those of the blocks."""
        return self.blocks.row_numbers(index)

    def __getitem__(self, index: int) -> Block:
        """Block `index` at the site; raises what the blocks raise."""
        return self.blocks[index].at(str(self.site))
