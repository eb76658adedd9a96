"""What is known of a target and its inputs, gathered: what a page of it shows.

made = connections(W, code_columns(pair.inputs), code_columns(pair.targets), [("resid_pre.3", 2048)], labels=labels)
str(made[30].formula), made[30].label, made[30].uses[0].both
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from sparse_jax.connectors.clusters import UnitClusters
from sparse_jax.connectors.formula import Formula, Sites, formula_of
from sparse_jax.connectors.labels import Labels, Test
from sparse_jax.errors import InputError


class InputUse(NamedTuple):
    """How an input of a target goes with it, on held-out tokens.

    Attributes:
        mean: its mean code where it is on.
        tokens: on which it is on.
        both: of those, on which the target fires.
    """

    mean: float
    tokens: int
    both: int


@dataclass(frozen=True)
class Connection:
    """What is known of a target and its inputs. What was not measured is None or empty.

    Attributes:
        target: its number.
        formula: its inputs and weights.
        uses: of each term of the formula, in its order.
        fired: tokens on which the target fires.
        label: of `labels.label_targets`; "" where it was not labelled.
        note: which rules could not be tested.
        evidence: the counts behind the label.
        overlap: P(A | B) of an AND-NOT.
        r2: of the connector on held-out tokens.
        g: its linearity, (MSE_linear - MSE_mlp) / variance, and the ends of its interval.
        linearity: its class: "linear", "nonlinear", "unexplained", ...
        outputs: of a hidden unit: targets and the weights to them, the largest |weight| first.
        clusters: of the tokens that fire a hidden unit, or that it is stopped on.
    """

    target: int
    formula: Formula
    uses: tuple[InputUse, ...]
    fired: int
    label: str = ""
    note: str = ""
    evidence: tuple[Test, ...] = ()
    overlap: float | None = None
    r2: float | None = None
    g: tuple[float, float, float] | None = None
    linearity: str = ""
    outputs: tuple[tuple[str, float], ...] = ()
    clusters: UnitClusters | None = None


def connections(
    W,
    inputs: sparse.csc_array,
    fires: sparse.csc_array,
    sites: Sites,
    *,
    targets: Iterable[int] | None = None,
    target: str = "OF",
    labels: Labels | None = None,
    bias: np.ndarray | None = None,
    relu: bool = False,
    r2: np.ndarray | None = None,
    g: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    classes: Sequence[str] | None = None,
    outputs: np.ndarray | None = None,
    clusters: Mapping[int, UnitClusters] | None = None,
) -> list[Connection]:
    """Gather what was measured of each target.

    Args:
        W: `[n_in, n]` weights, target units per input unit, dense or scipy sparse.
        inputs, fires: held-out codes by feature, of inputs `[tokens, n_in]` and of targets `[tokens, n]`.
        sites: name and size of each input site, in the order of the rows of W.
        targets: which; all by default.
        target: what a target is called before its number.
        labels: of all n targets.
        bias: `[n]`.
        relu: whether targets are ReLU of the sum.
        r2, classes: `[n]` each.
        g: `[n]` linearity, and the ends of its interval.
        outputs: `[n, n_out]` weights out of hidden units.
        clusters: by number.

    Raises:
        InputError: sizes that do not fit.
    """
    W = sparse.csc_array(W)
    n = W.shape[1]
    if W.shape[0] != inputs.shape[1] or n != fires.shape[1] or inputs.shape[0] != fires.shape[0]:
        raise InputError(f"W {W.shape}, inputs {inputs.shape}, targets {fires.shape}: they do not fit each other")
    given = {"labels": labels and labels.label, "bias": bias, "r2": r2, "classes": classes, "outputs": outputs}
    given |= {f"g[{i}]": each for i, each in enumerate(g or ())}
    if wrong := [name for name, each in given.items() if each is not None and len(each) != n]:
        raise InputError(f"{', '.join(wrong)} of another number of targets than the {n} of W: give one of each")
    counts = np.diff(inputs.indptr)
    means = np.asarray(inputs.sum(axis=0)) / np.maximum(counts, 1)
    made, on = [], np.zeros(inputs.shape[0], bool)
    for j in range(n) if targets is None else targets:
        where = fires.indices[fires.indptr[j] : fires.indptr[j + 1]]
        on[where] = True
        formula = formula_of(
            W[:, [j]].toarray()[:, 0], f"{target} {j}", sites, bias=None if bias is None else float(bias[j]), relu=relu,
            strengths=means,
        )  # fmt: skip
        uses = tuple(
            InputUse(float(means[row]), int(counts[row]), int(on[_where(inputs, row)].sum()))
            for row in (term.row for term in formula.terms)
        )
        on[where] = False
        connection = Connection(int(j), formula, uses, len(where))
        if labels is not None:
            connection = dataclasses.replace(
                connection, label=str(labels.label[j]), note=labels.note(j), evidence=labels.evidence(j),
                overlap=labels.overlap(j),
            )  # fmt: skip
        made.append(
            dataclasses.replace(
                connection,
                r2=_or_none(r2, j),
                g=None if g is None else tuple(float(each[j]) for each in g),
                linearity="" if classes is None else str(classes[j]),
                outputs=() if outputs is None else _outputs(np.asarray(outputs[j])),
                clusters=(clusters or {}).get(j),
            )
        )
    return made


def _where(columns: sparse.csc_array, feature: int) -> np.ndarray:
    return columns.indices[columns.indptr[feature] : columns.indptr[feature + 1]]


def _or_none(values, j) -> float | None:
    return None if values is None or not np.isfinite(values[j]) else float(values[j])


def _outputs(weights: np.ndarray) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-np.abs(weights), kind="stable")
    return tuple((f"OF {i}", float(weights[i])) for i in order if weights[i])
