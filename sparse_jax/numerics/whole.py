"""Arrays that lie over the devices of several processes, whole again in each process."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def to_host(tree: Any) -> Any:
    """The arrays of a pytree as NumPy arrays, whole, and typed keys as their numbers; what is not of JAX stays.

    Where they lie over several processes, each of these must call it at the same place: they exchange their parts.
    """
    return jax.tree.map(_to_host, tree)


def to_local(tree: Any) -> Any:
    """The arrays of a pytree as arrays of this process's default device; typed keys too. See `to_host`."""
    return jax.tree.map(_to_local, tree)


def _to_host(value: Any) -> Any:
    if not isinstance(value, jax.Array):
        return value
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    return multihost_utils.process_allgather(value, tiled=True)


def _to_local(value: Any) -> Any:
    if not isinstance(value, jax.Array):
        return value
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.array(_to_host(value)), impl=jax.random.key_impl(value))
    # Not device_put, which would bind it to the device: what it meets may lie elsewhere.
    return jnp.array(_to_host(value))
