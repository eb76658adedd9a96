"""One pass over a text collects what reading a dictionary needs, of all its features at once, in bounded memory.

    edges = activation_edges(lm, site, text, numbers, coder)
    a = collect(lm, site, text, numbers[:1000], coder, edges=edges)
    b = collect(lm, site, text, numbers[1000:], coder, edges=edges)
    a.merge(b)                      is what collecting from all `numbers` gives
    a.quantile_samples(10, 2)       places drawn uniformly from each tenth of a feature's firings

A feature fires where its code is above 0 and the text's mask (and `max_norm`) lets the token count; a code below 0 is
no firing and counts as 0. Model and encoder run compiled, batch after batch in one shape. On a CPU the codes are then
read where they lie, and only the firings among them are looked at, while the next batch is computed; elsewhere a
compiled top-k finds the firings, and only those are transferred.
"""

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.coactive import Coactive, TokenKeeper
from sparse_jax.features.collected import Collected
from sparse_jax.features.firings import Firings, checked_rows, firings, rows_at_once
from sparse_jax.features.places import Found, Keeper, Places, drawn, priorities, strongest, token_priorities
from sparse_jax.features.token_counts import CHUNK, TokenCounter, TokenCounts
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site

__all__ = [
    "Coactive",
    "Collected",
    "Places",
    "TokenCounts",
    "activation_edges",
    "collect",
    "delimiter_tokens",
    "memory",
]

# The first rows, of which the edges of bins are made.
EDGE_ROWS = 64
# Pairs of a feature and a token that are kept.
TOKEN_ENTRIES = 1 << 23
# Tokens of the sample that says which features fire together.
COACTIVE_TOKENS = 32_768
LIMIT_BYTES = 8 << 30


def delimiter_tokens(token_strings: Sequence[str]) -> np.ndarray:
    """`[vocab]` bool: which tokens are only punctuation and white space, of each at least something (".", "\\n", " ,").

    Args:
        token_strings: the text of every id, as `Tokenizer.token_strings(range(vocab))` gives it.
    """
    return np.array(
        [bool(text) and all(c.isspace() or unicodedata.category(c)[0] == "P" for c in text) for text in token_strings]
    )


def activation_edges(
    lm: LanguageModel, site: Site, text: Rows, row_numbers: np.ndarray, coder: Normalised, bins: int = 10, **options
) -> np.ndarray:
    """Edges of bins of activation `[n_features, bins - 1]`: equal parts of the range up to the first rows' maximum.

    The last bin is open: larger codes may come. A feature that is silent in the first EDGE_ROWS (64) of the rows has
    the median range of those that fire.

    Args:
        lm, site, text, row_numbers, coder, options: as for `collect`.
        bins: how many.

    Raises:
        InputError: fewer than one bin, and what `firings` raises.
    """
    if bins < 1:
        raise InputError(f"{bins} bins of activation: give at least 1")
    maximum = np.zeros(coder.dictionary.n_features, np.float32)
    for found in firings(lm, site, text, checked_rows(text, row_numbers)[:EDGE_ROWS], coder, **options):
        np.maximum.at(maximum, found.features, found.values)
    usual = np.median(maximum[maximum > 0]) if (maximum > 0).any() else 1.0
    return (np.where(maximum > 0, maximum, usual)[:, None] * np.arange(1, bins) / bins).astype(np.float32)


