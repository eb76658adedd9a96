"""Codes of tiny models on a tiny text, made by whole passes: what stands around a module in the tests here."""

import numpy as np

from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens, joined, raw_site
from sparse_jax.features.causes import Located
from sparse_jax.lm import forward, site_width
from sparse_jax.lm.rows import Rows
from tests.features.tiny_models import CONTEXT, VOCAB, coder
from tests.texts import joined_rows


def rows_of(n_rows: int = 9, seed: int = 0) -> Rows:
    """Random tokens; documents of 7 to 20 tokens."""
    generator = np.random.default_rng(seed)
    n = n_rows * CONTEXT
    starts = np.cumsum(generator.integers(7, 20, n))
    starts = np.concatenate([[0], starts[starts < n]])
    stream = generator.integers(1, VOCAB, n + 1)
    return joined_rows(stream, starts, CONTEXT)


def located(lm, site: str, n: int, seed: int, dtype: str = "float32") -> Located:
    """A random dictionary at a site."""
    return Located(site, coder(site_width(lm.config, site), n, seed, dtype, 0.5))


def codes_of(lm, place: Located, rows: Rows, mask: np.ndarray) -> SiteCodes:
    """Codes at the tokens where the mask holds, each feature in a slot of its own."""
    site, trained = place
    tokens = rows[np.arange(rows.n_rows)].tokens
    x = np.asarray(forward(lm, tokens, capture=[site]).captured[site]).reshape(*tokens.shape, -1)[mask]
    if trained is None:
        return raw_site(site, x.astype(np.float32))
    values = np.maximum(np.asarray(trained.encode(x)), 0).astype(np.float32)
    return SiteCodes(site, values.shape[1], values, np.broadcast_to(np.arange(values.shape[1]), values.shape))


def pair_of(lm, inputs: list[Located], target: Located, rows: Rows) -> Pair:
    """Codes before and behind."""
    batch = rows[np.arange(rows.n_rows)]
    row, position = np.nonzero(batch.mask)
    tokens = Tokens(
        batch.tokens[batch.mask], batch.document[batch.mask], row.astype(np.int64), position.astype(np.int32)
    )
    before = joined([codes_of(lm, place, rows, batch.mask) for place in inputs])
    return Pair(before, codes_of(lm, target, rows, batch.mask), tokens)
