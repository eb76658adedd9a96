"""Floor 2: activations of a language model in seeded blocks, their statistics, the normaliser."""

from sparse_jax.activations.blocks import Block, Blocks, activations
from sparse_jax.activations.normalise import Normaliser, fit_normaliser
from sparse_jax.activations.statistics import Statistics, collect_statistics

__all__ = ["Block", "Blocks", "Normaliser", "Statistics", "activations", "collect_statistics", "fit_normaliser"]
