"""Floor 2: streaming, mergeable measures; they take encode and decode as functions."""

from sparse_jax.metrics.evaluate import EvalBatch, Evaluation, Measured, Reconstructor, Setting, evaluate, evaluate_each
from sparse_jax.metrics.fronts import fronts, ks_between, spread
from sparse_jax.metrics.reconstruction import explained_variance, fvu, reconstruction_sums, shrinkage
from sparse_jax.metrics.recovery import (
    Matching,
    SupportScores,
    hungarian_mean_cosine,
    match,
    matched_correlation,
    mean_max_cosine,
    support_scores,
)
from sparse_jax.metrics.sparsity import density, density_shares, l0, l1, sparsity_sums
from sparse_jax.metrics.splice import ce_recovered, clean_predictions, resume_with, splice_sums

__all__ = [
    "EvalBatch",
    "Evaluation",
    "Matching",
    "Measured",
    "Reconstructor",
    "Setting",
    "SupportScores",
    "ce_recovered",
    "clean_predictions",
    "density",
    "density_shares",
    "evaluate",
    "evaluate_each",
    "explained_variance",
    "fronts",
    "fvu",
    "hungarian_mean_cosine",
    "ks_between",
    "l0",
    "l1",
    "match",
    "matched_correlation",
    "mean_max_cosine",
    "reconstruction_sums",
    "resume_with",
    "shrinkage",
    "sparsity_sums",
    "splice_sums",
    "spread",
    "support_scores",
]
