"""The parts of a connection's page: formula, label with its counts, inputs, clusters, texts of inputs."""

from collections.abc import Mapping

import numpy as np
from scipy import sparse

from sparse_jax.connectors.code_panels import ReadText
from sparse_jax.connectors.connection import Connection
from sparse_jax.connectors.formula import Term, short_weight
from sparse_jax.connectors.labels import AND, AND_NOT, NO_INPUTS, OR, WEIGHTED_SUM, Test
from sparse_jax.features.panels import FeaturePanel
from sparse_jax.features.sections import Cells, Line, Section, Texts

_RULES = {
    OR: "OR: it fires on 0.8 or more of the tokens with exactly one positive input, for two of them or more, and on "
    "0.05 or less with none.",
    AND: "AND: it fires on 0.2 or less of the tokens with exactly one of the set, and on 0.8 or more with all of it.",
    AND_NOT: "AND-NOT: it fires on 0.8 or more of the tokens with A and without B, and on 0.2 or less with both.",
    WEIGHTED_SUM: "None of the rules OR, AND and AND-NOT holds.",
    NO_INPUTS: "It has no input with a weight that is not zero.",
}
# Inputs of which texts are seen at once; those of the others are folded. Texts of an input, and of a cluster.
_OPEN, _TEXTS, _CLUSTER_TEXTS, _OUTPUTS = 2, 4, 3, 12


def lead(connection: Connection, most: int) -> list[Section]:
    """What stands above the target's own texts."""
    made = [_formula(connection, most)]
    if connection.label:
        made.append(_label(connection))
    return made


def further(connection: Connection, input_panels: Mapping[int, FeaturePanel], most: int) -> list[Section]:
    """What stands below them."""
    made = [_inputs(connection, most)] if connection.formula.terms else []
    if connection.outputs:
        made.append(_output_line(connection))
    if connection.clusters is not None and connection.clusters.clusters:
        made.append(_clusters(connection))
    return made + _input_texts(connection, input_panels, most)


def _formula(connection: Connection, most: int) -> Line:
    formula = connection.formula
    pieces = [(f"{formula.target} =" + (" ReLU(" if formula.relu else ""), 0.0, "")]
    shown = formula.terms[:most]
    for i, term in enumerate(shown):
        sign = ("−" if term.weight < 0 else "+") if i or term.weight < 0 else ""
        text = f"{sign} {short_weight(abs(term.weight))} {term.name}".strip()
        pieces.append((text, term.weight, texts_title(term)))
    if more := formula.nonzeros - len(shown):
        pieces.append((f"+ … ({more} more)", 0.0, ""))
    if formula.bias:
        sign = "−" if formula.bias < 0 else "+" if formula.terms else ""
        pieces.append((f"{sign} {short_weight(abs(formula.bias))}".strip(), 0.0, ""))
    if len(pieces) == 1:
        pieces.append(("0", 0.0, ""))
    if formula.relu:
        pieces.append((")", 0.0, ""))
    note = "Units of the target per unit of the input; the strongest inputs first."
    if connection.g is not None:
        note += " Linearity g = {:.3g}, interval {:.3g} to {:.3g}.".format(*connection.g)
    return Line("Formula", tuple(pieces), note)


def _label(connection: Connection) -> Cells:
    names = {term.row: term.name for term in connection.formula.terms}
    rows = []
    for test in connection.evidence:
        share = test.share if test.enough else None
        rows.append((_condition(test, names), float(test.tokens), float(test.fired), share))
    note = _RULES.get(connection.label, "")
    if not all(test.enough for test in connection.evidence):
        note += " A dash: too few tokens."
    if connection.overlap is not None:
        note += f" P(A | B) = {connection.overlap:.3f}: how often what stops it comes with what fires it."
    if connection.note:
        note += f" Not all could be tested: {connection.note}."
    title = f"Label: {connection.label}"
    return Cells(title, ("Where", "tokens", "it fires on", "share"), tuple(rows), note)


