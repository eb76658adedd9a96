"""What people do to activations: functions for `Edit(site, fn, args, where)`.

    Edit("attn_z.3", zero, where=at(heads=[5]))                       zero-ablate a head
    Edit("mlp_out.2", fill, (mean,))                                  mean-ablate, mean [d_model]
    Edit("resid_post.1", resample, (jnp.array([2, 0, 1]),))           resample-ablate: each row gets another row's
    Edit("resid_post.3", put, (captured,), at(positions=[7]))         patch a value in from another run
    Edit("resid_post.3", add, (direction, jnp.array(4.0)))            steer
    Edit("resid_post.3", reconstruct, (sae,))                         replace by a dictionary's reconstruction
    Edit("resid_post.3", set_features, (sae, features, values))       clamp features, error term kept

Each keeps the value's shape and dtype. Arguments are traced, so other arguments compile nothing new; a leading axis on
them under `jax.vmap` is that many interventions in one program.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax


class Coder(Protocol):
    """A trained dictionary with all that it needs, as a pytree (`dictionaries.Normalised`)."""

    def encode(self, x: jax.Array) -> jax.Array: ...

    def decode(self, codes: jax.Array, x: jax.Array | None = None) -> jax.Array: ...


def put(value: jax.Array, new: jax.Array) -> jax.Array:
    """`new`, whatever stood there. Of `value`'s shape."""
    return new.astype(value.dtype)


def zero(value: jax.Array) -> jax.Array:
    """Zero ablation."""
    return jnp.zeros_like(value)


def fill(value: jax.Array, new: jax.Array) -> jax.Array:
    """`new` at every position: mean ablation, where it is the mean. `new` has the shape of one position's value (or
    any that broadcasts): `[d]`, or `[head, head_dim]`."""
    return jnp.broadcast_to(new.astype(value.dtype), value.shape)


def resample(value: jax.Array, rows: jax.Array) -> jax.Array:
    """Resample ablation: row i gets what row `rows[i]` of the same batch has. rows: `[batch]` integers."""
    return value[rows]


def scale(value: jax.Array, factor: jax.Array) -> jax.Array:
    """`factor * value`."""
    return factor.astype(value.dtype) * value


def add(value: jax.Array, direction: jax.Array, scale: jax.Array) -> jax.Array:
    """Steering: `value + scale * direction`, with `direction` broadcast against the trailing axes, `scale` a scalar."""
    return value + (scale * direction).astype(value.dtype)


def remove_direction(value: jax.Array, direction: jax.Array) -> jax.Array:
    """Directional ablation: the part of `value [..., d]` along `direction [d]` (of any length but 0) is taken out."""
    unit = (direction / jnp.linalg.norm(direction)).astype(value.dtype)
    return value - jnp.sum(value * unit, axis=-1, keepdims=True) * unit


def reconstruct(value: jax.Array, coder: Coder) -> jax.Array:
    """The dictionary's reconstruction in place of the activation; gradients flow through its codes alone."""
    rows = _rows(value)
    return _like(value, coder.decode(coder.encode(rows), rows))


def reconstruct_with_error(value: jax.Array, coder: Coder) -> jax.Array:
    """Reconstruction plus what it misses, held constant: the value stays, but gradients flow through the codes.

    For attribution to features in the model as it is. Source: Marks et al. 2024, eq. 2 (sparse feature circuits).
    """
    rows = _rows(value)
    rebuilt = coder.decode(coder.encode(rows), rows)
    return _like(value, rebuilt + lax.stop_gradient(rows - rebuilt))


def set_features(value: jax.Array, coder: Coder, features: jax.Array, codes: jax.Array) -> jax.Array:
    """Clamp features, error term kept: decode(codes with `features` at `codes`) + (x - decode(codes of x)).

    Args:
        value: the activation.
        coder: the dictionary.
        features: `[n]` integers, each once.
        codes: `[n]` (or `[]`) what to set them to, in the dictionary's normalised units; 0 ablates.
    """
    rows = _rows(value)
    found = coder.encode(rows)
    wanted = jnp.broadcast_to(codes.astype(found.dtype), features.shape)
    changed = found.at[:, features].set(wanted)
    return _like(value, rows + coder.decode(changed, rows) - coder.decode(found, rows))


def scale_features(value: jax.Array, coder: Coder, features: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiply the codes of `features [n]` by `factor` (`[n]` or `[]`), error term kept; 0 ablates."""
    rows = _rows(value)
    found = coder.encode(rows)
    changed = found.at[:, features].multiply(factor.astype(found.dtype))
    return _like(value, rows + coder.decode(changed, rows) - coder.decode(found, rows))


def _rows(value: jax.Array) -> jax.Array:
    """`[rows, width]` float32 (or float64): what a dictionary takes, heads flattened."""
    dtype = value.dtype if value.dtype == jnp.float64 else jnp.float32
    return value.reshape(value.shape[0] * value.shape[1], -1).astype(dtype)


def _like(value: jax.Array, rows: jax.Array) -> jax.Array:
    return rows.reshape(value.shape).astype(value.dtype)
