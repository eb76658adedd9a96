"""Measuring trained dictionaries and their floors on held-out text: the part that experiments share."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Data
from sparse_jax.activations import Block, Statistics
from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm.order import row_indices
from sparse_jax.metrics import (
    EvalBatch,
    Evaluation,
    Measured,
    Reconstructor,
    Setting,
    evaluate,
    evaluate_each,
    ks_between,
)
from sparse_jax.metrics.sparsity import l0, sparsity_sums
from sparse_jax.numerics import safe_norm
from sparse_jax.training import fit_floors, reconstructor

# Rows that are measured at once: their logits and the copies of them that splices need must fit in memory.
ROWS_AT_ONCE = 8
# Rows from which the floors' k is read, and training tokens from which the random dictionary's gain is fitted.
ROWS_FOR_K, TOKENS_FOR_GAIN = 64, 16_384
# At how many k the floors of many dictionaries stand, at most.
FLOOR_KS = 5
# Memory for the codes of dictionaries measured together, and what a code takes: pre-activation, selection, code.
BYTES_AT_ONCE, BYTES_PER_CODE = 1 << 30, 12


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
    block: Block,
    *,
    eval_tokens: int,
    seed: int,
    drop: bool,
) -> tuple[Evaluation, int]:
    """The dictionary and its floors on held-out text, in float32; and the k of the floors.

    k is the dictionary's L0 on the first held-out rows, rounded; `block` is a training block, of which the random
    dictionary's gain is fitted.
    """
    data, trained = data.in_float32(), in_float32(trained)
    numbers = eval_rows(data, eval_tokens)
    outlier_norm = data.outlier_ratio * statistics.median_norm
    k = max(1, round(_l0s(data, [trained], numbers[:ROWS_FOR_K], outlier_norm if drop else np.inf)[0]))
    floors = fit_floors(statistics, _counted(block), k, trained.dictionary.n_features, seed)
    evaluation = evaluate(
        data.lm,
        Setting(data.site, drop),
        _with_bar(eval_batches(data, numbers), len(numbers), "measuring"),
        {"dictionary": reconstructor(trained), **floors},
        mean=statistics.mean,
        outlier_norm=outlier_norm,
    )
    return evaluation, k


def measure_members(
    data: Data,
    members: dict[str, Normalised],
    statistics: Statistics,
    block: Block | None = None,
    *,
    eval_tokens: int,
    seed: int,
    drop: bool,
) -> tuple[Measured, list[dict]]:
    """Many dictionaries of one site on the same held-out text, in float32, in one pass; and their floors' figures.

    Args:
        data: of the site.
        members: by name.
        statistics: of training activations at the site.
        block: a training block of the site, of which the random dictionary's gain is fitted. None: no floors, and
            nothing is measured without the mask.
        eval_tokens: held-out tokens, at most.
        seed: of the random dictionary.
        drop: whether outliers are masked.

    Returns:
        The members' figures, and a list of {"floor", "k", figures}. Floors stand at no more than FLOOR_KS values of k,
        from the smallest to the largest L0 of the members whose parameters are finite.

    Raises:
        InputError: floors are wanted and no member has finite parameters.
    """
    data, members = data.in_float32(), {name: in_float32(trained) for name, trained in members.items()}
    numbers = eval_rows(data, eval_tokens)
    outlier_norm = data.outlier_ratio * statistics.median_norm
    widest = max(trained.dictionary.n_features for trained in members.values())
    floors: dict[tuple[str, int], Reconstructor] = {}
    if block is not None:
        # A code that is not a number counts as active: a member that diverged would claim every feature for its L0.
        sound = [trained for trained in members.values() if _has_finite_parameters(trained)]
        if not sound:
            raise InputError(
                f"all {len(members)} dictionaries of {data.site} have diverged: their parameters are not finite; lower "
                "the learning rate or the coefficients"
            )
        l0s = _l0s(data, sound, numbers[:ROWS_FOR_K], outlier_norm if drop else np.inf)
        for k in ks_between(l0s, FLOOR_KS):
            fitted = fit_floors(statistics, _counted(block), k, widest, seed)
            token_mean = fitted.pop("token_mean")
            floors |= {(name, k): floor for name, floor in fitted.items()}
        floors["token_mean", 1] = token_mean  # it has no k: one code a token
    measured = evaluate_each(
        data.lm,
        Setting(data.site, drop),
        _with_bar(eval_batches(data, numbers), len(numbers), f"measuring {data.site}", stays=block is not None),
        {**{name: reconstructor(trained) for name, trained in members.items()}, **floors},
        mean=statistics.mean,
        outlier_norm=outlier_norm,
        unmasked=tuple(members) if floors else (),
        at_once=max(1, BYTES_AT_ONCE // (BYTES_PER_CODE * widest * ROWS_AT_ONCE * data.evaluation.context)),
    )
    return measured, [{"floor": name, "k": k, **measured.figures[name, k]} for name, k in floors]


def _with_bar(batches: Iterator[EvalBatch], rows: int, words: str, stays: bool = True) -> Iterator[EvalBatch]:
    from tqdm import tqdm

    total = -(-rows // ROWS_AT_ONCE)
    return tqdm(batches, total=total, desc=words, unit="batch", mininterval=0.5, leave=stays)


def _has_finite_parameters(trained: Normalised) -> bool:
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(trained.params))


def _counted(block: Block) -> jax.Array:
    """Activations of the block that count, not more than the random dictionary's gain needs."""
    return jnp.array(np.asarray(block.x)[np.asarray(block.weight) > 0][:TOKENS_FOR_GAIN])


def _l0s(data: Data, several: list[Normalised], numbers: np.ndarray, max_norm: float) -> list[float]:
    from sparse_jax.activations import activations

    tokens, _, mask, _ = data.evaluation[numbers[: max(1, len(numbers) // 8 * 8)]]
    x = activations(data.lm, jnp.array(tokens), data.site)
    counted = (jnp.array(mask) & (safe_norm(x) <= max_norm)).astype(jnp.float32).reshape(-1)
    encode, found = jax.jit(Normalised.encode), []
    for trained in several:
        codes = encode(trained, x.reshape(-1, x.shape[-1]))
        found.append(l0(sparsity_sums(codes, counted, jnp.ones(codes.shape[1]))))
    return found
