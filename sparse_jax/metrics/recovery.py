"""Whether known features are found again: in the codes of rows whose latents are known, and in the dictionary itself.

    matched correlation     mean over latents of |Pearson correlation| with the code that is matched to each; one to
                            one, so that the sum is largest (the MCC of papers on identifiability: Hyvarinen & Morioka
                            2016)
    support scores          precision, recall, F1 and AUC of "the code is active" for "its latent is", matched as above
    MMCS                    mean over features of the largest cosine with any feature of the other dictionary (Sharkey
                            et al. 2022); it is not symmetric: A to B asks whether all of A is in B
    Hungarian mean          mean of |cosine| of features matched one to one: what two copies of one feature cannot fake

Everything is NumPy in float64, on the host. A latent that never varies has no correlation and is left out of the mean;
a code that never varies has correlation 0 with everything, as has a latent that no code is left for.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from sparse_jax.errors import InputError


class Matching(NamedTuple):
    """Pairs of a latent and a code, `[pairs]` indices each; pairs = min(latents, codes)."""

    latents: Int[np.ndarray, " pairs"]
    codes: Int[np.ndarray, " pairs"]


class SupportScores(NamedTuple):
    """Of all entries of matched codes, for whether the entries of their latents are not 0.

    Attributes:
        precision: share of active codes whose latent is active; 0 where no code is.
        recall: share of active latents whose code is active; those without a code count as missed.
        f1: harmonic mean of the two.
        auc: how often an active entry's |code| is larger than a silent one's, ties counting half.
    """

    precision: float
    recall: float
    f1: float
    auc: float


def correlations(z: Float[np.ndarray, "rows n"], codes: Float[np.ndarray, "rows m"]) -> Float[np.ndarray, "n m"]:
    """|Pearson correlation| of every latent with every code; 0 where one of them does not vary.

    Raises:
        InputError: z and codes of different rows, or of fewer than two.
    """
    _check_rows(z, codes)
    z, codes = _standardised(z), _standardised(codes)
    return np.abs(z.T @ codes).astype(np.float64)


def match(z: Float[np.ndarray, "rows n"], codes: Float[np.ndarray, "rows m"]) -> Matching:
    """The one-to-one matching with the largest sum of correlations."""
    return Matching(*linear_sum_assignment(correlations(z, codes), maximize=True))


def matched_correlation(
    z: Float[np.ndarray, "rows n"], codes: Float[np.ndarray, "rows m"], matching: Matching | None = None
) -> float:
    """Mean over latents of |Pearson correlation| with their codes; 1: found up to scale, sign and order.

    Args:
        z, codes: of the same rows.
        matching: by default the best on these rows; give that of other rows to choose nothing on these.

    z = [[1,0],[0,1],[0,0]] with codes [[0,2],[1,0],[0,0]] gives 1; with the first column of these alone 0.5.
    """
    matching = match(z, codes) if matching is None else matching
    _check_rows(z, codes)
    varies = np.ptp(z, axis=0) > 0
    one, other = _standardised(z[:, matching.latents]), _standardised(codes[:, matching.codes])
    found = np.abs(np.einsum("rp,rp->p", one, other, dtype=np.float64))
    return float(found[varies[matching.latents]].sum() / max(varies.sum(), 1))


def support_scores(
    z: Float[np.ndarray, "rows n"],
    codes: Float[np.ndarray, "rows m"],
    matching: Matching | None = None,
    threshold: float = 0.0,
) -> SupportScores:
    """How well active codes tell active latents.

    Args:
        z, codes, matching: as for `matched_correlation`.
        threshold: a code is active where its size exceeds this. It has no part in the AUC.
    """
    matching = match(z, codes) if matching is None else matching
    _check_rows(z, codes)
    true, size = z[:, matching.latents] != 0, np.abs(codes[:, matching.codes])
    active = size > threshold
    hits, claimed, there = int((active & true).sum()), int(active.sum()), int((z != 0).sum())
    precision, recall = hits / max(claimed, 1), hits / max(there, 1)
    f1 = 2 * hits / max(claimed + there, 1)
    return SupportScores(precision, recall, f1, _auc(size[true], size[~true]))


def mean_max_cosine(W: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"]) -> float:
    """Mean over the rows of W of the largest cosine with a row of `other` (MMCS of W in other).

    [[1,0],[0,1]] in [[1,0]] gives 0.5; the other way round 1.
    """
    return float(np.mean(np.max(cosines(W, other), axis=1)))


def hungarian_mean_cosine(W: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"]) -> float:
    """Mean of |cosine| of the rows of W with those of `other`, matched one to one; without a partner: 0."""
    size = np.abs(cosines(W, other))
    return float(size[linear_sum_assignment(size, maximize=True)].sum() / len(W))


def cosines(W: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    """Of every row of W with every row of `other`; a zero row has cosine 0 with all.

    Raises:
        InputError: rows of different widths.
    """
    if np.ndim(W) != 2 or np.ndim(other) != 2 or np.shape(W)[1] != np.shape(other)[1]:
        raise InputError(f"dictionaries of shapes {np.shape(W)} and {np.shape(other)}: give [n, d] and [m, d]")
    return _unit(np.asarray(W, np.float64)) @ _unit(np.asarray(other, np.float64)).T


def _check_rows(z: np.ndarray, codes: np.ndarray) -> None:
    if np.ndim(z) != 2 or np.ndim(codes) != 2 or len(z) != len(codes) or len(z) < 2:
        raise InputError(
            f"latents of shape {np.shape(z)} and codes of shape {np.shape(codes)}: give [rows, n] and [rows, m] of the "
            "same rows, at least two"
        )


def _standardised(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and norm 1; those that do not vary are 0."""
    values = np.asarray(values, np.float64)
    # What rounding leaves of a constant's deviations is not a variation.
    return np.where(np.ptp(values, axis=0) > 0, _unit((values - values.mean(axis=0)).T).T, 0)


def _unit(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Mann and Whitney's U over the number of pairs; 0.5 where there are none."""
    if not len(positive) or not len(negative):
        return 0.5
    # Nearly all silent entries are 0: those are counted, not sorted.
    rest = np.sort(negative[negative > 0])
    zeros = len(negative) - len(rest)
    below, up_to = (np.searchsorted(rest, positive, side) for side in ("left", "right"))
    wins = np.where(positive > 0, zeros + (below + up_to) / 2, zeros / 2)
    return float(wins.mean() / len(negative))
