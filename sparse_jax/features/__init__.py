"""Floor 3: what a feature means. What it fires on, what it does, what causes it; searches, explanations, pages.

collect                 one pass over a text: densities, moments, strongest and sampled places, tokens
top_tokens              tables of the tokens that features fire on
direct_logit_effect     which tokens a direction raises; ablation_effects: what ablating does to predictions
context_needs           which earlier tokens a feature needs; causes: which earlier features it needs
find_rules              the best simple rule for a feature, found and scored without a judge
search_*                features by tokens, by task, by prompts, by direction
explain                 explanations by language models, and their scores
collected_panels, write_pages    all of it as pages; plots and run_view for notebooks
"""

from sparse_jax.features.ablation import AblationEffects, ablation_effects, mean_logit_change
from sparse_jax.features.causes import Causes, Located, causes, contexts_of
from sparse_jax.features.collect import Collected, activation_edges, collect, delimiter_tokens
from sparse_jax.features.collected_panels import collected_panels
from sparse_jax.features.context_ablation import Needs, context_needs, need_contexts
from sparse_jax.features.contexts import (
    Activity,
    feature_activity,
    feature_card,
    sample_across_range,
    sample_uniformly,
    window,
)
from sparse_jax.features.curves import Curve, curve_chart
from sparse_jax.features.index_page import write_pages
from sparse_jax.features.logit_effect import direct_logit_effect, mean_denominator, most_raised_and_lowered
from sparse_jax.features.page import Context, FeatureCard, Report, Table, render, write
from sparse_jax.features.panels import FeaturePanel
from sparse_jax.features.prompt_diff import prompt_diff
from sparse_jax.features.rules import Rules, find_rules
from sparse_jax.features.run_view import Run, compare
from sparse_jax.features.search_direction import similarity
from sparse_jax.features.search_prompts import by_prompt
from sparse_jax.features.search_task import search_task
from sparse_jax.features.search_tokens import regex_target, target_sums, token_target
from sparse_jax.features.svg import histogram, line_chart
from sparse_jax.features.top_tokens import top_tokens

__all__ = [
    "AblationEffects",
    "Activity",
    "Causes",
    "Collected",
    "Context",
    "Curve",
    "FeatureCard",
    "FeaturePanel",
    "Located",
    "Needs",
    "Report",
    "Rules",
    "Run",
    "Table",
    "ablation_effects",
    "activation_edges",
    "by_prompt",
    "causes",
    "collect",
    "collected_panels",
    "compare",
    "context_needs",
    "contexts_of",
    "curve_chart",
    "delimiter_tokens",
    "direct_logit_effect",
    "feature_activity",
    "feature_card",
    "find_rules",
    "histogram",
    "line_chart",
    "mean_denominator",
    "mean_logit_change",
    "most_raised_and_lowered",
    "need_contexts",
    "prompt_diff",
    "regex_target",
    "render",
    "sample_across_range",
    "sample_uniformly",
    "search_task",
    "similarity",
    "target_sums",
    "token_target",
    "top_tokens",
    "window",
    "write",
    "write_pages",
]
