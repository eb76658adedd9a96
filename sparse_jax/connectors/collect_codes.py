"""Codes of the same tokens at several sites, from one pass of the model over rows of text.

    store = collect_codes(lm, text, numbers, {"resid_pre.3": coder, "mlp_out.3": other})
    store = collect_codes(..., folder=path)      in mapped files; goes on where it broke off
    store = open_codes(path)

Each site is given its dictionary, or None: then its raw numbers are kept. Only tokens that count are kept: the text's
mask lets them, and their activation is at no site larger than `max_norms` says. A code below 0 is no firing and counts
as 0 (of a raw site the sign stays). Model and encoders run compiled, batch after batch in one shape; on a CPU the codes
are then read where they lie while the next batch is computed, elsewhere a compiled top-k finds those that are active.

Memory for each token: 6 bytes a slot and site (value and 16-bit index; 8 with more than 65,536 features; 4 for a raw
site), and 20 bytes for its place. Batches take 12 bytes x batch tokens x features of all sites beside that.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_jax.activations.blocks import at_sites, check_finite, check_sites, first_not_finite
from sparse_jax.connectors.code_files import CodeFiles, CodeLayout, SiteLayout, finished, identity_of, open_codes
from sparse_jax.connectors.paired_codes import CodeStore
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.firings import SLOTS, checked_rows, rows_at_once
from sparse_jax.lm.model import LanguageModel, check_site, site_width
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site
from sparse_jax.numerics import safe_norm
from sparse_jax.numerics.sparse_codes import SparseCodes, top_k_codes

__all__ = ["collect_codes", "open_codes"]

# Slots that a site gets over the most that the first batch needed, where that is more than the dictionary's k.
_ROOM = 1.25


class _Batch(NamedTuple):
    """What the device makes of a batch; names are those of sites, tokens are those of the rows one after the other."""

    dense: dict[str, jax.Array]  # [tokens, n], 0 where nothing fires; raw numbers of a raw site
    sparse: dict[str, SparseCodes]
    most: dict[str, jax.Array]  # [tokens] firings
    counted: jax.Array  # [tokens]
    first_bad: dict[str, jax.Array]
    finite: dict[str, jax.Array]


@partial(jax.jit, static_argnames=("sites", "slots"))
def _batch(lm, tokens, mask, coders, max_norms, sites: tuple[Site, ...], slots: tuple[int, ...] | None) -> _Batch:
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in at_sites(lm, tokens, sites).items()}
    counted = mask.reshape(-1)
    for name, x in flat.items():
        counted = counted & (safe_norm(x) <= max_norms[name])
    made = _Batch({}, {}, {}, counted, {name: first_not_finite(x) for name, x in flat.items()}, {})
    for number, (name, x) in enumerate(flat.items()):
        codes = x if coders[name] is None else jnp.maximum(coders[name].encode(x), 0)
        made.dense[name] = codes = jnp.where(counted[:, None], codes, 0)
        made.finite[name] = jnp.all(jnp.isfinite(jnp.sum(codes, axis=1)))
        if coders[name] is not None and slots is not None:
            made.sparse[name] = top_k_codes(codes, slots[number])
            made.most[name] = jnp.sum(codes > 0, axis=1, dtype=jnp.int32)
    return made


def collect_codes(
    lm: LanguageModel,
    text: Rows,
    row_numbers: np.ndarray,
    coders: Mapping[str, Normalised | None],
    *,
    slots: Mapping[str, int] | int | None = None,
    max_norms: Mapping[str, float] | None = None,
    batch_rows: int | None = None,
    folder: Path | None = None,
    identity: dict | None = None,
    progress: Callable[[int], None] | None = None,
) -> CodeStore:
    """Codes of the tokens of some rows.

    Args:
        lm, text, row_numbers: which activations; each row once. Tokens are in the order of these rows.
        coders: site -> dictionary, or None for the site's own numbers.
        slots: active features of a token that are kept, the largest; of all sites or by site. None: the dictionary's k
            if no token of the first batch has more, else a quarter more than the most there. What finds no slot is
            counted in `SiteCodes.overflow`.
        max_norms: site -> tokens whose activation there has a larger norm do not count.
        batch_rows: rows at once; None: 32, or fewer where their codes would have more than 128 MB.
        folder: where files are written; what is there of the same model, text and dictionaries is continued, or, if it
            is whole, just opened. None: in memory.
        identity: JSON-able facts that stand in the manifest.
        progress: is told of the tokens of each batch.

    Raises:
        InputError: sites, rows, slots or norms that cannot be, told at once; an activation or code that is not finite;
            a folder of something else.
    """
    sites = tuple(check_site(lm.config, name) for name in coders)
    coders = dict(zip(map(str, sites), coders.values()))
    check_sites(sites, dict(max_norms or {}))
    sizes = {str(site): _checked_size(lm, site, coders[str(site)]) for site in sites}
    batch_rows = rows_at_once(batch_rows, text.context, sum(sizes.values()))
    numbers = checked_rows(text, row_numbers)
    given = _given_slots(slots, coders, sizes)
    norms = {name: jnp.array((max_norms or {}).get(name, np.inf), jnp.float32) for name in sizes}
    facts = None
    if folder is not None:
        facts = {"given": identity or {}, **identity_of(lm, text, numbers, coders)}
        facts |= {"max_norms": dict(max_norms or {}), "slots_given": given, "batch_rows": batch_rows}
        if finished(folder, facts):
            return open_codes(folder)
    return _collected(lm, text, numbers, coders, sites, sizes, given, norms, batch_rows, folder, facts, progress)


def _collected(lm, text, numbers, coders, sites, sizes, slots, norms, batch_rows, folder, facts, progress):
    padded = np.concatenate([numbers, np.full(-len(numbers) % batch_rows, -1, np.int64)]).reshape(-1, batch_rows)
    files = None if folder is None else CodeFiles.begun(Path(folder), facts)
    first = 0 if files is None else files.batches
    layout = None if files is None else files.layout
    kept: list[dict] = []
    on_device = None if jax.default_backend() == "cpu" else tuple(min(SLOTS, n) for n in sizes.values())
    run = partial(_run, lm, text, coders, norms, sites, on_device)
    before = None
    for batch in (*padded[first:], None):
        here = None if batch is None else run(batch)  # nothing waits for it: the one before is read meanwhile
        if before is not None:
            rows, tokens, document, made = before
            _check(made, rows, tokens)
            layout = layout or CodeLayout(_layouts(coders, sizes, slots, made))
            arrays, overflow = _arrays(layout, made, rows, tokens, document)
            if files is None:
                kept.append((arrays, overflow))
            else:
                files.append(layout, arrays, overflow)
            if progress is not None:
                progress(int((rows >= 0).sum()) * text.context)
        before = here
    if files is not None:
        files.finish()
        return open_codes(folder)
    arrays = {name: np.concatenate([part[name] for part, _ in kept]) for name in kept[0][0]}
    overflow = {name: sum(lost[name] for _, lost in kept) for name in sizes}
    return layout.store(arrays, overflow)


def _checked_size(lm: LanguageModel, site: Site, coder: Normalised | None) -> int:
    """Features of a site."""
    width = site_width(lm.config, site)
    if coder is None:
        return width
    if coder.dictionary.d_in != width:
        raise InputError(f"site {site} has {width} numbers, its dictionary reads {coder.dictionary.d_in}: give its own")
    return coder.dictionary.n_features


def _given_slots(slots, coders, sizes: dict[str, int]) -> dict[str, int]:
    """Site -> slots, for the dictionaries that were given some."""
    given = dict.fromkeys(coders, slots) if isinstance(slots, int) else dict(slots or {})
    if wrong := [f"{name}: {value}" for name, value in given.items() if name not in sizes or value < 1]:
        raise InputError(f"slots {', '.join(wrong)}: give at least 1 for sites among {', '.join(sizes)}")
    return {name: min(value, sizes[name]) for name, value in given.items() if coders[name] is not None}


def _run(lm, text, coders, norms, sites, on_device, batch):
    tokens, _, mask, document = text[batch]
    # jnp.array copies: device_put may alias a host buffer on CPU.
    return batch, tokens, document, _batch(lm, jnp.array(tokens), jnp.array(mask), coders, norms, sites, on_device)


def _check(made: _Batch, rows: np.ndarray, tokens: np.ndarray) -> None:
    check_finite({name: int(bad) for name, bad in made.first_bad.items()}, rows, tokens)
    for name, finite in made.finite.items():
        if not finite:
            raise InputError(f"codes at {name} are not finite: the dictionary's parameters cannot be used")


def _layouts(coders, sizes, slots, made: _Batch) -> dict[str, SiteLayout]:
    """How each site's codes are kept, by what the first batch needs."""
    found = {}
    for name, coder in coders.items():
        n = sizes[name]
        if coder is None:
            found[name] = SiteLayout(n, n, raw=True)
            continue
        most = int(_firings(made, name).max(initial=0))
        k = getattr(coder.dictionary, "k", 0)
        usual = k if 0 < most <= k else int(np.ceil(_ROOM * most))
        found[name] = SiteLayout(n, slots.get(name, min(max(usual, 1), n)))
    return found


