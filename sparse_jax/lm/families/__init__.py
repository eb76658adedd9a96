"""The model families, one file each; importing this package registers them all."""

from sparse_jax.lm.families import gpt_neox

__all__ = ["gpt_neox"]
