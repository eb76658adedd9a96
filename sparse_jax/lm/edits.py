"""Edits: functions that change the value at a site while the model runs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sparse_jax.lm.sites import Site


@partial(jax.tree_util.register_dataclass, data_fields=["args"], meta_fields=["site", "fn"])
@dataclass(frozen=True)
class Edit:
    """At `site`, `value` becomes `fn(value, *args)`.

    Attributes:
        site: where; text is parsed.
        fn: a pure function of the value and the arguments that keeps shape and dtype. It is part of what is compiled:
            give a module-level function, not a fresh lambda at each call.
        args: arrays (or pytrees of them), traced: other arguments of the same shapes compile nothing new.
    """

    site: Site
    fn: Callable[..., jax.Array]
    args: Any = ()

    def __post_init__(self):
        object.__setattr__(self, "site", Site.parse(self.site))

    def __call__(self, value: jax.Array) -> jax.Array:
        changed = self.fn(value, *self.args)
        if changed.shape != value.shape or changed.dtype != value.dtype:
            raise ValueError(
                f"the edit at {self.site} turned {value.dtype}{list(value.shape)} into "
                f"{changed.dtype}{list(changed.shape)}; an edit keeps shape and dtype"
            )
        return changed


def put(value: jax.Array, new: jax.Array) -> jax.Array:
    """`new`, whatever stood there. Of `value`'s shape."""
    return new.astype(value.dtype)


def replace(value: jax.Array, new: jax.Array, mask: jax.Array) -> jax.Array:
    """`new` where `mask [batch, position]` holds, the model's own value elsewhere. All of `value`'s shape."""
    mask = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
    return jnp.where(mask, new.astype(value.dtype), value)


def add(value: jax.Array, direction: jax.Array, scale: jax.Array) -> jax.Array:
    """`value + scale * direction` with `direction` broadcast against the trailing axes and a scalar `scale`."""
    return value + (scale * direction).astype(value.dtype)
