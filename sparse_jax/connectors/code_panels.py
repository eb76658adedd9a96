"""Panels of features of which the codes are at hand at the tokens of a pair: inputs, targets, hidden units alike.

    read = ReadText(pair.tokens, text, tokenizer.token_strings)
    for panel in column_panels(code_columns(pair.targets), read, features): ...

No model is run: what is shaded are the codes that the pair holds, 0 where the mask dropped a token.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from sparse_jax.connectors.paired_codes import Tokens
from sparse_jax.errors import InputError
from sparse_jax.features.page import Context
from sparse_jax.features.panels import FeaturePanel, Passage
from sparse_jax.lm.rows import Rows

# (feature, rows of the text) -> row -> [position] changes of the next token's log p where the feature is removed.
ChangesOf = Callable[[int, np.ndarray], dict[int, np.ndarray]]
# (feature, rows, positions) -> texts of what it needs there.
NeedsOf = Callable[[int, np.ndarray, np.ndarray], tuple[Context, ...]]


@dataclass(frozen=True, eq=False)
class ReadText:
    """Where the tokens of a pair stand in a text, and how they are written.

    Attributes:
        tokens: of the pair.
        text: the rows that they count.
        token_strings: token ids to what is shown.
        before, after: tokens shown on either side of a place.
    """

    tokens: Tokens
    text: Rows
    token_strings: Callable[[np.ndarray], list[str]]
    before: int = 14
    after: int = 6

    def __post_init__(self):
        rows, positions = np.asarray(self.tokens.row), np.asarray(self.tokens.position)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.text):
            raise InputError(f"tokens of rows {rows.min()} to {rows.max()}: the text has 0 to {len(self.text) - 1}")
        if len(rows) and positions.max() >= self.text.context:
            raise InputError(f"tokens at positions up to {positions.max()}: rows have 0 to {self.text.context - 1}")

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Places (row x context + position), ascending, and which token stands at each."""
        places = np.asarray(self.tokens.row, np.int64) * self.text.context + self.tokens.position
        order = np.argsort(places, kind="stable")
        return places[order], order

    def contexts(self, column: np.ndarray, chosen: np.ndarray, labels: Iterable[str]) -> tuple[Context, ...]:
        """Texts around tokens of the pair.

        Args:
            column: `[tokens]` activations of what is shaded.
            chosen: which tokens.
            labels: why each is shown.
        """
        if not len(chosen):
            return ()
        places, order = self._places
        rows, positions = self.tokens.row[chosen], self.tokens.position[chosen]
        ids, _, _, documents = self.text[np.asarray(rows, np.int64)]
        made = []
        for row, position, its, document, label in zip(rows.tolist(), positions.tolist(), ids, documents, labels):
            first, last = max(0, position - self.before), min(self.text.context, position + self.after + 1)
            there = np.flatnonzero(document[first:last] >= 0)  # what fills a short row up is no text
            last = first + int(there[-1]) + 1
            start = row * self.text.context
            found = slice(*np.searchsorted(places, [start + first, start + last]))
            shown = np.zeros(last - first)
            shown[places[found] - start - first] = column[order[found]]
            made.append(
                Context(
                    tuple(self.token_strings(its[first:last])), tuple(np.maximum(shown, 0).tolist()),
                    position - first, label, self.text.documents[document[position]],
                )
            )  # fmt: skip
        return tuple(made)


def column_panels(
    columns: sparse.csc_array,
    read: ReadText,
    features: Iterable[int] | None = None,
    *,
    top: int = 6,
    quantiles: int = 5,
    per_quantile: int = 1,
    tokens: int = 8,
    seed: int = 0,
    changes_of: ChangesOf | None = None,
    needs_of: NeedsOf | None = None,
    need_texts: int = 2,
) -> Iterator[FeaturePanel]:
    """A panel of each feature, one after the other.

    Args:
        columns: `[tokens, features]` codes by feature.
        read: where those tokens stand.
        features: which; all by default.
        top: strongest places shown, of different rows.
        quantiles, per_quantile: and places drawn from equal parts of the firings, the strongest part first.
        tokens: top tokens: those with the largest summed activation.
        seed: decides the draws.
        changes_of: what removing the feature does, to stand beside the activations; None: not measured.
        needs_of: what the feature needs in its `need_texts` strongest texts; None: not measured.

    Raises:
        InputError: columns of other tokens, numbers that are none of the features.
    """
    if columns.shape[0] != len(read.tokens):
        raise InputError(f"codes of {columns.shape[0]} tokens, places of {len(read.tokens)}: give the same tokens")
    features = np.arange(columns.shape[1]) if features is None else np.asarray(list(features), np.int64)
    if len(features) and not 0 <= features.min() <= features.max() < columns.shape[1]:
        raise InputError(f"features {features.min()} to {features.max()}: there are 0 to {columns.shape[1] - 1}")
    column = np.zeros(columns.shape[0], np.float32)
    for feature in features.tolist():
        part = slice(columns.indptr[feature], columns.indptr[feature + 1])
        where, values = columns.indices[part], columns.data[part]
        column[where] = values
        chosen, labels = _places(
            where, values, read.tokens.row, top, quantiles, per_quantile, np.random.default_rng([seed, feature])
        )
        contexts = read.contexts(column, chosen, labels)
        changes = changes_of(feature, np.unique(read.tokens.row[chosen])) if changes_of and len(chosen) else {}
        few = chosen[:need_texts]
        yield FeaturePanel(
            index=feature,
            density=len(where) / max(1, columns.shape[0]),
            maximum=float(values.max(initial=0)),
            mean=float(values.mean(dtype=np.float64)) if len(where) else None,
            top_tokens=_top_tokens(read, where, values, tokens),
            contexts=tuple(
                Passage(context, _shown(context, changes.get(int(read.tokens.row[i])), int(read.tokens.position[i])))
                for context, i in zip(contexts, chosen)
            ),
            needs=needs_of(feature, read.tokens.row[few], read.tokens.position[few]) if needs_of and len(few) else (),
        )
        column[where] = 0


def _places(where, values, rows, top, quantiles, per_quantile, generator) -> tuple[np.ndarray, list[str]]:
    """Tokens to show, each of another row, and why: the strongest, then some of each part of the firings."""
    chosen, labels, used = [], [], set()

    def take(candidates, count, label):
        for i in candidates:
            if count and (row := int(rows[where[i]])) not in used:
                chosen.append(where[i])
                labels.append(label)
                used.add(row)
                count -= 1

    ascending = np.argsort(values, kind="stable")
    take(ascending[::-1], top, "top")
    for part in reversed(range(quantiles)):
        some = ascending[len(values) * part // quantiles : len(values) * (part + 1) // quantiles]
        label = f"firings {100 * part // quantiles}–{100 * (part + 1) // quantiles} %"
        take(generator.permutation(some), per_quantile, label)
    return np.array(chosen, np.int64), labels


def _shown(context: Context, changes: np.ndarray | None, position: int) -> tuple[float, ...]:
    """The changes of a row at the tokens of a text of it."""
    first = position - context.peak
    return () if changes is None else tuple(map(float, changes[first : first + len(context.tokens)]))


def _top_tokens(read: ReadText, where, values, count) -> tuple[tuple[str, float], ...]:
    ids, inverse = np.unique(read.tokens.token[where], return_inverse=True)
    sums = np.bincount(inverse, values, minlength=len(ids))
    means = sums / np.maximum(np.bincount(inverse, minlength=len(ids)), 1)
    best = np.argsort(-sums, kind="stable")[:count]
    return tuple(zip(read.token_strings(ids[best]), map(float, means[best])))
