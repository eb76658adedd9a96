"""Floor 1: language models as pure functions. Sites, captures, edits, weights, text."""

from sparse_jax.lm.edits import Edit, add, put, replace
from sparse_jax.lm.load import load, random_model, resolve
from sparse_jax.lm.losses import cross_entropy, kl_divergence
from sparse_jax.lm.model import LanguageModel, Output, check_site, forward, site_width
from sparse_jax.lm.sites import SITES, Site
from sparse_jax.lm.tokenizer import load_tokenizer

__all__ = [
    "SITES",
    "Edit",
    "LanguageModel",
    "Output",
    "Site",
    "add",
    "check_site",
    "cross_entropy",
    "forward",
    "kl_divergence",
    "load",
    "load_tokenizer",
    "put",
    "random_model",
    "replace",
    "resolve",
    "site_width",
]
