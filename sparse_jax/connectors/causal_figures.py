"""How far measured changes follow predicted ones: correlation, slope, sign, size, with intervals over documents."""

from typing import NamedTuple

import numpy as np

from sparse_jax.connectors.causal import CausalCheck
from sparse_jax.connectors.document_blocks import Interval
from sparse_jax.connectors.document_bootstrap import bootstrap, document_sums


class Agreement(NamedTuple):
    """How measured changes follow predicted ones.

    Attributes:
        connections, documents: how many.
        correlation: Pearson's.
        slope: of measured on predicted, least squares with an intercept.
        same_sign: share with one sign.
        size: root mean square of measured over that of predicted.
    """

    connections: int
    documents: int
    correlation: Interval
    slope: Interval
    same_sign: Interval
    size: Interval


def causal_figures(
    check: CausalCheck, *, resamples: int = 1000, seed: int = 0
) -> dict[tuple[str, str], tuple[Agreement | None, Agreement | None]]:
    """(norm, places) -> agreement of the connections and of their controls, over documents.

    norm: "live" or "frozen"; places: "all", or "active", those where the target is active. Changes are divided by the
    target's scale, so that targets with large codes do not decide alone. None where there is nothing to compare.
    """
    found = {}
    for norm in ("live", "frozen"):
        measured = getattr(check, norm) / check.target_scale
        control = getattr(check, f"control_{norm}") / check.control_scale
        predicted = check.predicted / check.target_scale
        for places, where in (("all", np.ones(len(predicted), bool)), ("active", check.target_active)):
            found[norm, places] = tuple(
                agreement(predicted[at], values[at], check.document[at], resamples=resamples, seed=seed)
                for values, at in ((measured, where), (control, where & (check.control >= 0)))
            )
    return found


def agreement(
    predicted: np.ndarray, measured: np.ndarray, document: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> Agreement | None:
    """How `measured [n]` follows `predicted [n]`, with intervals over documents; None for n = 0."""
    if not len(predicted):
        return None
    p, m = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    sums = document_sums(document, np.stack([np.ones_like(p), p, m, p * p, m * m, p * m, (p * m > 0)], axis=1))

    def covariance(s, a, b, ab):
        return s[..., ab] / s[..., 0] - s[..., a] * s[..., b] / s[..., 0] ** 2

    def correlation(s):
        spread = np.maximum(covariance(s, 1, 1, 3), 0) * np.maximum(covariance(s, 2, 2, 4), 0)
        return covariance(s, 1, 2, 5) / np.sqrt(spread)

    made = (
        correlation,
        lambda s: covariance(s, 1, 2, 5) / covariance(s, 1, 1, 3),
        lambda s: s[..., 6] / s[..., 0],
        lambda s: np.sqrt(s[..., 4] / s[..., 3]),
    )
    return Agreement(len(p), len(sums), *(bootstrap(f, sums, resamples=resamples, seed=seed) for f in made))