def memory(
    n_features: int,
    vocab_size: int,
    tokens: int,
    *,
    l0: float,
    batch_tokens: int,
    top: int = 20,
    sample: int = 256,
    bins: int = 10,
    coactive_tokens: int = COACTIVE_TOKENS,
    token_entries: int = TOKEN_ENTRIES,
) -> dict[str, int]:
    """Bytes that `collect` needs at most beyond the model and the dictionary, by what they are for.

    Args:
        n_features, vocab_size, tokens: of the dictionary, the model, the text.
        l0: firings of a token, on average.
        batch_tokens: tokens at once.
        top, sample, bins, coactive_tokens, token_entries: as for `collect`.
    """
    fired = int(batch_tokens * max(1.0, l0))
    entries = int(min(n_features * vocab_size, tokens * max(1.0, l0), token_entries))
    chunk = min(CHUNK, int(tokens * max(1.0, l0))) + fired
    slots = n_features * (top + sample)
    return {
        # Two batches, each with its pre-activations, and where they are above 0.
        "codes": 17 * batch_tokens * n_features,
        "firings of a batch": 160 * fired,
        # What is kept, half as much aside, both once more while they are sorted.
        "places": 100 * (3 * slots // 2 + (1 << 19) + 2 * fired),
        # Two tables, what they are joined in, and the sum of them; a chunk of firings while it is sorted.
        "token counts": entries * (112 + 24 * bins) + chunk * (90 + 12 * bins) + 8 * vocab_size,
        "co-active sample": 3 * (coactive_tokens + batch_tokens) * (24 + 16 * int(max(1.0, l0))),
    }


class _Totals:
    """What is collected, while it is."""

    def __init__(self, edges, vocab_size, delimiter, options, seed):
        n = len(edges)
        self.n, self.seed, self.delimiter = n, seed, delimiter
        self.tokens = 0
        self.fired, self.sums, self.maximum = np.zeros(n, np.int64), np.zeros((4, n)), np.zeros(n, np.float32)
        self.first, self.first_delimiters, self.delimiters = (np.zeros(n, np.int64) for _ in range(3))
        self.top = Keeper(n, options["top"], seed, strongest)
        self.sample = Keeper(n, options["sample"], seed, drawn)
        self.token_counts = TokenCounter(edges, vocab_size, options["token_entries"])
        self.coactive = TokenKeeper(n, options["coactive_tokens"], seed)

    def add(self, found: Firings) -> None:
        """Count a batch."""
        features, counted = found.features, found.counted.reshape(-1)
        self.tokens += int(counted.sum())
        self.fired += self._per_feature(features)
        values = found.values.astype(np.float64)
        power = values.copy()
        for sums in self.sums:
            sums += np.bincount(features, power, self.n)
            power *= values
        np.maximum.at(self.maximum, features, found.values)
        self._add_starts(found)
        tokens = found.tokens.reshape(-1)
        self.token_counts.occurrences += np.bincount(tokens[counted], minlength=self.token_counts.vocab_size)
        self.token_counts.add(features, tokens[found.places], found.values)
        self._add_places(found)

    def _per_feature(self, features) -> np.ndarray:
        return np.bincount(features, minlength=self.n)

    def _add_starts(self, found: Firings) -> None:
        """Firings at the first position that counts in a row, on delimiters, and on the first of them."""
        first = _first_true(found.counted)
        delimiter = found.counted & self.delimiter[found.tokens]
        for totals, where in (
            (self.first, first),
            (self.first_delimiters, _first_true(delimiter & ~first)),
            (self.delimiters, delimiter),
        ):
            totals += self._per_feature(found.features[where.reshape(-1)[found.places]])

    def _add_places(self, found: Firings) -> None:
        context = found.tokens.shape[1]
        rows, positions = np.repeat(found.rows, context), np.tile(np.arange(context), len(found.rows))
        of_tokens = token_priorities(self.seed, rows, positions)

        def at(chosen: np.ndarray) -> Found:
            features, places = found.features[chosen], found.places[chosen]
            return Found(
                features.astype(np.int32),
                found.values[chosen],
                rows[places].astype(np.int32),
                positions[places].astype(np.int32),
            )

        self.top.add(at(self.top.may_keep(found.features, found.values)))
        chance = priorities(of_tokens[found.places], found.features)
        self.sample.add(at(self.sample.may_keep(found.features, chance)))
        counted = found.counted.reshape(-1)
        fire = np.bincount(found.places, minlength=len(rows))
        self.coactive.add(of_tokens[counted], rows[counted], positions[counted], fire[counted], found.features)

    def result(self, rows: np.ndarray) -> Collected:
        plain = ("tokens", "fired", "sums", "maximum", "first", "first_delimiters", "delimiters", "seed")
        return Collected(
            **{name: getattr(self, name) for name in plain},
            top=self.top.places(),
            sample=self.sample.places(),
            token_counts=self.token_counts.result(),
            coactive=self.coactive.result(),
            rows=np.sort(rows),
        )


def _first_true(mask: np.ndarray) -> np.ndarray:
    """`[rows, position]` bool: only the first True of each row of `mask`."""
    return mask & (np.cumsum(mask, axis=1) == 1)


def collect(
    lm: LanguageModel,
    site: Site,
    text: Rows,
    row_numbers: np.ndarray,
    coder: Normalised,
    *,
    top: int = 20,
    sample: int = 256,
    bins: int = 10,
    edges: np.ndarray | None = None,
    delimiters: np.ndarray | None = None,
    max_norm: float = float("inf"),
    batch_rows: int | None = None,
    slots: int | None = None,
    seed: int = 0,
    coactive_tokens: int = COACTIVE_TOKENS,
    token_entries: int = TOKEN_ENTRIES,
    limit_bytes: int = LIMIT_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Collected:
    """Collect from rows of text, in one pass.

    Args:
        lm, site: where activations come from.
        text, row_numbers: which rows, each once.
        coder: a dictionary, or neurons, PCA, random directions, in the same form.
        top: places of each feature that are kept as its strongest.
        sample: places of each feature that are drawn from all its firings.
        bins: equal parts of the range of activation in which firings on a token are counted, see `activation_edges`.
        edges: `[n_features, bins - 1]` of the bins, in place of `bins`; parts of a text merge only with the same.
        delimiters: `[vocab]` bool, which tokens are delimiters, see `delimiter_tokens`; None: none are.
        max_norm: tokens whose activation has a larger norm do not count.
        batch_rows, slots: see `firings`.
        seed: decides the samples.
        coactive_tokens: tokens that are drawn to say which features fire together.
        token_entries: pairs of a feature and a token that are kept; with more the rarest are dropped, and counted in
            `token_counts.lost`.
        limit_bytes: memory that may be needed.
        progress: is told of the tokens of each batch.

    Raises:
        InputError: an argument that cannot be, told at once; more memory than `limit_bytes` (`memory` says how much),
            told after the first batch; an activation that is not finite.
    """
    vocab, n = lm.config.vocab_size, coder.dictionary.n_features
    numbers = checked_rows(text, row_numbers)
    kept = {"top": top, "sample": sample, "coactive_tokens": coactive_tokens, "token_entries": token_entries}
    if wrong := [f"{name} {value}" for name, value in kept.items() if value < 1]:
        raise InputError(f"{', '.join(wrong)}: give at least 1")
    if seed < 0:
        raise InputError(f"seed {seed}: a seed cannot be negative")
    delimiter = _checked_delimiters(delimiters, vocab)
    passed = {"max_norm": max_norm, "batch_rows": batch_rows, "slots": slots}
    if edges is None:
        edges = activation_edges(lm, site, text, numbers, coder, bins, **passed)
    edges = _checked_edges(edges, n)
    batch_tokens = rows_at_once(batch_rows, text.context, n) * text.context
    totals = _Totals(edges, vocab, delimiter, kept, seed)
    for number, found in enumerate(firings(lm, site, text, numbers, coder, **passed)):
        if number == 0:
            l0 = len(found.features) / max(1, int(found.counted.sum()))
            parts = memory(n, vocab, len(numbers) * text.context, l0=l0, batch_tokens=batch_tokens,
                           bins=edges.shape[1] + 1, **kept)  # fmt: skip
            _check_memory(parts, limit_bytes)
        totals.add(found)
        if progress is not None:
            progress(int((found.rows >= 0).sum()) * text.context)
    return totals.result(numbers)


def _checked_delimiters(given: np.ndarray | None, vocab: int) -> np.ndarray:
    if given is None:
        return np.zeros(vocab, bool)
    given = np.asarray(given)
    if given.ndim != 1 or given.dtype != bool or len(given) > vocab:
        raise InputError(f"delimiters of shape {given.shape}, type {given.dtype}: give a bool for each of {vocab} ids")
    return np.concatenate([given, np.zeros(vocab - len(given), bool)])  # a padded vocabulary has ids without text


def _checked_edges(edges: np.ndarray, n_features: int) -> np.ndarray:
    edges = np.asarray(edges, np.float32)
    if (
        edges.ndim != 2
        or len(edges) != n_features
        or (np.diff(edges, axis=1) < 0).any()
        or not np.isfinite(edges).all()
    ):
        raise InputError(f"edges of shape {edges.shape}: give finite, ascending ones for each of {n_features} features")
    return edges


def _check_memory(parts: dict[str, int], limit: int) -> None:
    if (total := sum(parts.values())) > limit:
        shown = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        raise InputError(
            f"collecting may need {total / 1e9:.2f} GB ({shown}), more than the limit of {limit / 1e9:.2f}: lower "
            "batch_rows, sample, top or token_entries, or raise limit_bytes (--memory-gb)"
        )
