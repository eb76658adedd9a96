"""Connectors that experiments on connections fit alike: the dense linear one, and MLPs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from sparse_jax.connectors.block_errors import block_errors
from sparse_jax.connectors.connector import Connector, Trained
from sparse_jax.connectors.fit import FitOptions, Member, fit
from sparse_jax.connectors.linear_path import LinearMaps
from sparse_jax.connectors.linear_refit import dense_linear
from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.mlp_on_linear import MLPOnLinear
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.connectors.standardised import Standardised
from sparse_jax.errors import InputError

# Adam's rate for MLPs beside a linear map: on validation documents of one layer of the embedded model an R^2 of 0.419,
# with 3e-4 0.392, with 3e-3 0.411 (500,000 tokens; the linear map has 0.381).
ON_LINEAR_RATE = 1e-3
# What --mlp may say.
MLPS: dict[str, type[MLP]] = {"on-linear": MLPOnLinear, "plain": MLP}


@dataclass(frozen=True)
class Dense:
    """Least squares on all inputs.

    Attributes:
        maps: one connector.
        trained: the same.
        ridge: the one that was chosen.
        tried: ridge -> mean R^2 of alive targets on the validation documents.
    """

    maps: LinearMaps
    trained: Trained
    ridge: float
    tried: dict[float, float]


def check_ridges(ridges: tuple[float, ...]) -> None:
    """Raises InputError unless there are some, none below 0."""
    if not ridges or min(ridges) < 0:
        raise InputError(f"--ridges {' '.join(map(str, ridges))}: give at least one, none below 0")


def dense_fit(problem: Standardised, validation: Pair, ridges: tuple[float, ...]) -> Dense:
    """The ridge with the largest mean R^2 of alive targets on the validation documents."""
    found = {}
    for ridge in ridges:
        maps = dense_linear(problem, ridge)
        trained = maps.trained(0, problem)
        found[ridge] = mean_r2(validation, trained), maps, trained
    best = max(found, key=lambda ridge: found[ridge][0])
    return Dense(*found[best][1:], best, {ridge: each[0] for ridge, each in found.items()})


def mean_r2(pair: Pair, trained: Trained) -> float:
    """Mean R^2 of a connector over the targets that are alive on a pair."""
    errors = block_errors(pair, [trained], blocks=1)
    alive = errors.alive()
    return float(errors.r2()[0, alive].mean()) if alive.any() else float("-inf")


def gradient_fit(
    connector: Connector, pair: Pair, tokens: int, batch: int, seeds: tuple[int, ...],
    log: Callable[[dict], None], members: dict[str, float] | None = None, linear: Sequence[Trained] = (),
) -> list[Trained]:  # fmt: skip
    """A connector of each seed, which decides starting weights and the order of tokens.

    Args:
        connector, pair: what is trained, and on what.
        tokens: seen in training, repeats included; 0: each of the pair's once.
        batch: tokens in a step; fewer where the pair has fewer.
        seeds: of the connectors.
        log: gets a row now and then.
        members: coefficients in place of the connector's own.
        linear: for `MLPOnLinear`, the linear connector that each seed's stands on: one for all seeds, or one for each.
    """
    made = []
    for i, seed in enumerate(seeds):
        options = FitOptions(tokens=tokens, batch=min(batch, len(pair)), order_seed=seed)
        start = None
        if isinstance(connector, MLPOnLinear):
            start = [connector.start(linear[i % len(linear)], jax.random.key(seed))]
        member = Member(members or {}, seed=seed, learning_rate=None if start is None else ON_LINEAR_RATE)
        fitted = fit(connector, pair, options, [member], start=start, log=log, progress=True)
        made.append(fitted.trained[0])
    return made


def scales_of_targets(problem: Standardised) -> np.ndarray:
    """`[n2]` float32 standard deviations of the targets; 1 where one never varies."""
    return np.where(problem.scales > 0, problem.scales, 1).astype(np.float32)
