"""Parts of rows that are run again above a site, from a saved pass: what a change does, and nothing before or below it.

A row is run once. A change at its site from position s on leaves every earlier position as it was, and all that later
positions see of earlier ones are keys and values: so the change costs the positions from s on in the layers above the
site, whose attention looks at the saved keys and values where nothing changed. Exact, in every family.

Changes are gathered in batches of one shape, `[batch, length]` with batch x length about constant; a few lengths serve
for all (`LENGTHS` parts of the context), so few programs are compiled, whatever the features and rows are. Where
positions are not mixed above the site at all (`position_wise`) the length is 1: each place is a change of its own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.lm.attention import cached_attention
from sparse_jax.lm.edits import Edit
from sparse_jax.lm.interventions import put
from sparse_jax.lm.layers import accurate_dtype
from sparse_jax.lm.memory import Memory
from sparse_jax.lm.model import LanguageModel, embedded, run_blocks, site_shape
from sparse_jax.lm.sites import Site

# Parts into which the context is divided: a change from position s on is run at the next of so many lengths.
LENGTHS = 4


class Saved(NamedTuple):
    """A pass over some rows, with what it takes to go on from the site.

    Attributes:
        residual: `[rows, position, d_model]` the stream that enters block `entry_layer(site)`.
        x: `[rows, position, width]` float32 (or float64), the activation at the site, heads flattened.
        keys, values: `[layers, rows, position, kv_head, head_dim]` of the blocks from the entry on.
        end: `[rows, position, d_model]` the stream that left the last block that was run.
        captured: other sites, as text -> value.
    """

    residual: jax.Array
    x: jax.Array
    keys: jax.Array
    values: jax.Array
    end: jax.Array
    captured: dict[str, jax.Array]


class Segments(NamedTuple):
    """Changes that are run together, all of one length; `[batch]` int32 each but `there`.

    Attributes:
        index: which change.
        rows: which row of the saved pass.
        starts: the first position that is run again.
        there: bool; False where there is no change, to fill the batch up.
    """

    index: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    there: np.ndarray


class Earlier(NamedTuple):
    """Saved keys and values as the attention of rows that are run from some position on sees them.

    Attributes:
        keys, values: `[layers, rows, position, kv_head, head_dim]`, never written to.
        rows: `[batch]` which saved row each row of the pass continues.
        entry: number of the layer that `keys[0]` is of.
    """

    keys: jax.Array
    values: jax.Array
    rows: jax.Array
    entry: jax.Array

    def attend(self, layer, positions, q, k, v, scale, tap, window):
        """As `Memory.attend`: what is run now, `positions [batch, n]`, stands in place of what was saved there."""
        batch = jnp.arange(len(self.rows), dtype=jnp.int32)[:, None]
        keys = self.keys[layer - self.entry, self.rows].at[batch, positions].set(k)
        values = self.values[layer - self.entry, self.rows].at[batch, positions].set(v)
        return cached_attention(q, keys, values, scale, tap, window, positions), self


def entry_layer(site: Site) -> int:
    """The first block that is run again after a change at the site: none of what it computes stands before it."""
    return site.layer + 1 if site.name == "resid_post" else site.layer


def position_wise(site: Site, last_layer: int) -> bool:
    """Whether a change at the site stays at its position, up to and with block `last_layer`."""
    return site.layer >= last_layer and site.name not in ("resid_pre", "attn_k", "attn_v", "attn_pattern")


def save(
    lm: LanguageModel, site: Site, tokens: jax.Array, stop: int | None = None, capture: Sequence[Site] = ()
) -> Saved:
    """Run rows `tokens [rows, position]` up to block `stop` (exclusive; None: all), keeping what `resume` needs."""
    entry, stop = entry_layer(site), lm.config.n_layers if stop is None else stop
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    residual, _, _ = run_blocks(lm, embedded(lm, tokens, positions), positions, end=entry)
    here = () if site.name == "resid_post" else (site,)
    memory = Memory.empty(lm.config, *tokens.shape, jnp.dtype(lm.dtype))
    end, captured, memory = run_blocks(
        lm, residual, positions, capture=(*here, *capture), start=entry, end=stop, memory=memory
    )
    x = captured[str(site)] if here else residual
    x = x.reshape(*tokens.shape, -1).astype(accurate_dtype(x.dtype))
    return Saved(residual, x, memory.keys[entry:stop], memory.values[entry:stop], end, captured)


def resume(
    lm: LanguageModel,
    site: Site,
    saved: Saved,
    rows: jax.Array,
    positions: jax.Array,
    value: jax.Array,
    stop: int | None = None,
    capture: Sequence[Site] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The residual stream `[batch, n, d_model]` that leaves block `stop` - 1 after a change, and the captures.

    Args:
        lm, site: as in `save`.
        saved: the pass without the change.
        rows: `[batch]` which of its rows.
        positions: `[batch, n]` consecutive positions; before the first nothing is changed.
        value: `[batch, n, width]` what stands at the site there.
        stop, capture: as in `save`.
    """
    entry = entry_layer(site)
    if site.name == "resid_post":
        residual, edits = value.astype(lm.dtype), ()
    else:
        residual = saved.residual[rows[:, None], positions]
        edits = (Edit(site, put, (value.reshape(*positions.shape, *site_shape(lm.config, site)),)),)
    earlier = Earlier(saved.keys, saved.values, rows, jnp.int32(entry))
    residual, captured, _ = run_blocks(lm, residual, positions, edits, tuple(capture), entry, stop, earlier)
    return residual, captured


def lengths_for(context: int, alone: bool) -> tuple[int, ...]:
    """Lengths at which changes in rows of `context` tokens are run, rising; `alone`: each place by itself."""
    return (1,) if alone else tuple(sorted({-(-context * part // LENGTHS) for part in range(1, LENGTHS + 1)}))


def segments(
    rows: np.ndarray, first: np.ndarray, last: np.ndarray, lengths: Sequence[int], batch_tokens: int
) -> Iterator[tuple[int, Segments]]:
    """(length, changes) in batches of `batch_tokens // length`, each change at the shortest length that holds it.

    What does not fill a batch goes with the next length if it fits there in one, so that few batches run half empty.

    Args:
        rows: `[n]` row of each change.
        first, last: `[n]` positions that must be run, both included.
        lengths: rising; the longest is at most the context and at least last - first + 1 everywhere.
        batch_tokens: tokens in a batch, about.
    """
    needed = last - first + 1
    order = np.argsort(needed, kind="stable").astype(np.int32)
    begin = 0
    for place, length in enumerate(lengths):
        size = max(1, batch_tokens // length)
        end = int(np.searchsorted(needed[order], length, side="right"))
        longer = max(1, batch_tokens // lengths[place + 1]) if place + 1 < len(lengths) else 0
        while end - begin >= size or end - begin > longer:
            chosen = order[begin : min(begin + size, end)]
            begin += len(chosen)
            fill = size - len(chosen)
            starts = np.maximum(last[chosen] - length + 1, 0)
            yield (
                length,
                Segments(
                    index=np.pad(chosen, (0, fill)),
                    rows=np.pad(rows[chosen].astype(np.int32), (0, fill)),
                    starts=np.pad(starts.astype(np.int32), (0, fill)),
                    there=np.arange(size) < len(chosen),
                ),
            )
