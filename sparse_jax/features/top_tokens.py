"""Top-token tables: each feature with the input tokens on which its mean activation is largest.

    rows = top_tokens(collected, tokenizer.token_strings)
    print(as_text(rows[:20]))
    write_csv(rows, Path("layer-3.csv"))
    table(rows[:200], "resid_post.3")            for `features.page`

Features that never fire are dropped. The mean of a token is over all its occurrences that count, with 0 where the
feature is silent (`over="occurrences"`): a token on which the feature always fires stands before one on which it fired
once. With `over="firings"` it is the mean where the feature fires.

Source: Udell 2023, the "activation_additions" write-up on dictionaries of Llama 2's and Pythia's residual streams.
"""

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.features.collected import Collected
from sparse_jax.features.page import Table
from sparse_jax.features.token_counts import TokenCounts

Over = Literal["occurrences", "firings"]
Order = Literal["feature", "density", "mean"]


@dataclass(frozen=True)
class TopToken:
    """A token of a feature.

    Attributes:
        text: as the tokenizer shows it.
        mean: the feature's mean activation on it.
        firings: how often the feature fired on it.
        occurrences: how often it occurred.
    """

    text: str
    mean: float
    firings: int
    occurrences: int


@dataclass(frozen=True)
class Row:
    """A feature of the table.

    Attributes:
        feature: its number.
        density: share of tokens on which it fires.
        tokens: the largest mean first.
    """

    feature: int
    density: float
    tokens: tuple[TopToken, ...]


def top_tokens(
    collected: Collected,
    token_strings: Callable[[np.ndarray], list[str]],
    *,
    count: int = 10,
    over: Over = "occurrences",
    least: int = 1,
    order: Order = "feature",
) -> list[Row]:
    """The table's rows.

    Args:
        collected: of a text.
        token_strings: ids to what is shown.
        count: tokens of each feature, at most.
        over: what the mean of a token is taken over, see above.
        least: tokens that occurred less often are left out.
        order: by number, by density (the densest first), or by the mean of the first token (the largest first).

    Raises:
        InputError: a number below 1, an unknown `over` or `order`.
    """
    if count < 1 or least < 1:
        raise InputError(f"{count} tokens that occur at least {least} times: give at least 1")
    if over not in ("occurrences", "firings") or order not in ("feature", "density", "mean"):
        raise InputError(f"over {over!r}, order {order!r}: give occurrences or firings; feature, density or mean")
    counts, density = collected.token_counts, collected.density
    firings = counts.counts
    occurrences = counts.occurrences[counts.tokens]
    means = counts.sums / (firings if over == "firings" else occurrences)
    rows = []
    for feature in np.flatnonzero(collected.fired):
        part = np.arange(counts.starts[feature], counts.starts[feature + 1])
        part = part[occurrences[part] >= least]
        best = part[np.argsort(-means[part], kind="stable")[:count]]
        texts = token_strings(counts.tokens[best])
        tokens = (TopToken(text, float(means[i]), int(firings[i]), int(occurrences[i])) for text, i in zip(texts, best))
        rows.append(Row(int(feature), float(density[feature]), tuple(tokens)))
    if order == "density":
        rows.sort(key=lambda row: -row.density)
    elif order == "mean":
        rows.sort(key=lambda row: -row.tokens[0].mean if row.tokens else 0.0)
    return rows


def commonest_share(counts: TokenCounts) -> np.ndarray:
    """`[n_features]` float64: of a feature's firings, the share on the one token it fires on most often; 0 if silent.

    1 is a feature of one token. Beside the share for neurons it says how far features are about single tokens.
    """
    n = len(counts.starts) - 1
    most, total = np.zeros(n, np.int64), np.zeros(n, np.int64)
    np.maximum.at(most, counts.features, counts.counts)
    np.add.at(total, counts.features, counts.counts)
    return most / np.maximum(total + counts.lost, 1)


def shown(text: str) -> str:
    """A token in quotes, with everything that would not be seen, or would move the cursor, spelled out: `' a\\n'`."""
    return repr(text)


def as_text(rows: Sequence[Row]) -> str:
    """The table for a terminal, one feature a line."""
    width = max((len(str(row.feature)) for row in rows), default=0)
    return "\n".join(
        f"{row.feature:>{width}} {100 * row.density:8.3f} %  "
        + "  ".join(f"{shown(token.text)} {token.mean:.3g}" for token in row.tokens)
        for row in rows
    )


def table(rows: Sequence[Row], title: str, note: str = "") -> Table:
    """The table for a page."""
    count = max((len(row.tokens) for row in rows), default=0)
    columns = ("feature", "density, %", *(f"token {i + 1}" for i in range(count)))
    cells = []
    for row in rows:
        tokens = [f"{shown(token.text)} {token.mean:.3g}" for token in row.tokens]
        cells.append((str(row.feature), 100 * row.density, *tokens, *[""] * (count - len(tokens))))
    return Table(title, columns, tuple(cells), note)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the table as CSV (UTF-8), whole or not at all: feature, density, then token, mean and firings of each.

    Tokens stand as they are, in quotes where they hold a comma, a quote or a line break: read them with a CSV reader.
    """
    count = max((len(row.tokens) for row in rows), default=0)
    head = [f"{name}_{i + 1}" for i in range(count) for name in ("token", "mean", "firings")]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # Surrogates that stand for no character are spelled out; a token must not stop the table from being written.
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["feature", "density", *head])
            for row in rows:
                cells = [cell for token in row.tokens for cell in (token.text, f"{token.mean:.6g}", token.firings)]
                writer.writerow([row.feature, f"{row.density:.6g}", *cells])
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
