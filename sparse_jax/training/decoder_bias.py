"""Where the decoder bias starts: at zero, at the mean or at the geometric median of a sample of activations.

    y = argmin over y of sum over rows i of w_i ||x_i - y||                     the geometric median

A dictionary that subtracts b_dec from its input sees activations about that centre. Behind the default normaliser they
are about their mean already, and zero is the start. The geometric median is moved less than the mean by a few rows of
a very large norm, such as attention sinks. It is found by Weiszfeld's iteration, with Vardi & Zhang's step away from a
data point:

    T   = sum of w_i x_i / r_i  over  sum of w_i / r_i,    r_i = ||x_i - y||,   rows at y left out
    R   = ||sum of w_i (x_i - y) / r_i||,   rows at y left out
    eta = sum of w_i of the rows at y
    y  <- y + max(0, 1 - eta / R) (T - y)

y is the median exactly if R <= eta: then no direction leads down.

Source: Bricken et al. 2023 and Gao et al. 2024 start at the geometric median. Weiszfeld 1937; Vardi & Zhang 2000, "The
multivariate L1-median and associated data depth".
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_jax.dictionaries.protocol import Dictionary, Params
from sparse_jax.errors import InputError
from sparse_jax.numerics import safe_norm

BiasStart = Literal["zero", "mean", "geometric-median"]

# A start is found from as many rows at most; the mean of so many is known to 1 / 128 of the activations' spread.
ROWS = 16_384
# Any width will do to see which parameters a dictionary has.
_ANY_WIDTH = 64


def check_bias_start(dictionary: Dictionary, rule: BiasStart) -> None:
    """Check that the decoder bias of a dictionary, with a size or without, can start by a rule.

    Raises:
        InputError: an unknown rule, or one other than "zero" for a dictionary without b_dec.
    """
    if rule not in ("zero", "mean", "geometric-median"):
        raise InputError(f"--decoder-bias-start {rule!r}: choose zero, mean or geometric-median")
    if rule == "zero":
        return
    sized = dictionary if dictionary.d_in else dictionary.sized(_ANY_WIDTH)
    if "b_dec" not in jax.eval_shape(sized.init, jax.random.key(0)):
        raise InputError(
            f"--decoder-bias-start {rule}: this {dictionary.kind} dictionary has no decoder bias; start at zero, or "
            "train one that has"
        )


def start_decoder_bias(
    dictionary: Dictionary, params: Params, x: jax.Array, weight: jax.Array, rule: BiasStart
) -> Params:
    """The parameters with b_dec where the rule says; as they are with the rule "zero".

    Args:
        dictionary: whose parameters they are.
        params: as `init` makes them.
        x: `[rows, d_out]` normalised activations, what is to be reconstructed: b_dec is in normalised units.
        weight: `[rows]` 1 where a row counts, 0 where it is masked.
        rule: see `centre_of_rows`.

    Raises:
        InputError: see `check_bias_start` and `centre_of_rows`; rows of another width than the dictionary's.
    """
    check_bias_start(dictionary, rule)
    if rule == "zero":
        return params
    return with_decoder_bias(dictionary, params, centre_of_rows(x, weight, rule))


def with_decoder_bias(dictionary: Dictionary, params: Params, centre: jax.Array) -> Params:
    """The parameters with b_dec at a centre that is found already, as for many dictionaries of one site.

    Args:
        dictionary: whose parameters they are; it has a b_dec (`check_bias_start`).
        params: as `init` makes them.
        centre: `[d_out]` in normalised units (`centre_of_rows`); copied, in the dtype of b_dec.

    Raises:
        InputError: the centre is of another width than the dictionary.
    """
    if centre.shape[-1] != dictionary.d_out:
        raise InputError(
            f"rows of width {centre.shape[-1]} for the decoder bias of a dictionary of width {dictionary.d_out}"
        )
    # A copy: a step consumes the parameters, and the centre may be that of other dictionaries too.
    return {**params, "b_dec": jnp.array(centre, params["b_dec"].dtype)}


def centre_of_rows(x: jax.Array, weight: jax.Array, rule: BiasStart) -> jax.Array:
    """`[d]` zero, the mean or the geometric median of `x [rows, d]` over the rows that count.

    Args:
        x: `[rows, d]`.
        weight: `[rows]` 1 where a row counts, 0 where it is masked; what a masked row holds does not matter.
        rule: which of them. The mean of default-normalised activations is 0, up to what the sample leaves.

    Raises:
        InputError: no row counts.
    """
    if rule == "zero":
        return jnp.zeros(x.shape[-1], x.dtype)
    if not np.any(np.asarray(weight) > 0):
        raise InputError(f"a decoder bias that starts at the {rule}: the mask drops every row of the sample")
    return weighted_row_mean(x, weight) if rule == "mean" else geometric_median(x, weight)


def first_counted(x: jax.Array, weight: jax.Array, limit: int = ROWS) -> tuple[jax.Array, jax.Array]:
    """The first `limit` rows of `x [rows, d]` that count, and their `weight`; fewer where there are not so many."""
    rows = np.flatnonzero(np.asarray(weight) > 0)[:limit]
    return x[rows], weight[rows]


@jax.jit
def weighted_row_mean(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`[d]` sum of w_i x_i / sum of w_i of `x [rows, d]`, `weight [rows]`; 0 where no row counts."""
    share = (weight / jnp.maximum(jnp.sum(weight), jnp.finfo(weight.dtype).tiny)).astype(x.dtype)[:, None]
    counts = share > 0
    mean = jnp.sum(jnp.where(counts, share * x, 0), axis=0)
    # The second pass adds up what is left, in which nothing of the mean's size can cancel.
    return mean + jnp.sum(jnp.where(counts, share * (x - mean), 0), axis=0)


