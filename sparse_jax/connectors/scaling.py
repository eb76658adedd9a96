"""Units of a connector's inputs and targets: by what errors and weights are divided in its loss.

    variance      s_j = the standard deviation of target j: each target that varies counts 1 (the default)
    layer-norm    s   = root mean square of the norm of the target codes: one number, a constant prediction of 0 costs 1
    none          s   = 1

    rms           r_i = root mean square of input i over all tokens, also those where it is 0 (the default)
    none          r_i = 1

A target that never varies has s = 1, an input that is always 0 has r = 1: their weights are not trained.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sparse_jax.connectors.paired_codes import Pair, SiteCodes
from sparse_jax.errors import InputError

TargetRule = Literal["variance", "layer-norm", "none"]
InputRule = Literal["rms", "none"]

# Tokens read at once.
_TOKENS = 65_536


@dataclass(frozen=True, eq=False)
class Moments:
    """First moments of each feature over all tokens, float64.

    Attributes:
        mean: `[n]`.
        mean_square: `[n]`.
        firings: `[n]` int64, tokens on which it is not 0.
    """

    mean: np.ndarray
    mean_square: np.ndarray
    firings: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """`[n]`, 0 or more."""
        return np.maximum(self.mean_square - self.mean**2, 0)


@dataclass(frozen=True, eq=False)
class Scales:
    """Units of inputs and targets, float32.

    Attributes:
        input_norm: `[n_in]`, positive.
        target_scale: `[n_out]`, positive.
        target_mean: `[n_out]`, in the targets' own units.
    """

    input_norm: np.ndarray
    target_scale: np.ndarray
    target_mean: np.ndarray


def moments_of(codes: SiteCodes) -> Moments:
    """Mean, mean square and firing count of each feature, in one reading of the codes."""
    sums = np.zeros((3, codes.n_features))
    for start in range(0, len(codes), _TOKENS):
        values, indices = codes.at(slice(start, start + _TOKENS))
        flat, values = indices.reshape(-1), values.reshape(-1).astype(np.float64)
        for row, weights in zip(sums, (values, values**2, values != 0)):
            row += np.bincount(flat, weights, minlength=codes.n_features)
    tokens = max(len(codes), 1)
    return Moments(sums[0] / tokens, sums[1] / tokens, sums[2].astype(np.int64))


def scales_of(pair: Pair, targets: TargetRule = "variance", inputs: InputRule = "rms") -> Scales:
    """The units of a pair's inputs and targets by stated rules.

    Raises:
        InputError: a rule that there is not.
    """
    for name, rule, rules in (("targets", targets, TargetRule), ("inputs", inputs, InputRule)):
        if rule not in get_args(rules):
            raise InputError(f"scaling rule {rule!r} of {name}: give one of {', '.join(get_args(rules))}")
    given, wanted = moments_of(pair.inputs), moments_of(pair.targets)
    norm = np.sqrt(given.mean_square) if inputs == "rms" else np.ones_like(given.mean)
    if targets == "variance":
        # What is left of a constant's variance is rounding.
        scale = np.sqrt(np.where(wanted.variance > 1e-12 * wanted.mean_square, wanted.variance, 0))
    elif targets == "layer-norm":
        scale = np.full_like(wanted.mean, np.sqrt(wanted.mean_square.sum()))
    else:
        scale = np.ones_like(wanted.mean)
    return Scales(_positive(norm), _positive(scale), wanted.mean.astype(np.float32))


def _positive(units: np.ndarray) -> np.ndarray:
    units = units.astype(np.float32)
    return np.where(units > 0, units, np.float32(1))