def _condition(test: Test, names: Mapping[int, str]) -> str:
    positive, negative = ([names.get(row, f"row {row}") for row in rows] for rows in (test.positive, test.negative))
    return {
        "none": lambda: "no positive input",
        "exactly": lambda: f"{positive[0]} and no other positive input",
        "together": lambda: f"{' and '.join(positive)}, no other positive input",
        "not": lambda: f"A = {positive[0]}, not B = {negative[0]}",
        "and": lambda: f"A = {positive[0]} and B = {negative[0]}",
        "input": lambda: f"B = {negative[0]}",
    }[test.condition]()


def _inputs(connection: Connection, most: int) -> Cells:
    rows = tuple(
        (
            term.name, term.weight, use.mean, float(use.tokens), use.both / use.tokens if use.tokens else None,
            use.both / connection.fired if connection.fired else None,
        )
        for term, use in zip(connection.formula.terms[:most], connection.uses)
    )  # fmt: skip
    columns = ("Input", "weight", "mean code", "on at tokens", "P(target | input)", "P(input | target)")
    return Cells("Inputs", columns, rows, "On held-out tokens; the mean is over those where the input is on.")


def _output_line(connection: Connection) -> Line:
    pieces = tuple(
        (f"{'−' if weight < 0 else '+'}{short_weight(abs(weight))} {name}", weight, "")
        for name, weight in connection.outputs[:_OUTPUTS]
    )
    more = len(connection.outputs) - len(pieces)
    return Line("Targets", pieces, f"The strongest weights out of it; {more:,} more." if more > 0 else "")


def _names(connection: Connection) -> list[str]:
    names = {term.row: term.name for term in connection.formula.terms}
    return [names.get(int(row), f"row {row}") for row in connection.clusters.inputs]


def _clusters(connection: Connection) -> Cells:
    found = connection.clusters
    names = _names(connection)
    rows = tuple(
        (f"{len(c.tokens):,}, fires on {100 * c.fires:.0f} %", c.words(names), *map(float, c.levels))
        for c in found.clusters
    )
    signed = [f"{'−' if weight < 0 else '+'} {name}" for weight, name in zip(found.weights, names)]
    apart = "one cluster" if found.silhouette is None else f"mean silhouette {found.silhouette:.2f}"
    note = (
        f"{found.sampled:,} tokens of the {found.firing:,} on which it fires and of the {found.stopped:,} on which its "
        f"negative inputs stop it; {apart}. Mean of each input as a share of its level (0.95 quantile there)."
    )
    return Cells("Ways in which its inputs fire it", ("Tokens", "Inputs", *signed), rows, note, shaded=True)


def texts_title(term: Term) -> str:
    """The name of an input's texts, which its term in the formula opens."""
    return f"Texts of {term.name}"


def _input_texts(connection: Connection, input_panels: Mapping[int, FeaturePanel], most: int) -> list[Texts]:
    made = []
    for i, term in enumerate(connection.formula.terms[:most]):
        panel = input_panels.get(term.row)
        if panel is None or not panel.contexts:
            continue
        tops = "  ".join(token for token, _ in panel.top_tokens[:4])
        note = f"weight {term.weight:+.3g}, max {panel.maximum:.3g}; top tokens: {tops}"
        contexts = tuple(passage.context for passage in panel.contexts[:_TEXTS])
        made.append(Texts(texts_title(term), contexts, panel.maximum, note, open=i < _OPEN))
    return made


def cluster_texts(connection: Connection, read: ReadText, fires: sparse.csc_array) -> list[Texts]:
    """Texts of each cluster of tokens, shaded by the target's activation."""
    column = np.zeros(fires.shape[0], np.float32)
    part = slice(fires.indptr[connection.target], fires.indptr[connection.target + 1])
    column[fires.indices[part]] = fires.data[part]
    names, made = _names(connection), []
    for number, cluster in enumerate(connection.clusters.clusters, 1):
        chosen = cluster.tokens[:_CLUSTER_TEXTS]
        words = cluster.words(names) if cluster.fires else f"stopped by its negative inputs, {cluster.words(names)}"
        contexts = read.contexts(column, chosen, ["strongest"] * len(chosen))
        title = f"Way {number}: {words}"
        made.append(Texts(title, contexts, float(column.max(initial=0)), f"{len(cluster.tokens):,} tokens"))
    return made
