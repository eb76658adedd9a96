"""A batch in parts within one compiled step: less memory at a time, the same step.

    rows        micro-batches: the gradient of each, one after the other (`lax.scan`), and their mean by the rows that
                count. Micro-batch i of N has rows i, N + i, 2 N + i, ...: on a mesh every device works on rows that it
                has, and which rows go together does not depend on the mesh.
    features    chunks: codes of one chunk of features at a time, twice: to add up the reconstruction, then for the
                gradient, since the error must be known first (chunked_gradient.py). L1 alone.

Exact, but for the order of sums, where the objective is a mean over rows: L1, JumpReLU, Gated, Lp, and TopK without its
auxiliary loss. Otherwise a micro-batch stands for the batch in:

    BatchTopK, Matryoshka   the rows * k largest are those of each micro-batch, so k is a mean over a micro-batch; the
                            threshold moves to the mean of the micro-batches' smallest kept activations
    Lp, while p falls       the factor that holds its strength moves to the mean of the micro-batches' factors
    AuxK                    the error that it explains is divided by that error's variance within the micro-batch

Features fire as often as in the whole batch; what a dictionary draws at random it draws anew for each micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from sparse_jax.dictionaries.protocol import Batch, Context, Dictionary, Losses, Params
from sparse_jax.errors import InputError
from sparse_jax.numerics import axes

# (parameters, batch, context) -> (objective, losses, gradients of the trained parameters)
ValueAndGrad = Callable[[Params, Batch, Context], tuple[jax.Array, Losses, Params]]


@dataclass(frozen=True)
class Chunks:
    """How a step is cut.

    Attributes:
        rows: micro-batches of a batch; the gradients are accumulated.
        features: chunks of the features of each device.

    Raises:
        InputError: a number below 1.
    """

    rows: int = 1
    features: int = 1

    def __post_init__(self):
        for flag, number in (("--accumulate", self.rows), ("--feature-chunks", self.features)):
            if number < 1:
                raise InputError(f"{flag} {number}: give 1 (the whole at once) or more")

    def check(self, dictionary: Dictionary, batch: int, data: int = 1, features: int = 1) -> None:
        """Raises InputError unless batches and dictionary can be cut so, on a mesh that divides both first."""
        if batch % (self.rows * data):
            raise InputError(
                f"--accumulate {self.rows} does not divide the {batch // data} tokens of a batch on each device: give "
                "a divisor, or another --batch"
            )
        if self.features == 1:
            return
        if not getattr(dictionary, "in_feature_chunks", False):
            raise InputError(
                f"--feature-chunks {self.features}: {dictionary.kind} has no step in chunks of features (l1 has); give "
                "--accumulate, which makes arrays of [batch, features] as much smaller"
            )
        if dictionary.n_features % (self.features * features):
            raise InputError(
                f"--feature-chunks {self.features} does not divide the {dictionary.n_features // features} features on "
                "each device: give a divisor"
            )


# Nothing is cut.
WHOLE = Chunks()


def gradient_of(dictionary: Dictionary, chunks: Chunks = WHOLE) -> ValueAndGrad:
    """The dictionary's `value_and_grad`, cut; itself where nothing is.

    Raises:
        InputError: when called, a batch or features that cannot be cut so.
    """

    def of(params: Params, batch: Batch, ctx: Context) -> tuple[jax.Array, Losses, Params]:
        if chunks.features == 1:
            return dictionary.value_and_grad(params, batch, ctx)
        return dictionary.chunked_value_and_grad(params, batch, ctx, chunks.features)

    def checked(params: Params, batch: Batch, ctx: Context) -> tuple[jax.Array, Losses, Params]:
        chunks.check(dictionary, len(batch.x), axes.parts(axes.DATA), axes.parts(axes.FEATURES))
        if batch.rows is not None and chunks.rows > 1:
            raise InputError("--accumulate: an objective on whole rows of text has no micro-batches")
        return of(params, batch, ctx) if chunks.rows == 1 else _accumulated(of, params, batch, ctx, chunks.rows)

    return dictionary.value_and_grad if chunks == WHOLE else checked


def _accumulated(
    value_and_grad: ValueAndGrad, params: Params, batch: Batch, ctx: Context, parts: int
) -> tuple[jax.Array, Losses, Params]:
    """The mean of `parts` micro-batches, each weighted by the share of the batch's rows that it has."""
    same = batch.target is batch.x
    x, target, weight = (_dealt(each, parts) for each in batch[:3])
    total = jnp.maximum(jnp.sum(batch.weight), 1)

    def one(x, target, weight, number):
        of = Batch(x, x if same else target, weight)
        value, losses, grads = value_and_grad(params, of, ctx._replace(key=jax.random.fold_in(ctx.key, number)))
        share = jnp.sum(weight) / total
        moved = {name: value - params[name] for name, value in losses.frozen.items()}
        means = jax.tree.map(lambda each: share.astype(each.dtype) * each, (value, losses.terms, moved, grads))
        return (means, losses.fired), losses.y_hat

    shapes, _ = jax.eval_shape(one, x[0], target[0], weight[0], jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes)

    def add(sums, part):
        more, y_hat = one(*part)
        return jax.tree.map(jnp.add, sums, more), y_hat

    numbers = jnp.arange(parts, dtype=jnp.int32)
    ((value, terms, moved, grads), fired), y_hat = lax.scan(add, zeros, (x, target, weight, numbers))
    frozen = {name: params[name] + change for name, change in moved.items()}
    return value, Losses(terms, _gathered(y_hat), fired, frozen), grads


def _dealt(values: jax.Array, parts: int) -> jax.Array:
    """`[batch, ...]` -> `[parts, batch / parts, ...]`, row j in part j modulo parts."""
    return jnp.swapaxes(values.reshape(-1, parts, *values.shape[1:]), 0, 1)


def _gathered(values: jax.Array) -> jax.Array:
    """The inverse of `_dealt`."""
    return jnp.swapaxes(values, 0, 1).reshape(-1, *values.shape[2:])
