"""Measuring a trained dictionary and its floors on held-out text: the part that experiments share."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Data
from sparse_jax.activations import RememberedBlocks, Statistics
from sparse_jax.dictionaries import Normalised
from sparse_jax.lm.order import row_indices
from sparse_jax.metrics import EvalBatch, Evaluation, Setting, evaluate
from sparse_jax.metrics.sparsity import l0, sparsity_sums
from sparse_jax.numerics import safe_norm
from sparse_jax.training import fit_floors, reconstructor

# Rows that are measured at once: their logits and the copies of them that splices need must fit in memory.
ROWS_AT_ONCE = 8
# Rows from which the floors' k is read, and training tokens from which the random dictionary's gain is fitted.
ROWS_FOR_K, TOKENS_FOR_GAIN = 64, 16_384


def eval_rows(data: Data, eval_tokens: int) -> np.ndarray:
    """Which held-out rows are measured, in which order: the same for every run on this text."""
    count = min(len(data.evaluation), max(1, eval_tokens // data.evaluation.context))
    return row_indices(len(data.evaluation), 0, 0, count)


def eval_batches(data: Data, numbers: np.ndarray) -> Iterator[EvalBatch]:
    """The rows in batches of one shape; the last is filled up with empty rows."""
    padded = np.concatenate([numbers, np.full(-len(numbers) % ROWS_AT_ONCE, -1, np.int64)])
    for start in range(0, len(padded), ROWS_AT_ONCE):
        tokens, targets, mask, _ = data.evaluation[padded[start : start + ROWS_AT_ONCE]]
        yield EvalBatch(jnp.array(tokens), jnp.array(targets), jnp.array(mask))


def in_float32(trained: Normalised) -> Normalised:
    """The same dictionary computing in float32: final figures do not depend on the training dtype."""
    return dataclasses.replace(trained, dictionary=dataclasses.replace(trained.dictionary, compute_dtype="float32"))


def measure(
    data: Data,
    trained: Normalised,
    statistics: Statistics,
    blocks: RememberedBlocks,
    *,
    eval_tokens: int,
    seed: int,
    drop: bool,
) -> tuple[Evaluation, int]:
    """The dictionary and its floors on held-out text, in float32; and the k of the floors.

    k is the dictionary's L0 on the first held-out rows, rounded.
    """
    from tqdm import tqdm

    data, trained = data.in_float32(), in_float32(trained)
    numbers = eval_rows(data, eval_tokens)
    outlier_norm = data.outlier_ratio * statistics.median_norm
    k = max(1, round(_l0(data, trained, numbers[:ROWS_FOR_K], outlier_norm if drop else np.inf)))
    first = blocks[0]
    counted = np.asarray(first.x)[np.asarray(first.weight) > 0][:TOKENS_FOR_GAIN]
    floors = fit_floors(statistics, jnp.array(counted), k, trained.dictionary.n_features, seed)
    batches = eval_batches(data, numbers)
    evaluation = evaluate(
        data.lm,
        Setting(data.site, drop),
        tqdm(batches, total=-(-len(numbers) // ROWS_AT_ONCE), desc="measuring", unit="batch", mininterval=0.5),
        {"dictionary": reconstructor(trained), **floors},
        mean=statistics.mean,
        outlier_norm=outlier_norm,
    )
    return evaluation, k


def _l0(data: Data, trained: Normalised, numbers: np.ndarray, max_norm: float) -> float:
    from sparse_jax.activations import activations

    tokens, _, mask, _ = data.evaluation[numbers[: max(1, len(numbers) // 8 * 8)]]
    x = activations(data.lm, jnp.array(tokens), data.site)
    codes = jax.jit(Normalised.encode)(trained, x.reshape(-1, x.shape[-1]))
    counted = jnp.array(mask) & (safe_norm(x) <= max_norm)
    return l0(sparsity_sums(codes, counted.astype(jnp.float32).reshape(-1), jnp.ones(codes.shape[1])))
