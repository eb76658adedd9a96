"""How activations are written: as numbers, rounded, or as the sparse codes of a dictionary.

    float32     as they are
    bfloat16    rounded to 8 bits of mantissa: half the space
    int8        q = round(x / s), s = max |x| / 127 for each token: a quarter of the space and 4 bytes
    codes       the active features of a dictionary, `slots` of each token at most: values (float32) and indices

Each is a set of named arrays whose first axes are those of the tokens; bfloat16 is held as its 16 bits (uint16), since
no file format of NumPy has it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from sparse_jax.errors import InputError
from sparse_jax.lm.sites import Site
from sparse_jax.numerics.sparse_codes import SparseCodes, dense

Dtype = Literal["float32", "bfloat16", "int8", "codes"]


@dataclass(frozen=True)
class Entry:
    """What is stored of one site; hashable, so that it can be static.

    Attributes:
        site: where the activations are.
        width: numbers per token there.
        dtype: how they are written.
        slots: with "codes", how many active features of a token are kept, the largest ones.
        n_features: with "codes", of the dictionary.
    """

    site: Site
    width: int
    dtype: Dtype = "float32"
    slots: int = 0
    n_features: int = 0

    def __post_init__(self):
        if self.dtype not in get_args(Dtype):
            raise InputError(f"stored as {self.dtype!r}: give {', '.join(get_args(Dtype))}")
        if (self.dtype == "codes") != (self.slots > 0) or not self.slots <= self.n_features:
            raise InputError(f"{self.slots} slots for {self.dtype} of {self.n_features} features: give 1 to that many")

    @property
    def name(self) -> str:
        """What it is called in a store: its site, or `codes.SITE`."""
        return f"codes.{self.site}" if self.dtype == "codes" else str(self.site)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Its arrays: name -> (shape for one token, dtype in the file)."""
        made: dict[str, tuple[tuple[int, ...], Any]] = {
            "float32": {"values": ((self.width,), np.float32)},
            "bfloat16": {"values": ((self.width,), np.uint16)},
            "int8": {"values": ((self.width,), np.int8), "scale": ((), np.float32)},
            "codes": {"values": ((self.slots,), np.float32), "indices": ((self.slots,), self._index_dtype)},
        }[self.dtype]
        return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in made.items()}

    @property
    def _index_dtype(self):
        return np.uint16 if self.n_features <= 1 << 16 else np.int32

    @property
    def bytes_per_token(self) -> int:
        """Space that a token takes."""
        return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in self.arrays.values())

    def to_json(self) -> dict:
        """For a manifest."""
        made = {"site": str(self.site), "width": self.width, "dtype": self.dtype}
        return made | ({"slots": self.slots, "n_features": self.n_features} if self.dtype == "codes" else {})

    @classmethod
    def from_json(cls, found: dict) -> "Entry":
        """From a manifest."""
        return cls(**{**found, "site": Site.parse(found["site"])})


def encode(entry: Entry, x: jax.Array, dictionary: Any = None) -> tuple[dict[str, jax.Array], jax.Array]:
    """The arrays of raw activations `x [tokens, width]` float32; and how many active features of each found no slot.

    Args:
        entry: how.
        x: activations.
        dictionary: with "codes", a `Normalised` dictionary for raw activations.
    """
    none = jnp.zeros(len(x), jnp.int32)
    if entry.dtype == "float32":
        return {"values": x}, none
    if entry.dtype == "bfloat16":
        return {"values": lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)}, none
    if entry.dtype == "int8":
        scale = jnp.max(jnp.abs(x), axis=-1) / 127
        # A token of zeros is zeros at any scale.
        q = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
        return {"values": q.astype(jnp.int8), "scale": scale}, none
    codes = dictionary.encode(x).astype(jnp.float32)
    _, indices = lax.top_k(jnp.abs(codes), entry.slots)
    values = jnp.take_along_axis(codes, indices, axis=-1)
    lost = jnp.sum(codes != 0, axis=-1, dtype=jnp.int32) - jnp.sum(values != 0, axis=-1, dtype=jnp.int32)
    return {"values": values, "indices": indices.astype(entry._index_dtype)}, lost


def decode(entry: Entry, arrays: dict[str, jax.Array]) -> jax.Array:
    """`[tokens, width]` float32 activations from their arrays.

    Raises:
        InputError: codes are stored: they are no activations (see `codes`).
    """
    values = arrays["values"]
    if entry.dtype == "float32":
        return values
    if entry.dtype == "bfloat16":
        return lax.bitcast_convert_type(values, jnp.bfloat16).astype(jnp.float32)
    if entry.dtype == "int8":
        return values.astype(jnp.float32) * arrays["scale"][..., None]
    raise InputError(f"{entry.name} holds the codes of a dictionary, not activations; read them as codes")


def codes(entry: Entry, arrays: dict[str, jax.Array]) -> SparseCodes:
    """`[tokens, slots]` sparse codes from their arrays.

    Raises:
        InputError: activations are stored.
    """
    if entry.dtype != "codes":
        raise InputError(f"{entry.name} holds activations, not codes; read them as activations")
    return SparseCodes(arrays["values"], arrays["indices"].astype(jnp.int32))


@partial(jax.jit, static_argnames="n_features")
def dense_codes(sparse: SparseCodes, n_features: int) -> jax.Array:
    """`[tokens, n_features]`: see `numerics.sparse_codes.dense`."""
    return dense(sparse, n_features)


def as_float32(entry: Entry, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """`decode` on the host."""
    values = arrays["values"]
    if entry.dtype == "bfloat16":
        return values.view(ml_dtypes.bfloat16).astype(np.float32)
    if entry.dtype == "int8":
        return values.astype(np.float32) * arrays["scale"][..., None]
    if entry.dtype == "float32":
        return values
    raise InputError(f"{entry.name} holds the codes of a dictionary, not activations; read them as codes")
