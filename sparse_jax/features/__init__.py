"""Floor 3: what a feature means. The texts it fires on, and pages that show them."""

from sparse_jax.features.contexts import (
    Activity,
    feature_activity,
    feature_card,
    sample_across_range,
    sample_uniformly,
    window,
)
from sparse_jax.features.curves import Curve, curve_chart
from sparse_jax.features.page import Context, FeatureCard, Report, Table, render, write
from sparse_jax.features.svg import histogram, line_chart

__all__ = [
    "Activity",
    "Context",
    "Curve",
    "FeatureCard",
    "Report",
    "Table",
    "curve_chart",
    "feature_activity",
    "feature_card",
    "histogram",
    "line_chart",
    "render",
    "sample_across_range",
    "sample_uniformly",
    "window",
    "write",
]
