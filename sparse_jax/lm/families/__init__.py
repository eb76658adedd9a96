"""The model families, one file each; importing this package registers them all."""

from sparse_jax.lm.families import gpt2, gpt_neox, llama

__all__ = ["gpt2", "gpt_neox", "llama"]