@partial(jax.jit, static_argnames=("tolerance", "max_iterations"))
def geometric_median(x: jax.Array, weight: jax.Array, tolerance: float = 1e-5, max_iterations: int = 200) -> jax.Array:
    """`[d]` the point with the smallest weighted sum of distances to rows of `x`; 0 where no row counts.

    Where several points are (an even number of rows on a line), one of them.

    Args:
        x: `[rows, d]`, of any float dtype; rows without weight may hold anything.
        weight: `[rows]`, 0 for masked rows, none negative.
        tolerance: ends the iteration when max(0, R - eta) / sum of w, the steepest descent of the mean distance,
            is not above it; below about 1e-6 it is lost in float32's rounding.
        max_iterations: ends it in any case.
    """
    mean, counts = weighted_row_mean(x, weight), weight > 0
    # About the mean: distances keep their digits where it is large, as in a raw residual stream.
    x = jnp.where(counts[:, None], x - mean, 0)
    weight = jnp.where(counts, weight / jnp.maximum(jnp.sum(weight), jnp.finfo(weight.dtype).tiny), 0).astype(x.dtype)
    # A row nearer than rounding can tell is at the estimate.
    near = 8 * jnp.finfo(x.dtype).eps * jnp.sum(weight * safe_norm(x))

    def step(carry):
        y, _, count = carry
        difference = x - y
        distance = safe_norm(difference)
        away = distance > near
        pull = jnp.where(away, weight / jnp.where(away, distance, 1), 0)
        # From differences, not products: a row close by pulls with a weight that would magnify their rounding.
        slope = jnp.sum(pull[:, None] * difference, axis=0)
        steepness, held = safe_norm(slope), jnp.sum(jnp.where(away, 0, weight))
        descends = steepness > held
        factor = jnp.where(descends, (1 - held / jnp.where(descends, steepness, 1)) / jnp.sum(pull), 0)
        return y + factor * slope, jnp.maximum(steepness - held, 0), count + 1

    def goes_on(carry):
        _, descent, count = carry
        return (descent > tolerance) & (count < max_iterations)

    start = jnp.zeros_like(mean), jnp.full((), jnp.inf, x.dtype), jnp.zeros((), jnp.int32)
    return mean + lax.while_loop(goes_on, step, start)[0]
