"""What a target is made of, as one line: `OF 30 = 0.26 IF 2797 + 0.23 IF 259 - 0.15 IF 12`.

    formula = formula_of(W[:, 30], "OF 30", sites=[("resid_pre.3", 2048)], bias=b[30])
    str(formula), formula.terms[0].weight, formula.nonzeros

Weights are in units of the target per unit of the input, as connectors give them.

Source: Riggs et al. 2023, 'Finding sparse linear connections between features in LLMs' (LessWrong).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from sparse_jax.errors import InputError

Sites = Sequence[tuple[str, int]]  # name and number of features of each input site, in the order of the rows of W


class Term(NamedTuple):
    """One input of a target.

    Attributes:
        row: its row of W, which counts through all input sites.
        site: the site it is a feature of.
        feature: its number there.
        weight: of the target per unit of the input.
        name: as written: "IF 2797", of several sites "resid_pre.3 IF 2797".
    """

    row: int
    site: str
    feature: int
    weight: float
    name: str


@dataclass(frozen=True)
class Formula:
    """A target as the sum of its inputs.

    Attributes:
        target: what stands on the left: "OF 30", "hidden 5".
        terms: inputs with a weight that is not zero, the largest |weight| (or |weight| x strength) first.
        bias: what is added; None: there is none.
        relu: whether what is below 0 is cut off.
    """

    target: str
    terms: tuple[Term, ...]
    bias: float | None = None
    relu: bool = False

    @property
    def nonzeros(self) -> int:
        """Inputs with a weight that is not zero."""
        return len(self.terms)

    def text(self, most: int | None = None) -> str:
        """The line; with `most`, so many terms and how many more there are."""
        shown = self.terms[:most]
        parts = [(term.weight < 0, f"{short_weight(abs(term.weight))} {term.name}") for term in shown]
        if more := len(self.terms) - len(shown):
            parts.append((False, f"... ({more} more)"))
        if self.bias:
            parts.append((self.bias < 0, short_weight(abs(self.bias))))
        if not parts:
            parts = [(False, "0")]
        first, *rest = parts
        right = ("-" if first[0] else "") + first[1] + "".join(f" {'-' if neg else '+'} {text}" for neg, text in rest)
        return f"{self.target} = ReLU({right})" if self.relu else f"{self.target} = {right}"

    def __str__(self) -> str:
        return self.text()


def short_weight(weight: float) -> str:
    """Two decimals from 0.1 on, fewer from 10 on; two significant digits below."""
    size = abs(weight)
    if size >= 100:
        return f"{weight:.0f}" if size < 1e6 else f"{weight:.2g}"
    if size >= 0.095:
        return f"{weight:.2f}" if size < 9.95 else f"{weight:.1f}"
    return f"{weight:.2g}"


def formula_of(
    column: np.ndarray,
    target: str,
    sites: Sites,
    *,
    bias: float | None = None,
    relu: bool = False,
    strengths: np.ndarray | None = None,
) -> Formula:
    """The formula of one target.

    Args:
        column: `[n_in]` its column of W.
        target: what stands on the left.
        sites: name and number of features of each input site; with one, inputs are not prefixed by it.
        bias: of the target.
        relu: whether what is below 0 is cut off.
        strengths: `[n_in]` what a weight is multiplied with to order the terms, such as each input's mean code where
            it fires; None: by weight alone.

    Raises:
        InputError: the sites have another number of features than W has rows.
    """
    column = np.asarray(column, np.float64)
    starts = check_sites(sites, len(column))
    if strengths is not None and np.shape(strengths) != column.shape:
        raise InputError(f"strengths {np.shape(strengths)} of {len(column)} inputs: give one each")
    rows = np.flatnonzero(column)
    keys = np.abs(column[rows]) * (1 if strengths is None else np.asarray(strengths, np.float64)[rows])
    rows = rows[np.lexsort((rows, -np.abs(column[rows]), -keys))]
    terms = []
    for row in rows.tolist():
        site = int(np.searchsorted(starts, row, side="right")) - 1
        feature, name = row - int(starts[site]), sites[site][0]
        written = f"IF {feature}" if len(sites) == 1 else f"{name} IF {feature}"
        terms.append(Term(row, name, feature, float(column[row]), written))
    return Formula(target, tuple(terms), None if bias is None else float(bias), relu)


def check_sites(sites: Sites, n_in: int) -> np.ndarray:
    """`[sites]` the first row of each.

    Raises:
        InputError: as `formula_of`.
    """
    sizes = [size for _, size in sites]
    if sum(sizes) != n_in:
        given = ", ".join(f"{name} {size:,}" for name, size in sites) or "none"
        raise InputError(f"input sites ({given}) have {sum(sizes):,} features together, W has {n_in:,} rows")
    return np.cumsum([0, *sizes[:-1]])


class SignCounts(NamedTuple):
    """Weights of each column beyond a threshold, by their sign.

    Attributes:
        positive, negative: `[n]` int64.
        above: the threshold: weights > above, and < -above, are counted.
    """

    positive: np.ndarray
    negative: np.ndarray
    above: float


def sign_counts(W, above: float = 0.1) -> SignCounts:
    """How many inputs raise and how many lower each column of `W [n_in, n]` by more than `above` per unit.

    Of an MLP give `W_enc [n_in, width]` for what goes into each hidden unit, and `W_dec.T [n_out, width]` for what
    comes out of it. Sparse or dense.

    Raises:
        InputError: a negative threshold.
    """
    if above < 0:
        raise InputError(f"above {above}: give 0 or more")
    W = sparse.csc_array(W)
    positive, negative = ((sign * W > above).sum(axis=0) for sign in (1, -1))
    return SignCounts(np.asarray(positive, np.int64).reshape(-1), np.asarray(negative, np.int64).reshape(-1), above)
