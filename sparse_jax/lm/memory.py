"""Keys and values remembered between passes (the KV cache), so that a new token costs one position, not all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_jax.lm.attention import cached_attention, causal_attention


class Memory(NamedTuple):
    """What every layer's attention has seen so far. Slot i holds position i.

    Attributes:
        keys, values: `[layer, batch, slot, kv_head, head_dim]`, keys after rotary embedding.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config, batch: int, slots: int, dtype) -> "Memory":
        """Room for `slots` positions of `batch` rows."""
        shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def attend(self, layer, positions, q, k, v, scale, tap, window) -> tuple[jax.Array, "Memory"]:
        """Remember `k` and `v` of `layer` at their positions, and let `q` see all that is remembered.

        positions: `[position]`: a pass over the beginning of the rows, which holds all that there is to see; or
            `[batch, 1]`: one position of each row, each at a place of its own.
        """
        if positions.ndim == 1:
            length = k.shape[1]
            after = Memory(self.keys.at[layer, :, :length].set(k), self.values.at[layer, :, :length].set(v))
            return causal_attention(q, k, v, scale, tap, window), after
        rows = jnp.arange(len(positions), dtype=jnp.int32)[:, None]
        after = Memory(self.keys.at[layer, rows, positions].set(k), self.values.at[layer, rows, positions].set(v))
        return cached_attention(q, after.keys[layer], after.values[layer], scale, tap, window, positions), after
