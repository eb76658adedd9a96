"""Pages of connections: a table of all targets, and of each its formula, its label with the counts behind it, its texts
and those of its inputs.

    inputs, fires = code_columns(held_out.inputs), code_columns(held_out.targets)
    labels  = label_targets(inputs, fires, W)
    made    = connections(W, inputs, fires, [("resid_pre.3", 2048)], labels=labels, bias=b, r2=r2)
    own     = column_panels(fires, read)                                  or `features.collected_panels`
    of_its  = {panel.index: panel for panel in column_panels(inputs, read, used_inputs(made))}
    write_connection_pages(folder, "resid_pre.3 to mlp_out.3", zip(own, made), of_its)

Hidden units get the same pages: `W_enc` for W, `hidden_columns` for the targets, `target="hidden"`, `outputs=W_dec`.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy import sparse

from sparse_jax.connectors.code_panels import ReadText
from sparse_jax.connectors.connection import Connection
from sparse_jax.connectors.connection_sections import cluster_texts, further, lead
from sparse_jax.connectors.labels import WEIGHTED_SUM
from sparse_jax.errors import InputError
from sparse_jax.features.index_page import write_pages
from sparse_jax.features.panels import FeaturePanel

# Terms of a formula in the table, and inputs of which a page shows texts.
IN_TABLE, INPUTS_SHOWN = 5, 10

HINTS = (
    ("label", "of which inputs are on where it fires; *: some rule could not be tested for want of tokens"),
    ("class", "how linear it is in its inputs, by the stated rule"),
    ("R²", "of the connector, on held-out tokens"),
    ("g", "(MSE linear - MSE of the MLP) / variance, on held-out tokens"),
    ("inputs", "with a weight that is not zero"),
    ("+", "weights above 0.1"),
    ("−", "weights below -0.1"),
)


def used_inputs(made: Iterable[Connection], most: int = INPUTS_SHOWN) -> np.ndarray:
    """`[n]` rows of W of which pages show texts, ascending: panels of them are `input_panels` of the pages."""
    return np.unique([term.row for each in made for term in each.formula.terms[:most]]).astype(np.int64)


def connection_panel(
    panel: FeaturePanel,
    connection: Connection,
    input_panels: Mapping[int, FeaturePanel],
    read: ReadText | None = None,
    fires: sparse.csc_array | None = None,
    *,
    most: int = INPUTS_SHOWN,
) -> FeaturePanel:
    """A target's own panel with its connection.

    Args:
        panel: of the target, from `column_panels` or `features.collected_panels`.
        connection: of the same target.
        input_panels: row of W -> panel of that input; those that are missing are shown without texts.
        read, fires: where the pair's tokens stand and the targets' codes, for texts of each cluster; None: none are.
        most: inputs with a row in the table of inputs and texts of their own.

    Raises:
        InputError: they are of two targets.
    """
    if panel.index != connection.target:
        raise InputError(f"the panel of {panel.index} with the connection of {connection.target}: give those of one")
    sections = further(connection, input_panels, most)
    if connection.clusters is not None and read is not None and fires is not None:
        sections += cluster_texts(connection, read, fires)
    signs = [sum(sign * term.weight > 0.1 for term in connection.formula.terms) for sign in (1, -1)]
    scores = [("R²", connection.r2), ("g", None if connection.g is None else connection.g[0])]
    scores += [("inputs", float(connection.formula.nonzeros)), ("+", float(signs[0])), ("−", float(signs[1]))]
    tags = [("label", label_tag(connection)), ("class", connection.linearity)]
    tags += [("formula", connection.formula.text(IN_TABLE))]
    return dataclasses.replace(
        panel,
        scores=(*(score for score in scores if score[1] is not None), *panel.scores),
        tags=(*(tag for tag in tags if tag[1]), *panel.tags),
        lead=(*lead(connection, most), *panel.lead),
        sections=(*sections, *panel.sections),
    )


def label_tag(connection: Connection) -> str:
    """The label, with a star where it is a weighted sum for want of tokens."""
    return f"{connection.label} *" if connection.label == WEIGHTED_SUM and connection.note else connection.label


def write_connection_pages(
    folder: str | os.PathLike,
    title: str,
    pairs: Iterable[tuple[FeaturePanel, Connection]],
    input_panels: Mapping[int, FeaturePanel],
    *,
    read: ReadText | None = None,
    fires: sparse.csc_array | None = None,
    subtitle: str = "",
    facts: Iterable[tuple[str, str]] = (),
    noun: tuple[str, str] = ("Target", "targets"),
    most: int = INPUTS_SHOWN,
) -> Path:
    """Write a folder of pages, whole or not at all; returns the path of its index.

    Args:
        folder, title, subtitle, facts, noun: as `features.write_pages` takes them.
        pairs: of each target its own panel and its connection, taken one after the other.
        input_panels, read, fires, most: as `connection_panel` takes them.

    Raises:
        InputError: as `write_pages` and `connection_panel`.
    """

    def panels() -> Iterator[FeaturePanel]:
        for panel, connection in pairs:
            yield connection_panel(panel, connection, input_panels, read, fires, most=most)

    return write_pages(
        folder, title, panels(), subtitle=subtitle, facts=facts, noun=noun, score_hints=HINTS,
        effect_hint="increase of cross-entropy where the target is removed, nats",
    )  # fmt: skip
