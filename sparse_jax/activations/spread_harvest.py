"""A block of activations computed on a mesh: each device runs its own rows of text through the model."""

from functools import partial

import jax
import numpy as np
from jax.sharding import PartitionSpec

from sparse_jax.activations import blocks
from sparse_jax.activations.spread import Spread, exchanged, routes
from sparse_jax.numerics.whole import to_host


def harvest_spread(of: "blocks.SiteBlocks", index: int, spread: Spread) -> "blocks.SiteBlock":
    """Block `index` of `of`, spread; each process reads only the rows of text that its devices run.

    Raises:
        InputError: an activation is not finite; says where, in all processes alike.
    """
    numbers, context = of.row_numbers(index), of.rows.context
    tokens = of.tokens_per_block
    own = {(start, stop): of.rows[numbers[start:stop]] for start, stop in spread.own_parts(len(numbers))}
    shape = (len(numbers), context)
    order = np.asarray(_order(blocks.block_key(of.seed, index), tokens))
    place = spread.arranged(order)
    way = routes(place, spread.parts)
    block, first_bad = _harvest(
        of.lm,
        spread.array(shape, np.dtype(np.int32), lambda start, stop: own[start, stop].tokens),
        spread.array(shape, np.dtype(bool), lambda start, stop: own[start, stop].mask),
        spread.array(way.send.shape, way.send.dtype, lambda start, stop: way.send[start:stop]),
        spread.array(way.receive.shape, way.receive.dtype, lambda start, stop: way.receive[start:stop]),
        spread.array(place.shape, np.dtype(np.int32), lambda start, stop: place[start:stop]),
        {site: np.asarray(limit) for site, limit in blocks.limits_of(of.sites, of.max_norms).items()},
        tuple(of.sites),
        of.edits_for,
        spread,
    )
    _check_finite(of, to_host(first_bad), numbers, f"block {index}, ")
    return block


@partial(jax.jit, static_argnames="tokens")
def _order(key: jax.Array, tokens: int) -> jax.Array:
    return blocks.block_order(key, tokens)


@partial(jax.jit, static_argnames=("sites", "edits_for", "spread"))
def _harvest(lm, tokens, mask, send, receive, place, max_norms, sites, edits_for, spread: Spread):
    """The block, and for each site `[part]` each device's first token that is not finite, or -1."""
    along = PartitionSpec(spread.axis)

    def on_device(lm, tokens, mask, send, receive, place, max_norms):
        x = blocks.at_sites(lm, tokens, sites, edits_for)
        flat = {site: each.reshape(-1, each.shape[-1]) for site, each in x.items()}
        first_bad = {site: blocks.first_not_finite(each)[None] for site, each in flat.items()}
        carried = (flat, mask.reshape(-1), tokens.reshape(-1))
        flat, mask, token = exchanged(carried, send, receive, spread.axis)
        return blocks.SiteBlock(flat, blocks.weights_of(flat, mask, max_norms), token, place), first_bad

    # Only the axis of the rows is divided by hand: along the others the partitioner divides the model's weights.
    mapped = jax.shard_map(
        on_device,
        mesh=spread.sharding.mesh,
        in_specs=(PartitionSpec(), along, along, along, along, along, PartitionSpec()),
        out_specs=along,
        axis_names={spread.axis},
        check_vma=False,
    )
    block, first_bad = mapped(lm, tokens, mask, send, receive, place, max_norms)
    return jax.lax.with_sharding_constraint(block, spread.sharding), first_bad


def _check_finite(of: "blocks.SiteBlocks", first_bad: dict[str, np.ndarray], numbers: np.ndarray, where: str) -> None:
    per_part = of.tokens_per_block // len(next(iter(first_bad.values())))
    found = {}
    for site, bad in first_bad.items():
        places = [part * per_part + int(token) for part, token in enumerate(bad) if token >= 0]
        found[site] = places[0] if places else -1
    if any(place >= 0 for place in found.values()):
        blocks.check_finite(found, numbers, of.rows[numbers].tokens, where)