def _firings(made: _Batch, name: str) -> np.ndarray:
    """`[tokens]` how many features fire."""
    if name in made.most:
        return np.asarray(made.most[name])
    return np.count_nonzero(np.asarray(made.dense[name]), axis=1)


def _arrays(layout: CodeLayout, made: _Batch, rows, tokens, document) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The arrays of the tokens of a batch that count, and what of each site found no slot."""
    counted = np.flatnonzero(np.asarray(made.counted))
    row, position = np.divmod(counted, tokens.shape[1])
    arrays = {
        "token": tokens.reshape(-1)[counted].astype(np.int32),
        "document": document.reshape(-1)[counted].astype(np.int32),
        "row": rows[row].astype(np.int64),
        "position": position.astype(np.int32),
    }
    overflow = {}
    for name, site in layout.sites.items():
        overflow[name] = 0
        if site.raw:
            arrays[f"{name}.values"] = np.asarray(made.dense[name])[counted]
            continue
        codes, overflow[name] = _slotted(made, name, counted, site.slots)
        arrays[f"{name}.values"] = codes.values
        arrays[f"{name}.indices"] = codes.indices.astype(site.index_dtype)
    return arrays, overflow


def _slotted(made: _Batch, name: str, counted: np.ndarray, slots: int) -> tuple[SparseCodes, int]:
    """(codes `[counted, slots]`, how many active ones are missing)."""
    if name in made.sparse and _firings(made, name).max(initial=0) <= made.sparse[name].values.shape[1]:
        values, indices = (np.asarray(part)[counted] for part in made.sparse[name])
        lost = np.count_nonzero(values[:, slots:])  # the largest come first
        missing = [(0, 0), (0, max(0, slots - values.shape[1]))]
        return SparseCodes(*(np.pad(part[:, :slots], missing) for part in (values, indices))), int(lost)
    # Tokens that do not count are all 0 there: leaving them out afterwards copies slots, not dense rows.
    codes, lost = largest_slots(np.asarray(made.dense[name]), slots)
    return SparseCodes(*(part[counted] for part in codes)), lost


def largest_slots(dense: np.ndarray, slots: int) -> tuple[SparseCodes, int]:
    """(codes `[rows, slots]` of `dense [rows, n]` >= 0, how many are missing: the smallest of their rows)."""
    rows, n = dense.shape
    flat = np.flatnonzero(dense)
    row = flat // n
    feature, value = flat - row * n, dense.reshape(-1)[flat]
    firings = np.bincount(row, minlength=rows)
    if firings.max(initial=0) > slots:
        # Within a row the largest first, ties to the lower feature.
        order = np.lexsort((feature, -value, row))
        feature, value = feature[order], value[order]
    place = np.arange(len(row)) - np.repeat(np.cumsum(firings) - firings, firings)
    kept = place < slots
    lost = len(row) - int(kept.sum())
    codes = SparseCodes(np.zeros((rows, slots), np.float32), np.zeros((rows, slots), np.int32))
    codes.values[row[kept], place[kept]] = value[kept]
    codes.indices[row[kept], place[kept]] = feature[kept]
    return codes, lost
