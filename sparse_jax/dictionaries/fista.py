"""A dictionary without an encoder: codes are the solution of the lasso. Source: Olshausen & Field 1996; Yun et al. 2021
("Transformer visualization via dictionary learning"), whose codes FISTA finds; Beck & Teboulle 2009.

    c     = argmin_{c >= 0} ||x - b_dec - c W_dec||^2 + lambda ||c||_1        (signed: of any sign)
    x_hat = c W_dec + b_dec                                                   rows of W_dec have norm 1
    loss  = ||x - x_hat||^2 + lambda ||c||_1, with c held fixed               mean over rows

With codes that are a minimum, the gradient with codes held fixed is that of the minimum itself in W_dec and b_dec
(Danskin's theorem): nothing flows through the solver. `train_sae fista` takes Adam on it; the updates of
`coding/learn.py` (Yun et al.'s among them) are what `experiments.fista_dictionary` offers.

lambda is the traced coefficient "l1" in training; the one in use at the end is a parameter, "penalty", for inference.
There is no warm-up of it: near 0 every feature would be active.

Codes are found by working sets on a CPU, and by FISTA's plain products where gathers are slow (coding/working_set.py,
coding/fista.py). On a mesh each device solves rows of its own with the whole of W_dec (numerics/row_shards.py).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.coding import fista_until, lasso
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
from sparse_jax.dictionaries.unit_norm import UnitNormDecoder
from sparse_jax.errors import InputError
from sparse_jax.numerics.axes import divided
from sparse_jax.numerics.row_shards import over_rows


@register("fista")
@dataclass(frozen=True)
class Fista(UnitNormDecoder):
    """Codes that minimise the lasso, by FISTA or working sets (Yun et al. 2021).

    Attributes:
        l1: lambda, in normalised units (E||x||^2 = d).
        signed: codes may be negative.
        tolerance: relative duality gap of codes at inference.
        training_tolerance: of those in training. A loose one leaves out small codes: L0 in training is then lower than
            at inference.
        solver: which; "auto": working sets on a CPU, FISTA elsewhere.
    """

    l1: float = 3.0
    signed: bool = False
    tolerance: float = 1e-4
    training_tolerance: float = 1e-4
    solver: Literal["auto", "working-sets", "fista"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        if not self.l1 >= 0:
            raise InputError(f"--l1 {self.l1}: the l1 coefficient cannot be negative")
        for name in ("tolerance", "training_tolerance"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give 0 or more, and less than 1")
        if self.solver not in ("auto", "working-sets", "fista"):
            raise InputError(f"--solver {self.solver}: give auto, working-sets or fista")

    @property
    def sparsity_coefficient(self) -> str | None:
        return "l1"

    @property
    def coefficients(self) -> dict[str, float]:
        return {"l1": self.l1}

    @property
    def ramps(self) -> dict[str, Ramp]:
        return {"l1": HELD}

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("penalty",)

    def init(self, key: jax.Array) -> Params:
        """Random unit rows of W_dec, b_dec = 0, penalty = l1."""
        params = self.init_linear(key)
        del params["W_enc"]
        return params | {"penalty": jnp.array(self.l1, jnp.float32)}

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """The solution for `params["penalty"]`, to a relative duality gap of `tolerance`."""
        return self.solve(params, x, params["penalty"], self.tolerance)

    def solve(self, params: Params, x: jax.Array, penalty: jax.Array, tolerance: float) -> jax.Array:
        """Codes `[rows, n_features]` for some penalty and tolerance."""
        by_sets = self.solver == "working-sets" or (self.solver == "auto" and jax.default_backend() == "cpu")
        solver = lasso if by_sets else fista_until
        x = self.centred(params, jnp.asarray(x))

        def codes(x, W, penalty):
            return solver(x, W, penalty, tolerance, signed=self.signed).codes

        given = x, jnp.asarray(params["W_dec"]), jnp.asarray(penalty)
        return over_rows(codes, *given) if divided() else codes(*given)

    def centred(self, params: Params, x: jax.Array) -> jax.Array:
        """`x - b_dec`: what codes are to explain; whatever `centring` says, the decoder adds b_dec."""
        return x - params["b_dec"] if self.decoder_bias else x

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" and "l1", both of codes that are held fixed."""
        penalty = ctx.coefficients["l1"]
        return self.losses(params, batch, penalty, self.training_codes(params, batch, penalty))

    def training_codes(self, params: Params, batch: Batch, penalty: jax.Array) -> jax.Array:
        """Codes of a batch, through which no gradient flows; those of masked rows are 0."""
        # A masked row, whatever it holds, must not keep the solver busy: what is to be explained of it is 0.
        x = jnp.where(batch.weight[:, None] > 0, batch.x, params.get("b_dec", 0))
        fixed = lax.stop_gradient((params, x, penalty))
        return lax.stop_gradient(self.solve(*fixed, self.training_tolerance))

    def losses(self, params: Params, batch: Batch, penalty: jax.Array, codes: jax.Array) -> Losses:
        """The terms of given codes."""
        y_hat = self.decode(params, codes)
        size = weighted_mean(jnp.sum(jnp.abs(codes), axis=-1), batch.weight)
        terms = {"reconstruction": reconstruction_loss(y_hat, batch), "l1": penalty * size}
        return Losses(terms, y_hat, firings(codes, batch.weight), {"penalty": jnp.asarray(penalty, jnp.float32)})
