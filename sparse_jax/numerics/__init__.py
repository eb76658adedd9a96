"""Floor 0: arithmetic that every other floor stands on."""

from sparse_jax.numerics.matmul import dot_general, matmul
from sparse_jax.numerics.norms import safe_norm, unit_rows
from sparse_jax.numerics.topk import keep_top_k

__all__ = ["dot_general", "keep_top_k", "matmul", "safe_norm", "unit_rows"]
