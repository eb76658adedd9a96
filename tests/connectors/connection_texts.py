"""A text of hostile tokens, codes on it and their connections: what pages are made of in tests."""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import sparse

from sparse_jax.connectors.clusters import unit_clusters
from sparse_jax.connectors.code_columns import code_columns
from sparse_jax.connectors.code_panels import ReadText, column_panels
from sparse_jax.connectors.connection import Connection, connections
from sparse_jax.connectors.connection_pages import used_inputs
from sparse_jax.connectors.labels import label_targets
from sparse_jax.connectors.paired_codes import Pair, SiteCodes, Tokens
from sparse_jax.lm.rows import Rows

HOSTILE = (
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "\u202e",
)
HOSTILE += ("__proto__", "", "\n", "\ud800", "'", '"', "&amp;", "<!--", "\x00", " word", "🙂")
CONTEXT, ROWS = 24, 120
SITES = [("resid_pre.3", 5), ("<b>mlp</b>", 3)]


class Made(NamedTuple):
    pair: Pair
    text: Rows
    W: np.ndarray
    inputs: sparse.csc_array
    fires: sparse.csc_array
    read: ReadText
    connections: list[Connection]


def strings(ids: np.ndarray) -> list[str]:
    return [HOSTILE[i % len(HOSTILE)] for i in np.asarray(ids).tolist()]


@cache
def made() -> Made:
    """8 inputs (5 and 3 of two sites), 4 targets: an OR of 0 and 6, 1 without 2, one without inputs, and one silent."""
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 50, ROWS * CONTEXT + 1).astype(np.uint16)
    text = Rows(stream, np.array([0, 700]), ("a <i>book</i>", "another"), CONTEXT, 1, (), None, 0, 0)
    tokens, _, mask, document = text[np.arange(ROWS)]
    rows, positions = np.nonzero(mask)
    inputs = rng.uniform(0.5, 2, (len(rows), 8)) * (rng.random((len(rows), 8)) < 0.15)
    W = np.zeros((8, 4))
    W[[0, 6], 0], W[[1, 2], 1], W[3, 3] = (0.26, 0.23), (1.5, -5), 0.05
    targets = np.maximum(inputs @ W, 0)
    targets[:, 2:] = 0
    targets[:, 2] = rng.random(len(rows)) < 0.1
    pair = Pair(
        *(_site(name, codes) for name, codes in (("in", inputs), ("out", targets))),
        Tokens(tokens[rows, positions], document[rows, positions], rows, positions),
    )
    columns, fires = code_columns(pair.inputs), code_columns(pair.targets)
    labels = label_targets(columns, fires, W)
    clusters = {j: unit_clusters(columns, W[:, j], fires, j) for j in (0, 1)}
    g = np.array([0.01, 0.3, 0.0, np.nan])
    found = connections(
        W, columns, fires, SITES, labels=labels, r2=np.array([0.9, 0.5, np.nan, 0.1]), g=(g, g - 0.1, g + 0.1),
        classes=["linear", "nonlinear", "unexplained", ""], clusters=clusters, bias=np.array([0.0, -0.2, 0.1, 0]),
        outputs=np.array([[0.5, -0.25], [0, 0], [1, 0], [0, 0.0]]),
    )  # fmt: skip
    return Made(pair, text, W, columns, fires, ReadText(pair.tokens, text, strings), found)


def _site(name, codes) -> SiteCodes:
    codes = codes.astype(np.float32)
    indices = np.broadcast_to(np.arange(codes.shape[1], dtype=np.int32), codes.shape)
    return SiteCodes(name, codes.shape[1], codes, indices)


def input_panels() -> dict:
    m = made()
    return {panel.index: panel for panel in column_panels(m.inputs, m.read, used_inputs(m.connections))}
