"""Jacobian autoencoders: two TopK dictionaries around an MLP, trained together so that few inputs move few outputs.

    loss = ||x - x_hat||^2 + AuxK(x) + ||y - y_hat||^2 + AuxK(y) + jacobian x sum |J| / (k k)      means over rows

x is the MLP's input (`mlp_in`), y its output (`mlp_out`), each behind its normaliser; J is k x k, between the features
that are active on x and on y, in the units of their codes: see jacobian.py. Both sides are ordinary TopK dictionaries
(dictionaries/topk.py) and are saved as such.

Where J is taken. `at` says whether the slopes of the MLP are those at x_hat ("reconstruction": what the sparse codes
alone give, as the function between codes is defined) or at x ("input", which the authors' later code takes). At x_hat
the penalty has a gradient in the input's encoder and decoder bias through the slopes as well.

The coefficient. The paper's lambda stands beside errors that are means over dimensions, of activations as they are;
here errors are sums, of activations that have a mean square of 1 in each dimension: lambda there is about lambda x d
here, where d is the width and both sites have such activations anyway. J too is in normalised units, so the figures of
models whose activations differ in size can be compared.

As a `Dictionary` a pair reads both sites side by side, `[rows, d_x + d_y]`; parameters are those of both sides with
prefixes (`in_`, `out_`) and, fixed, those of the MLP (`mlp_`): the training step, schedules, checkpoints and the loop
are those of every dictionary. No unit rows are lost: `tangent` and `project` are each side's own.

Source: Farnik et al. 2025, "Jacobian Sparse Autoencoders: Sparsify Computations, Not Just Activations" (ICML); Gao et
al. 2024 for TopK and AuxK, which the authors do without.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.connectors.folded_mlp import ARRAYS, FoldedMlp, from_params
from sparse_jax.connectors.jacobian import active, jacobian_l1, tables
from sparse_jax.connectors.jacobian_gradient import join, joined_losses, pair_value_and_grad
from sparse_jax.dictionaries.normalised import Normalised
from sparse_jax.dictionaries.protocol import Batch, Context, Dictionary, Losses, Params, Ramp
from sparse_jax.dictionaries.topk import TopK, current_k
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes, dense, top_k_codes

At = Literal["reconstruction", "input"]


@dataclass(frozen=True)
class JacobianPair(Dictionary):
    """Two TopK dictionaries and the MLP between them; make one with `jacobian_pair`.

    Attributes:
        inputs, outputs: the dictionaries of `mlp_in` and `mlp_out`, sized; of one k.
        activation: the MLP's.
        at: where the MLP's slopes are taken.
        every: the penalty is the mean over every so many-th row of a batch: rows are shuffled, so it is an unbiased
            estimate of the mean over all, and takes a share of its time.
        jacobian: the penalty's coefficient; without it the two sides learn apart.
    """

    inputs: TopK = field(default_factory=TopK)
    outputs: TopK = field(default_factory=TopK)
    activation: str = "gelu"
    at: At = "reconstruction"
    every: int = 1
    jacobian: float = 0.0

    kind: ClassVar[str] = "jacobian_pair"

    @property
    def coefficients(self) -> dict[str, float]:
        """Those of TopK, for both sides, and `jacobian`, which is warmed up from 0 by the run's schedule."""
        return {**self.inputs.coefficients, "jacobian": self.jacobian}

    @property
    def ramps(self) -> dict[str, Ramp]:
        return self.inputs.ramps

    @property
    def frozen(self) -> tuple[str, ...]:
        """The MLP's arrays."""
        return tuple("mlp_" + name for name in ARRAYS)

    def init(self, key: jax.Array) -> Params:
        """Each side as TopK starts; the MLP is put in by `with_mlp`."""
        keys = (jax.random.fold_in(key, 0), jax.random.fold_in(key, 1))
        return join({"in": self.inputs.init(keys[0]), "out": self.outputs.init(keys[1])})

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """Codes of both sides, side by side."""
        values = self.split(x)
        codes = [side.encode(own, value) for (side, own), value in zip(self.sides(params), values)]
        return jnp.concatenate(codes, axis=-1)

    def decode(self, params: Params, codes: jax.Array, x: jax.Array | None = None) -> jax.Array:
        """Reconstructions of both sites, side by side."""
        parts = self.split_features(codes)
        return jnp.concatenate([side.decode(own, part) for (side, own), part in zip(self.sides(params), parts)], -1)

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction_in", "aux_k_in", the same "_out", and "jacobian"."""
        both = [
            side.loss(own, Batch(x, x, batch.weight), here)
            for (side, own), x, here in zip(self.sides(params), self.split(batch.x), self.contexts(ctx))
        ]
        return joined_losses(*both, self.penalty(params, batch, ctx))

    def value_and_grad(self, params: Params, batch: Batch, ctx: Context) -> tuple[jax.Array, Losses, Params]:
        """By hand (jacobian_gradient.py); equal to autodiff of `loss`."""
        return pair_value_and_grad(self, params, batch, ctx)

    def penalty(self, params: Params, batch: Batch, ctx: Context) -> jax.Array:
        """The coefficient times the mean over rows of `sum |J| / k^2`."""
        (inputs, own_in), (outputs, own_out) = self.sides(params)
        x, y = self.split(batch.x)
        codes = [
            top_k_codes(jax.nn.relu(side.preactivations(own, value)), side.k_bound, current_k(ctx))
            for side, own, value in ((inputs, own_in, x), (outputs, own_out, y))
        ]
        place = x if self.at == "input" else inputs.decode(own_in, dense(codes[0], inputs.n_features))
        mean = self.mean_l1(params, own_in["W_dec"], own_out["W_enc"], place, codes, batch.weight)
        return ctx.coefficients["jacobian"].astype(mean.dtype) * mean

    def mean_l1(
        self,
        params: Params,
        W_dec: jax.Array,
        W_enc: jax.Array,
        place: jax.Array,
        codes: list[SparseCodes],
        weight: jax.Array,
    ) -> jax.Array:
        """The mean over (every so many-th of) the rows that count of `sum |J| / k^2`, for codes of both sides.

        Args:
            params: of which the MLP is read.
            W_dec, W_enc: the inputs' decoder, the outputs' encoder.
            place: `[rows, d_x]` where the MLP's slopes are taken.
            codes: of the inputs, of the outputs.
            weight: `[rows]`.
        """
        mlp = self.mlp(params)
        place, weight, codes = jax.tree.map(lambda rows: rows[:: self.every], (place, weight, codes))
        total = jacobian_l1(tables(W_dec, W_enc, mlp), mlp.slopes(place), active(*codes), weight)
        return total / (self.inputs.k * self.outputs.k * jnp.maximum(jnp.sum(weight), 1))

    def tangent(self, params: Params, grads: Params) -> Params:
        """Each side's own."""
        own = split_params(grads)
        return join({n: s.tangent(p, own[n]) for n, (s, p) in zip(("in", "out"), self.sides(params))})

    def project(self, params: Params) -> Params:
        """Each side's own; the MLP stays."""
        projected = {name: side.project(own) for name, (side, own) in zip(("in", "out"), self.sides(params))}
        return {**params, **join(projected)}

    def directions(self, params: Params) -> jax.Array:
        """`[n_in + n_out, d_x + d_y]`: each feature's row, 0 at the other site."""
        (inputs, own_in), (outputs, own_out) = self.sides(params)
        return jax.scipy.linalg.block_diag(inputs.directions(own_in), outputs.directions(own_out))

    def sides(self, params: Params) -> tuple[tuple[TopK, Params], tuple[TopK, Params]]:
        """(dictionary, its own parameters) of the inputs and of the outputs."""
        own = split_params(params)
        return (self.inputs, own["in"]), (self.outputs, own["out"])

    def mlp(self, params: Params) -> FoldedMlp:
        return from_params(params, self.activation)

    def with_mlp(self, params: Params, mlp: FoldedMlp) -> Params:
        """The parameters with a copy of the MLP's arrays: the training step consumes what it is given."""
        return {**params, **jax.tree.map(jnp.copy, mlp.params())}

    def split(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x and y of `[rows, d_x + d_y]`."""
        return x[..., : self.inputs.d_in], x[..., self.inputs.d_in :]

    def split_features(self, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is the inputs' and the outputs' of an array whose last axis is features."""
        return codes[..., : self.inputs.n_features], codes[..., self.inputs.n_features :]

    def contexts(self, ctx: Context) -> tuple[Context, Context]:
        """Each side's context: the ages of its features."""
        ages = self.split_features(ctx.age)
        return ctx._replace(age=ages[0]), ctx._replace(age=ages[1])


def jacobian_pair(
    inputs: TopK, outputs: TopK, activation: str, *, at: At = "reconstruction", every: int = 1, jacobian: float = 0.0
) -> JacobianPair:
    """The pair of two sized dictionaries.

    Raises:
        InputError: a side without a size, other coefficients on one side, a coefficient below 0, no place of that name.
    """
    for name, side in (("inputs", inputs), ("outputs", outputs)):
        if not side.d_in or not side.n_features or side.d_in != side.d_out:
            raise InputError(f"the {name} of a Jacobian pair: give a TopK dictionary sized for its site (`sized`)")
        if side.k > side.n_features:
            raise InputError(f"--k {side.k}: the {name} have {side.n_features} features")
    if inputs.coefficients != outputs.coefficients or inputs.ramps != outputs.ramps:
        raise InputError("the inputs and the outputs of a Jacobian pair have another k or AuxK: give one of each")
    if jacobian < 0 or every < 1 or at not in ("reconstruction", "input"):
        raise InputError(
            f"jacobian {jacobian}, every {every}, at {at!r}: give a coefficient of at least 0, every 1st row or fewer, "
            "and reconstruction or input"
        )
    return JacobianPair(
        n_features=inputs.n_features + outputs.n_features,
        d_in=inputs.d_in + outputs.d_in,
        d_out=inputs.d_in + outputs.d_in,
        compute_dtype=inputs.compute_dtype,
        inputs=inputs,
        outputs=outputs,
        activation=activation,
        at=at,
        every=every,
        jacobian=jacobian,
    )


def joint_normaliser(into: Normaliser, out: Normaliser) -> Normaliser:
    """What normalises both sites side by side: a scale for each dimension."""
    scales = [jnp.broadcast_to(each.scale, each.centre.shape) for each in (into, out)]
    return Normaliser(jnp.concatenate([into.centre, out.centre]), jnp.concatenate(scales))


def trained_sides(pair: JacobianPair, params: Params, normaliser: Normaliser) -> tuple[Normalised, Normalised]:
    """Both sides as ordinary dictionaries of their sites."""
    made = []
    for (side, own), centre, scale in zip(
        pair.sides(params), pair.split(normaliser.centre), pair.split(normaliser.scale)
    ):
        made.append(Normalised(side, own, Normaliser(centre, scale[0])))
    return made[0], made[1]


def split_params(params: Params) -> dict[str, Params]:
    """The parameters of "in" and of "out" without their prefixes."""
    return {
        side: {name.removeprefix(side + "_"): value for name, value in params.items() if name.startswith(side + "_")}
        for side in ("in", "out")
    }
