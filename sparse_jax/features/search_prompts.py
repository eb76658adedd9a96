"""Search by two sets of prompts: which features differ between them?

A prompt gives each feature two numbers: its mean activation over the places that count, and the share of them at which
it fires. Sets are compared over prompts, which are taken as independent: difference of means, Cohen's d (the difference
over the pooled standard deviation), Welch's t and its p-value, and the p-value of a permutation test of max |t| over
all features, which holds for the whole table at once (family-wise): with thousands of features some have small p-values
of their own by chance. Source: Welch 1947; Westfall & Young 1993 (max-T).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy.special import stdtr

from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.counted_codes import BATCH_ROWS, counted_codes
from sparse_jax.features.prompts import Prompts, prompt_batches
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.sites import Site

# A standard deviation below this share of the largest value is what rounding leaves of a constant.
_CONSTANT = 1e-6
# Permutations that are handled together.
_PERMUTATIONS_AT_ONCE = 16


class ByPrompt(NamedTuple):
    """Of each prompt and feature: mean activation over the places that count, and share of them where it fires."""

    activation: Float32[np.ndarray, "prompts features"]
    firing: Float32[np.ndarray, "prompts features"]


class Difference(NamedTuple):
    """Set A less set B, of each feature.

    Attributes:
        mean_a, mean_b: mean over the prompts of each set.
        effect: Cohen's d; infinite where both sets are constant and differ, 0 where they do not differ.
        t: Welch's t.
        p: of Welch's t, two-sided, for this feature alone.
        p_family: of the permutation test of max |t|, for all features together; nan without permutations.
    """

    mean_a: Float64[np.ndarray, " features"]
    mean_b: Float64[np.ndarray, " features"]
    effect: Float64[np.ndarray, " features"]
    t: Float64[np.ndarray, " features"]
    p: Float64[np.ndarray, " features"]
    p_family: Float64[np.ndarray, " features"]

    @property
    def order(self) -> Int64[np.ndarray, " features"]:
        """Features by |effect|, largest first; of equal effects (infinite ones) the larger difference first."""
        return np.lexsort((-np.abs(self.mean_a - self.mean_b), -np.abs(self.effect)))


@partial(jax.jit, static_argnames=("site",))
def _per_prompt(lm, coder, tokens, mask, max_norm, site):
    codes, counted = counted_codes(lm, coder, tokens, mask, max_norm, site)
    places = jnp.maximum(jnp.sum(counted, axis=1, dtype=jnp.int32), 1).astype(jnp.float32)[:, None]
    return jnp.sum(codes, axis=1) / places, jnp.sum((codes > 0).astype(jnp.float32), axis=1) / places


def by_prompt(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    prompts: Prompts,
    *,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> ByPrompt:
    """What each feature does on each prompt; takes 8 bytes x prompts x features of memory."""
    made = []
    for numbers, batch in prompt_batches(prompts, batch_rows):
        found = _per_prompt(lm, coder, jnp.array(batch.tokens), jnp.array(batch.mask), jnp.float32(max_norm), site)
        made.append([np.asarray(value)[numbers >= 0] for value in found])
    return ByPrompt(*(np.concatenate(parts) for parts in zip(*made)))


def compare(
    a: Float32[np.ndarray, "prompts_a features"],
    b: Float32[np.ndarray, "prompts_b features"],
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> Difference:
    """Set A against set B, feature by feature.

    Args:
        a, b: a number for each prompt and feature.
        permutations: how often prompts are dealt to the sets at random; 0: no permutation test.
        seed: decides the deals.

    Raises:
        InputError: a set has fewer than two prompts: there is no variance to compare with.
    """
    if min(len(a), len(b)) < 2:
        raise InputError(f"sets of {len(a)} and {len(b)} prompts: give at least two in each")
    values = np.concatenate([a, b]).astype(np.float64)
    shift, scale = values.mean(axis=0), np.abs(values).max(axis=0)
    values = np.where(scale > 0, (values - shift) / np.where(scale > 0, scale, 1), 0)
    squares, n_a, n_b = values**2, len(a), len(b)
    in_a = (np.arange(n_a + n_b) < n_a).astype(np.float64)[None]
    (t,), (difference,), (pooled,), (freedom,) = _welch(in_a, values, squares, n_a, n_b)
    largest = np.full(0, np.nan)
    generator = np.random.default_rng(seed)
    for start in range(0, permutations, _PERMUTATIONS_AT_ONCE):
        count = min(_PERMUTATIONS_AT_ONCE, permutations - start)
        deals = np.stack([generator.permutation(in_a[0]) for _ in range(count)])
        largest = np.append(largest, np.abs(_welch(deals, values, squares, n_a, n_b)[0]).max(axis=1))
    exceeding = len(largest) - np.searchsorted(np.sort(largest), np.abs(t) * (1 - 1e-9))
    return Difference(
        mean_a=np.asarray(a, np.float64).mean(axis=0),
        mean_b=np.asarray(b, np.float64).mean(axis=0),
        effect=_standardised(difference, pooled),
        t=t,
        p=2 * stdtr(freedom, -np.abs(t)),
        p_family=(1 + exceeding) / (1 + permutations) if permutations else np.full(len(t), np.nan),
    )


def _welch(in_a, values, squares, n_a, n_b):
    """(t, difference of means, pooled standard deviation, degrees of freedom), each `[deals, features]`.

    in_a: `[deals, prompts]` 1 for the prompts that are dealt to set A.
    """
    mean_a, mean_b = in_a @ values / n_a, (1 - in_a) @ values / n_b
    var_a = np.maximum(in_a @ squares / n_a - mean_a**2, 0) * n_a / (n_a - 1)
    var_b = np.maximum((1 - in_a) @ squares / n_b - mean_b**2, 0) * n_b / (n_b - 1)
    u, v = var_a / n_a, var_b / n_b
    spread = np.maximum(u**2 / (n_a - 1) + v**2 / (n_b - 1), 1e-60)
    pooled = np.sqrt(((n_a - 1) * var_a + (n_b - 1) * var_b) / (n_a + n_b - 2))
    difference = mean_a - mean_b
    t = np.where(pooled > _CONSTANT, difference / np.sqrt(np.maximum(u + v, 1e-30)), _standardised(difference, pooled))
    return t, difference, pooled, np.maximum((u + v) ** 2 / spread, 1)


def _standardised(difference, deviation):
    """difference / deviation; where nothing deviates, 0 or infinite."""
    constant = np.where(np.abs(difference) > _CONSTANT, np.copysign(np.inf, difference), 0)
    return np.where(deviation > _CONSTANT, difference / np.maximum(deviation, _CONSTANT), constant)
