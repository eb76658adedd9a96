"""Harvest: run a text through a model once and keep the activations of several sites in a store.

Rows go through in the text's order, as many sites as are asked for in one pass that stops above the highest. Three
things happen at once: the device computes a batch of rows, the host fetches the one before it, a thread writes the
last shard (and a text that is read as it goes is read ahead, see lm/row_stream.py). Several processes may harvest into
one folder: each takes every n-th shard.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.blocks import CHUNK_ROWS, at_sites, check_finite, first_not_finite
from sparse_jax.activations.row_encoding import Entry, encode
from sparse_jax.activations.shards import remove_remains, shard_folder, write_shard
from sparse_jax.activations.store import (
    Manifest,
    array_name,
    known_rows,
    whole_shards,
    write_end,
    write_manifest,
)
from sparse_jax.errors import InputError
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.row_stream import RowStream
from sparse_jax.lm.rows import RowBatch, Rows

# A shard takes about this much space, unless it is told how many rows it has.
SHARD_BYTES = 128 << 20
# Rows that are computed, and fetched from the device, together.
BATCH_ROWS = 32


@dataclass(frozen=True)
class Progress:
    """How far a harvest came.

    Attributes:
        written: shards that this call wrote.
        found: shards of this process's share that were there before.
        lost: active features that found no slot, in the shards written.
        finished: whether this process's share is complete.
    """

    written: int
    found: int
    lost: int
    finished: bool


def shard_rows_for(bytes_per_row: int) -> int:
    """Rows in a shard of about SHARD_BYTES: a power of two, at least one chunk of rows."""
    rows = max(1, SHARD_BYTES // bytes_per_row)
    return max(CHUNK_ROWS, 1 << (rows.bit_length() - 1))


@partial(jax.jit, static_argnames="entries")
def _encoded(lm, tokens, mask, dictionaries, entries: tuple[Entry, ...]):
    """Arrays by name, first places that are not finite by site, lost codes of tokens that count."""
    sites = tuple(dict.fromkeys(entry.site for entry in entries))
    found = at_sites(lm, tokens, sites)
    first_bad = {site: first_not_finite(x.reshape(-1, x.shape[-1])) for site, x in found.items()}
    arrays, lost = {}, jnp.zeros((), jnp.int32)
    for entry in entries:
        x = found[str(entry.site)]
        made, more = encode(entry, x.reshape(-1, x.shape[-1]), dictionaries.get(entry.name))
        arrays |= {array_name(entry, name): a.reshape(*tokens.shape, *a.shape[1:]) for name, a in made.items()}
        lost += jnp.sum(jnp.where(mask.reshape(-1), more, 0))
    return arrays, first_bad, lost


def check_room(folder: Path, manifest: Manifest, rows: int | None) -> None:
    """Raises InputError if so many rows will not fit on the disk; None: it is not known how many there are."""
    if rows is None:
        return
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    need, free = rows * manifest.bytes_per_row, shutil.disk_usage(nearest).free
    if need > free:
        raise InputError(
            f"{rows:,} rows of {manifest.context} tokens take {need / 1e9:,.1f} GB, and {folder} has "
            f"{free / 1e9:,.1f} GB free: give fewer --tokens, fewer --sites, --dtype bfloat16 or int8, or another --out"
        )


def harvest(
    lm: LanguageModel,
    rows: Rows | RowStream,
    folder: Path,
    manifest: Manifest,
    *,
    dictionaries: dict[str, Any] | None = None,
    limit: int | None = None,
    process: int = 0,
    processes: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
    warn: Callable[[str], None] = print,
    should_stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Write all shards of this process's share that are not there yet.

    Args:
        lm: the model.
        rows: the text.
        folder: the store's; a manifest that stands there must be this one.
        manifest: what is to be stored.
        dictionaries: the name of each entry of codes -> its `Normalised` dictionary, for raw activations.
        limit: rows of the text to store, at most.
        process, processes: which share of the shards: every `processes`-th, from `process` on.
        progress: gets the number of rows done, those that were there before included.
        warn: gets what is found damaged, before it is harvested again.
        should_stop: asked between batches; the shard at hand is then given up.

    Raises:
        InputError: another store is in the folder; the disk is full or cannot be written; the text cannot be read; an
            activation is not finite. Shards written until then are whole, and a later call goes on from there.
    """
    if not 0 <= process < processes:
        raise InputError(f"process {process} of {processes}: give 0 to {processes - 1}")
    write_manifest(folder, manifest)
    whole, wrong = whole_shards(folder, manifest)
    for each in wrong:
        warn(f"{each} (it is harvested again now)")
    remove_remains(folder)
    end = limit if (known := known_rows(folder, manifest)) is None else known
    size, index, state = manifest.shard_rows, process, {"written": 0, "found": 0, "lost": 0}
    with ThreadPoolExecutor(1, thread_name_prefix="shards") as pool:
        writing: Future | None = None
        while True:
            first = index * size
            last = rows.reach(first + size) if end is None else rows.reach(min(first + size, end))
            if last <= first:
                break
            if index in whole:
                state["found"] += 1
                progress(last - first)
            else:
                shard = _shard(lm, rows, manifest, dictionaries or {}, first, last, should_stop, progress)
                if shard is None:
                    _settle(writing, folder)
                    return Progress(**state, finished=False)
                _settle(writing, folder)  # one shard is written while the next is made, no more
                arrays, facts = shard
                writing = pool.submit(write_shard, shard_folder(folder, index), first, arrays, facts)
                state["written"] += 1
                state["lost"] += facts["lost"]
            index += processes
        _settle(writing, folder)
    # The text was found to end, or the limit is reached: `rows` knows how many there are.
    write_end(folder, rows.reach((1 << 62) if end is None else end))
    return Progress(**state, finished=True)


