"""The Matryoshka BatchTopK sparse autoencoder. Source: Bussmann et al. 2025 (loss over nested prefixes).

    c       as BatchTopK's, selected once over all features
    x_hat_m = sum over i < m of c_i W_dec_i + b_dec           for each prefix of m features
    loss    = sum over prefixes m of ||x - x_hat_m||^2 + AuxK on what the full dictionary leaves

The first features must reconstruct without the later ones, and so stay general instead of leaving their special cases
to others (feature absorption). The sum is the paper's, and SAELens'; dictionary_learning takes the mean (and divides by
the number of prefixes once more by its default weights). The last prefix is the whole dictionary and is the term
"reconstruction", comparable with other architectures'; the term "prefixes" is the sum of the others. A prefix has the
features of the one selection, as in SAELens and dictionary_learning.

Cost: the blocks between prefixes are decoded one by one and added up, together as much as one full product.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparse_jax.dictionaries.batch_topk import BatchTopK
from sparse_jax.dictionaries.protocol import Batch, Context, Losses, Params, firings, reconstruction_loss, register
from sparse_jax.errors import InputError
from sparse_jax.numerics import matmul
from sparse_jax.numerics.axes import FEATURES, parts

# Chunks that a device may have for each prefix: their reconstructions are in memory together.
_CHUNKS = 2


@register("matryoshka")
@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose prefixes reconstruct by themselves (Bussmann et al. 2025).

    Attributes:
        prefixes: shares of the features that the nested dictionaries have, rising to 1; the paper's sizes of 2,048,
            6,144, 14,336, 30,720 and 65,536.
    """

    prefixes: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)

    def __post_init__(self):
        # JSON knows no tuples, and a list would make the dictionary unhashable.
        object.__setattr__(self, "prefixes", tuple(float(share) for share in self.prefixes))
        super().__post_init__()
        rising = all(a < b for a, b in zip((0.0, *self.prefixes), self.prefixes))
        if not rising or self.prefixes[-1:] != (1.0,):
            raise InputError(f"--prefixes {self.prefixes}: give shares of the features that rise, the last of them 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features in each prefix; in a very small dictionary two prefixes may be one."""
        return tuple(sorted({max(1, round(share * self.n_features)) for share in self.prefixes}))

    def prefix_reconstructions(self, params: Params, codes: jax.Array) -> list[jax.Array]:
        """`[rows, d_out]` of each prefix, the full one last."""
        if parts(FEATURES) > 1:
            return self._prefixes_over_devices(params, codes)
        y_hat, start, made = params["b_dec"], 0, []
        for end in self.sizes:
            y_hat = y_hat + matmul(codes[:, start:end], params["W_dec"][start:end], self.compute_dtype)
            made.append(y_hat)
            start = end
        return made

    def _prefixes_over_devices(self, params: Params, codes: jax.Array) -> list[jax.Array]:
        """The same where features lie over devices: no code leaves its device.

        A slice of the features would be moved from the devices that hold it to all. In its place features are cut into
        chunks that neither a prefix nor a device divides; each is decoded where it lies, and added to the prefixes that
        have it. Where such chunks would be many, each prefix takes a product of its own, with other codes set to 0.
        """
        ends = jnp.array(self.sizes, jnp.int32)
        chunk = math.gcd(*self.sizes, self.n_features // parts(FEATURES))
        if self.n_features // chunk > _CHUNKS * len(self.sizes) * parts(FEATURES):
            inside = jnp.arange(self.n_features, dtype=jnp.int32) < ends[:, None]
            return [self.decode(params, jnp.where(each, codes, 0)) for each in inside]
        cut = codes.reshape(len(codes), -1, chunk).swapaxes(0, 1)
        atoms = params["W_dec"].reshape(-1, chunk, self.d_out)
        decoded = jax.vmap(lambda codes, atoms: matmul(codes, atoms, self.compute_dtype))(cut, atoms)
        inside = jnp.arange(0, self.n_features, chunk, dtype=jnp.int32) < ends[:, None]
        return [jnp.sum(jnp.where(each[:, None, None], decoded, 0), axis=0) + params["b_dec"] for each in inside]

    def loss(self, params: Params, batch: Batch, ctx: Context) -> Losses:
        """Terms "reconstruction" (of all), "prefixes" (the smaller ones summed) and "aux_k"; moves the threshold."""
        values = self.preactivations(params, batch.x)
        codes = self.batch_codes(values, batch.weight, ctx)
        *inner, y_hat = self.prefix_reconstructions(params, codes)
        terms = {
            "reconstruction": reconstruction_loss(y_hat, batch),
            "prefixes": sum((reconstruction_loss(each, batch) for each in inner), jnp.zeros((), y_hat.dtype)),
            "aux_k": self.aux_k_term(params, values, batch.target - y_hat, batch, ctx),
        }
        frozen = {"threshold": self.moved_threshold(params["threshold"], codes, ctx)}
        return Losses(terms, y_hat, firings(codes, batch.weight), frozen)
