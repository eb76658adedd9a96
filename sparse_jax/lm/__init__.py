"""Floor 1: language models as pure functions. Sites, captures, edits, weights, text."""

from sparse_jax.lm.edits import Edit, Where, at
from sparse_jax.lm.generate import Generated, generate
from sparse_jax.lm.interventions import (
    add,
    fill,
    put,
    reconstruct,
    reconstruct_with_error,
    remove_direction,
    resample,
    scale,
    scale_features,
    set_features,
    zero,
)
from sparse_jax.lm.load import load, random_model, resolve
from sparse_jax.lm.losses import cross_entropy, kl_divergence
from sparse_jax.lm.model import LanguageModel, Output, check_site, forward, site_shape, site_width
from sparse_jax.lm.sites import SITES, Site
from sparse_jax.lm.tokenizer import load_tokenizer

__all__ = [
    "SITES",
    "Edit",
    "Generated",
    "LanguageModel",
    "Output",
    "Site",
    "Where",
    "add",
    "at",
    "check_site",
    "cross_entropy",
    "fill",
    "forward",
    "generate",
    "kl_divergence",
    "load",
    "load_tokenizer",
    "put",
    "random_model",
    "reconstruct",
    "reconstruct_with_error",
    "remove_direction",
    "resample",
    "resolve",
    "scale",
    "scale_features",
    "set_features",
    "site_shape",
    "site_width",
    "zero",
]
