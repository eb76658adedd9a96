"""Adam with the proximal step of an l1 penalty: weights that are exactly 0, at the optimum of the penalised problem.

    m, v    = moving averages of the gradient g of the smooth part, and of g^2
    step    = lr / (sqrt(v_hat) + eps)                        one for each weight
    w      <- soft(w - step * m_hat, alpha * step)            soft(w, t) = sign(w) max(|w| - t, 0)

At rest m_hat is in -alpha * (the subdifferential of |w|), which is the optimality (KKT) condition. The threshold must
have the weight's own step: with lr * alpha for all, what is at rest has m_hat / (sqrt(v_hat) + eps) there in place of
m_hat, the optimum of another problem, one that depends on the noise of the gradient.

With a noisy gradient a weight whose |gradient| is below alpha leaves 0 whenever the noise of m_hat exceeds what is
missing. So the average must grow longer as the learning rate falls: `momentum` keeps (1 - b1) in proportion to it,
which leaves the damping as it is and the noise of m_hat falling with the rate's root.

Source: Kingma & Ba 2015 (Adam); the proximal step in the metric of the preconditioner is that of e.g. Melchior,
Joseph & Moolekamp 2019, "Proximal Adam".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.protocol import Params

B1, B2, EPS = 0.9, 0.999, 1e-8
# The longest average of the gradient spans 1 / 40 of the run: (1 - b1) is at least 40 / steps.
_SHORTEST = 400.0


class AdamState(NamedTuple):
    """Moving averages, each with the names and shapes of the trained parameters.

    Attributes:
        m: of the gradient.
        v: of its square.
    """

    m: Params
    v: Params


def init_adam(params: Params) -> AdamState:
    """Zeros."""
    return AdamState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))


def momentum(falling: float, steps: int) -> float:
    """b1 where the learning rate has come down to a share `falling` of its peak, in a run of so many steps."""
    return 1 - (1 - B1) * max(falling, min(1.0, _SHORTEST / steps))


def soft(w: jax.Array, threshold: jax.Array) -> jax.Array:
    """`w` brought nearer to 0 by `threshold`, exactly 0 where it is no larger."""
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0)


def proximal_adam(
    params: Params,
    grads: Params,
    state: AdamState,
    count: jax.Array,
    learning_rate: jax.Array,
    penalties: dict[str, jax.Array],
    b1: jax.Array | float = B1,
) -> tuple[Params, AdamState]:
    """(parameters, state) after a step.

    Args:
        params: those that are trained.
        grads: of the smooth part, with the same names.
        count: float32, the number of this step, from 1.
        learning_rate: of this step.
        penalties: name -> alpha, or alpha of each entry, for parameters with an l1 penalty; they must be >= 0.
        b1: decay of the average of the gradient at this step: B1, or more once there have been many steps.
    """
    unbias_m, unbias_v = 1 / (1 - B1**count), 1 / (1 - B2**count)
    moved, ms, vs = {}, {}, {}
    for name, g in grads.items():
        ms[name] = m = b1 * state.m[name] + (1 - b1) * g
        vs[name] = v = B2 * state.v[name] + (1 - B2) * g * g
        step = learning_rate / (jnp.sqrt(v * unbias_v) + EPS)
        w = params[name] - step * (m * unbias_m)
        moved[name] = soft(w, step * penalties[name]) if name in penalties else w
    return moved, AdamState(ms, vs)
