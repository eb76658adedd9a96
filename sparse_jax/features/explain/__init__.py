"""Explanations of features by language models over the OpenAI protocol, and how well they predict.

Explain from strong texts, simulate on others, score by correlation (Bills et al. 2023; the numbers of Cunningham et
al. 2023); the cheaper detection and fuzzing (Paulo et al. 2024); baselines; a cache that nothing is paid for twice.
"""

from sparse_jax.features.explain.cache import Cache
from sparse_jax.features.explain.cases import Case, draw_features, make_cases
from sparse_jax.features.explain.client import Client, Endpoint
from sparse_jax.features.explain.cost import Estimate, Prices
from sparse_jax.features.explain.examples import Example
from sparse_jax.features.explain.fragments import Fragments, Reading, activity, cut
from sparse_jax.features.explain.requests import Reply, Request
from sparse_jax.features.explain.selection import Protocol, Selection, select
from sparse_jax.features.explain.summary import summarise

__all__ = [
    "Cache",
    "Case",
    "Client",
    "Endpoint",
    "Estimate",
    "Example",
    "Fragments",
    "Prices",
    "Protocol",
    "Reading",
    "Reply",
    "Request",
    "Selection",
    "activity",
    "cut",
    "draw_features",
    "make_cases",
    "select",
    "summarise",
]
