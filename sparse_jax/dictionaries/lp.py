"""Lp sparsity and p-annealing. Source: Karvonen et al. 2024, "Measuring Progress in Dictionary Learning for Language
Model Interpretability with Board Game Models" (p-annealing).

    c, x_hat as in l1.py
    S_p(c) = sum_i c_i (c_i + e)^(p - 1)                     e = 0.001: c_i^p, but of finite slope at 0
    loss   = ||x - x_hat||^2 + l1 * s * S_p(c)               mean over rows

p falls linearly from `p_start` to `p` between two shares of the run. Small p is nearer to counting features and shrinks
large codes less, but has many more local minima, so training begins with the convex p = 1.

As p changes, S_p changes with it, and so would the strength of the penalty. Karvonen et al. hold it by a factor s,
taken on the codes of recent batches at each change of p:

    s <- s * mean S_(p before)(c) / mean S_(p now)(c)        s = 1 at first

They change p in a number of jumps and average over the last 10 batches before each; here p changes a little at every
step, and the factors of many steps average themselves. Two more differences: in the authors' earlier code the
reconstruction term is the norm, not its square (dictionary_learning 0.1.0 has the square), and c^p has no e (an
infinite slope at 0). S_1 is sum_i c_i exactly; for p < 1 codes well above 0.001 are penalised as c^p.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.l1 import L1
from sparse_jax.dictionaries.protocol import (
    HELD,
    Batch,
    Context,
    Losses,
    Params,
    Ramp,
    firings,
    reconstruction_loss,
    register,
    weighted_mean,
)
from sparse_jax.errors import InputError

# In S_p; small beside codes, which are of the order of 1 on normalised activations.
EPSILON = 1e-3


def lp_sparsity(codes: jax.Array, p: jax.Array) -> jax.Array:
    """`[rows]`: sum over features of c (c + e)^(p - 1), which is c^p but for a finite slope at 0, for codes >= 0."""
    return jnp.sum(codes * (codes + EPSILON) ** (p - 1), axis=-1)


@register("lp")
@dataclass(frozen=True)
class Lp(L1):
    """L1's autoencoder with sum |c|^p for a penalty, p falling during training (Karvonen et al. 2024).

    `l1` is the coefficient at `p_start`.

    Attributes:
        p: exponent at the end, in (0, 1].
        p_start: exponent at the beginning, in (0, 1]; equal to p: no annealing.
        anneal_begin, anneal_end: shares of the run between which p falls.
        hold_strength: scale the coefficient as p falls so that the penalty keeps its value.
    """

    p: float = 0.2
    p_start: float = 1.0
    anneal_begin: float = 0.1
    anneal_end: float = 1.0
    hold_strength: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("p", "p_start"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number in (0, 1]")
        if not 0 <= self.anneal_begin < self.anneal_end <= 1:
            raise InputError(
                f"--anneal-begin {self.anneal_begin} and --anneal-end {self.anneal_end}: give shares of the run, "
                "0 <= begin < end <= 1"
            )

    @property
    def anneals(self) -> bool:
        """Whether p changes during the run."""
        return self.p != self.p_start

    @property
    def coefficients(self) -> dict[str, float]:
        """`l1`, and p at the end of the run."""
        return {"l1": self.l1, "p": self.p}

    @property
    def ramps(self) -> dict[str, Ramp]:
        """p falls from `p_start` between the two shares, or stays; l1 is warmed up by the schedule."""
        return {"p": Ramp(self.p_start, self.anneal_begin, self.anneal_end) if self.anneals else HELD}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Where the strength is held while p falls: the p of the step before, and the factor s."""
        return ("p_before", "strength") if self.anneals and self.hold_strength else ()

    def init(self, key: jax.Array) -> Params:
        """L1's, and where the strength is held `p_before` = p_start and `strength` = 1."""
        params = super().init(key)
        if self.frozen:
            params |= {"p_before": jnp.full((), self.p_start, jnp.float32), "strength": jnp.ones((), jnp.float32)}
        return params

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" and "lp" = l1 * s * S_p; where the strength is held s moves, without a gradient."""
        codes = self.training_codes(params, batch.x)
        y_hat = self.decode(params, codes)
        penalised = self.penalised(params, codes)
        coefficient, p = ctx.coefficients["l1"], ctx.coefficients["p"]
        frozen = {}
        if self.frozen:
            strength = params["strength"] * _ratio(penalised, params["p_before"], p, batch.weight)
            frozen = {"p_before": p, "strength": strength}
            # The strength holds the penalty's value; it is no way around it.
            coefficient = coefficient * jax.lax.stop_gradient(strength)
        terms = {
            "reconstruction": reconstruction_loss(y_hat, batch),
            "lp": coefficient * weighted_mean(lp_sparsity(penalised, p), batch.weight),
        }
        return Losses(terms, y_hat, firings(self.silenced(codes), batch.weight), frozen)


def _ratio(codes: jax.Array, before: jax.Array, now: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean sparsity with the exponent `before` over that with `now`; 1 where nothing fires."""
    old, new = (weighted_mean(lp_sparsity(codes, p), weight) for p in (before, now))
    return jnp.where(new > 0, old / jnp.where(new > 0, new, 1), 1)