def _settle(writing: Future | None, folder: Path) -> None:
    """Wait for the shard that is being written."""
    if writing is None:
        return
    try:
        writing.result()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"the store cannot be written ({error.strerror or error})"
        raise InputError(
            f"{what} at {folder}: every shard written before is whole; make room and go on with --resume"
        ) from error


def _shard(lm, rows, manifest: Manifest, dictionaries, first, last, should_stop, progress):
    """Arrays and facts of the rows `first` to `last`; None if it was asked to stop."""
    count = last - first
    out = {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in manifest.arrays().items()}
    documents: dict[str, str] = {}
    lost, done = 0, 0
    for numbers, batch, computed in _batches(lm, rows, manifest, dictionaries, first, last):
        if should_stop():
            return None
        arrays, first_bad, more = jax.device_get(computed)
        real = len(numbers)
        check_finite(first_bad, numbers, batch.tokens)
        for name, values in (batch._asdict() | arrays).items():
            out[name][done : done + real] = values[:real]
        documents |= {str(d): rows.documents[d] for d in np.unique(batch.document[:real]).tolist() if d >= 0}
        lost, done = lost + int(more), done + real
        progress(real)
    return out, {"documents": documents, "lost": lost}


def _batches(lm, rows, manifest: Manifest, dictionaries, first, last) -> Iterator[tuple[np.ndarray, RowBatch, Any]]:
    """Batches of rows with what the device makes of them, all of one shape, the last filled up with empty rows.

    The next one is under way before one is handed out.
    """
    size = min(BATCH_ROWS, -(-manifest.shard_rows // CHUNK_ROWS) * CHUNK_ROWS)
    waiting = None
    for start in range(first, last, size):
        numbers = np.arange(start, min(start + size, last), dtype=np.int64)
        batch = rows[np.concatenate([numbers, np.full(size - len(numbers), -1, np.int64)])]
        # jnp.array copies: device_put may alias a host buffer on CPU.
        made = _encoded(lm, jnp.array(batch.tokens), jnp.array(batch.mask), dictionaries, manifest.entries)
        if waiting is not None:
            yield waiting
        waiting = (numbers, batch, made)
    yield waiting
