"""Weights on a support that was found, without the shrinkage of the penalty that found it.

least_squares_on_support    linear connectors: the least squares of each target on its own inputs, from moments
refit                       any connector: gradients, weights that are 0 stay 0
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.fit import FitOptions, Fitted, Member, fit
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.connectors.scaling import Scales
from sparse_jax.errors import InputError

# Added to the diagonal, as a share of it: inputs that always fire together leave a singular matrix.
_RIDGE = 1e-9


def least_squares_on_support(
    support: np.ndarray,
    inputs_inputs: np.ndarray,
    inputs_targets: np.ndarray,
    *,
    input_sum: np.ndarray | None = None,
    target_sum: np.ndarray | None = None,
    tokens: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(weights `[n_in, n_out]`, bias `[n_out]`), float64, of the least squares of each target on its support.

    Args:
        support: `[n_in, n_out]` bool, which weights may differ from 0.
        inputs_inputs: `[n_in, n_in]` F1'F1, summed over tokens.
        inputs_targets: `[n_in, n_out]` F1'F2.
        input_sum, target_sum, tokens: sums of F1 and F2 and their number of tokens: with a bias. None: without.

    Raises:
        InputError: shapes that do not fit, or only some of the sums.
    """
    n_in, n_out = support.shape
    if inputs_inputs.shape != (n_in, n_in) or inputs_targets.shape != (n_in, n_out):
        raise InputError(
            f"moments {inputs_inputs.shape} and {inputs_targets.shape} of a support {support.shape}: give "
            f"{(n_in, n_in)} and {(n_in, n_out)}"
        )
    sums = (input_sum, target_sum, tokens)
    if any(each is None for each in sums) and any(each is not None for each in sums):
        raise InputError("a bias needs input_sum, target_sum and tokens: give all three or none")
    gram, cross = (np.asarray(a, np.float64) for a in (inputs_inputs, inputs_targets))
    if tokens is not None:
        gram = gram - np.outer(input_sum, input_sum) / tokens
        cross = cross - np.outer(input_sum, target_sum) / tokens
    weights = np.zeros((n_in, n_out))
    for target in range(n_out):
        (at,) = np.nonzero(support[:, target])
        if not len(at):
            continue
        block = gram[np.ix_(at, at)]
        # Inputs in units of their own spread: the ridge is then one share of each.
        unit = np.sqrt(np.where(np.diag(block) > 0, np.diag(block), 1))
        block = block / np.outer(unit, unit) + _RIDGE * np.eye(len(at))
        weights[at, target] = np.linalg.solve(block, cross[at, target] / unit) / unit
    bias = np.zeros(n_out) if tokens is None else (target_sum - input_sum @ weights) / tokens
    return weights, bias


def with_weights(trained: Trained, weights: np.ndarray, bias: np.ndarray) -> Trained:
    """A linear connector with other weights (and bias, where it has one).

    Raises:
        InputError: the connector has a hidden layer.
    """
    trained.weights()  # raises
    params = {**trained.params, "W_dec": jnp.array(weights, jnp.float32)}
    if trained.connector.with_bias:
        params["b_dec"] = jnp.array(bias, jnp.float32)
    return Trained(trained.connector, params)


def refit(
    trained: Sequence[Trained],
    pair: Pair,
    options: FitOptions = FitOptions(),  # noqa: B008  frozen
    *,
    scales: Scales | None = None,
    **more,
) -> Fitted:
    """Train connectors of one kind on, with no l1 norm of weights, those that are 0 held there.

    A penalty of hidden codes (`hidden_l1`) stays: without it other hidden codes would fire.

    Args:
        trained: the members; their static choices may differ in coefficients alone.
        pair, options, scales, more: as for `fit`.

    Raises:
        InputError: none, or connectors of different kinds or sizes.
    """
    if not trained:
        raise InputError("no connectors to refit: give at least one")
    plain = [dataclasses.replace(t.connector, **dict.fromkeys(t.connector.coefficients, 0.0)) for t in trained]
    if len(set(plain)) > 1:
        raise InputError(
            f"connectors refitted together must differ in coefficients alone: {', '.join(map(str, plain))}"
        )
    members = [Member({**t.connector.coefficients, "alpha": 0.0}) for t in trained]
    return fit(plain[0], pair, options, members, scales=scales, start=trained, keep_support=True, **more)
