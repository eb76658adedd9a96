"""What a linear connector depends on: sums of products of codes, for each block of documents.

    G = F1' F1 [n1, n1]     C = F1' F2 [n1, n2]     sums of F1, F2, F2^2     the number of tokens

Sums over disjoint tokens add up, so moments merge, and a bootstrap over documents is a weighted sum of blocks:

    m = moments(train, blocks=20)
    m.total()                      one block, float64
    m.total(weights)               as if block b stood there weights[b] times

Some 30 of 2,048 codes are active: on a CPU the products are those of sparse matrices, a quarter of the time of dense
float32 ones there (and 9 times as fast as dense float64). Accelerators take dense products of chunks of tokens.
"""

import os
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from sparse_jax.connectors.document_blocks import document_blocks
from sparse_jax.connectors.paired_codes import Pair, SiteCodes
from sparse_jax.errors import InputError
from sparse_jax.numerics import sparse_codes
from sparse_jax.numerics.sparse_codes import SparseCodes

Method = Literal["sparse", "dense"]
# Tokens at once.
SPARSE_TOKENS, DENSE_TOKENS = 65_536, 4_096
# A product of two active codes takes as long as so many of dense float32 matrices (n 2,048, 32 active, on a CPU).
_SPARSE_COST = 1_000
_SUMS = ("count", "gram", "cross", "input_sum", "target_sum", "target_square", "input_fired", "target_fired")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the tokens of each block. `n1` inputs, `n2` targets. Host arrays.

    Attributes:
        count: `[blocks]` int64 tokens.
        gram: `[blocks, n1, n1]` sums of F1_i F1_k.
        cross: `[blocks, n1, n2]` sums of F1_i F2_j.
        input_sum: `[blocks, n1]` float64.
        target_sum, target_square: `[blocks, n2]` float64 sums of F2_j and F2_j^2.
        input_fired, target_fired: `[blocks, n1]`, `[blocks, n2]` int64 tokens where the code is not 0.
    """

    count: np.ndarray
    gram: np.ndarray
    cross: np.ndarray
    input_sum: np.ndarray
    target_sum: np.ndarray
    target_square: np.ndarray
    input_fired: np.ndarray
    target_fired: np.ndarray

    @property
    def blocks(self) -> int:
        return len(self.count)

    @property
    def n_inputs(self) -> int:
        return self.gram.shape[-1]

    @property
    def n_targets(self) -> int:
        return self.cross.shape[-1]

    def total(self, weights: np.ndarray | None = None) -> "Moments":
        """The sum of all blocks as one block, in float64; with `weights` `[blocks]` each counts so many times.

        Raises:
            InputError: not a weight for each block, or a negative one.
        """
        weights = np.ones(self.blocks) if weights is None else np.asarray(weights, np.float64)
        if weights.shape != (self.blocks,) or not (weights >= 0).all():
            raise InputError(
                f"weights of shape {weights.shape}: give one for each of {self.blocks} blocks, none below 0"
            )

        def added(name):
            values = getattr(self, name)
            out = np.zeros((1, *values.shape[1:]))
            for weight, block in zip(weights, values):
                if weight:  # one block after the other: their float64 copies would take blocks x n1 x (n1 + n2) x 8
                    out[0] += weight * block
            return out

        return Moments(**{name: added(name) for name in _SUMS})

    def merge(self, other: "Moments") -> "Moments":
        """The blocks of both, of tokens that share no document.

        Raises:
            InputError: other numbers of inputs or targets.
        """
        one, two = (self.n_inputs, self.n_targets), (other.n_inputs, other.n_targets)
        if one != two:
            raise InputError(f"moments of {one} and of {two} (inputs, targets) do not merge: give those of one pair")
        return Moments(**{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _SUMS})

    def save(self, path: Path) -> None:
        """Write as `.npz`, whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial.npz")
        try:
            np.savez(temporary, **{name: getattr(self, name) for name in _SUMS})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Read what `save` wrote.

        Raises:
            InputError: there is none, or it is damaged or another file.
        """
        try:
            with np.load(path, allow_pickle=False) as saved:
                return cls(**{name: saved[name] for name in _SUMS})
        except FileNotFoundError:
            raise InputError(f"{path} is not there: give a file that `Moments.save` wrote") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as moments of codes: {error}") from error


def moments(
    pair: Pair,
    blocks: int = 20,
    seed: int = 0,
    *,
    block_of: np.ndarray | None = None,
    dtype: type = np.float32,
    method: Method | None = None,
) -> Moments:
    """Moments of a pair's tokens. Memory: blocks x n1 x (n1 + n2) numbers of `dtype`, and 3 such blocks of float64.

    Args:
        pair: inputs and targets.
        blocks, seed: of documents, see `document_blocks`.
        block_of: `[tokens]` the block of each token, in place of those.
        dtype: of the kept `gram` and `cross`; each block is summed in float64 and then rounded to it.
        method: "sparse" or "dense" products; None: what is faster here.

    Raises:
        InputError: blocks or a method that cannot be.
    """
    block = document_blocks(pair.tokens.document, blocks, seed) if block_of is None else np.asarray(block_of)
    if block.shape != (len(pair),) or block.min(initial=0) < 0:
        raise InputError(f"blocks of shape {block.shape}: give a number >= 0 for each of {len(pair)} tokens")
    if method not in (None, "sparse", "dense"):
        raise InputError(f"method {method!r}: give 'sparse' or 'dense', or none")
    n_blocks, n1, n2 = int(block.max()) + 1, pair.inputs.n_features, pair.targets.n_features
    add = {"sparse": _add_sparse, "dense": _add_dense}[method or _faster(pair)]
    out = Moments(
        count=np.bincount(block, minlength=n_blocks).astype(np.int64),
        gram=np.zeros((n_blocks, n1, n1), dtype),
        cross=np.zeros((n_blocks, n1, n2), dtype),
        input_sum=np.zeros((n_blocks, n1)),
        target_sum=np.zeros((n_blocks, n2)),
        target_square=np.zeros((n_blocks, n2)),
        input_fired=np.zeros((n_blocks, n1), np.int64),
        target_fired=np.zeros((n_blocks, n2), np.int64),
    )
    size = SPARSE_TOKENS if add is _add_sparse else DENSE_TOKENS
    for number in range(n_blocks):
        rows = np.flatnonzero(block == number)
        gram, cross = np.zeros((n1, n1)), np.zeros((n1, n2))
        for start in range(0, len(rows), size):
            _add_chunk(out, number, pair, rows[start : start + size], size, add, gram, cross)
        out.gram[number], out.cross[number] = gram, cross
    return out


def _faster(pair: Pair) -> Method:
    """By counted products: those of active codes on a CPU, unless too many are active (a raw site)."""
    inputs, targets = pair.inputs, pair.targets
    active = inputs.slots * (inputs.slots + targets.slots)
    all_of_them = inputs.n_features * (inputs.n_features + targets.n_features)
    return "sparse" if jax.default_backend() == "cpu" and active * _SPARSE_COST < all_of_them else "dense"


def _add_chunk(out, number, pair, rows, size, add, gram, cross) -> None:
    """Add the sums of some tokens of a block."""
    inputs, targets = pair.inputs.at(rows), pair.targets.at(rows)
    for codes, n, total, square, fired in (
        (inputs, pair.inputs.n_features, out.input_sum, None, out.input_fired),
        (targets, pair.targets.n_features, out.target_sum, out.target_square, out.target_fired),
    ):
        indices, values = codes.indices.reshape(-1), codes.values.reshape(-1).astype(np.float64)
        total[number] += np.bincount(indices, values, n)
        fired[number] += np.bincount(indices[values != 0], minlength=n)
        if square is not None:
            square[number] += np.bincount(indices, values * values, n)
    add(inputs, targets, pair, size, gram, cross)


def csr(codes: SparseCodes, n_features: int, dtype: type = np.float32) -> sparse.csr_matrix:
    """`[rows, n_features]` as a SciPy matrix, without the empty slots."""
    rows, slots = codes.values.shape
    starts = np.arange(rows + 1, dtype=np.int64) * slots
    values = np.asarray(codes.values).reshape(-1).astype(dtype)
    made = sparse.csr_matrix((values, np.array(codes.indices).reshape(-1), starts), shape=(rows, n_features))
    made.eliminate_zeros()
    return made


def site_csr(site: SiteCodes, rows: np.ndarray | slice, dtype: type = np.float32) -> sparse.csr_matrix:
    """`csr` of some tokens of a site."""
    return csr(site.at(rows), site.n_features, dtype)


def _add_sparse(inputs, targets, pair, size, gram, cross) -> None:
    one = csr(inputs, pair.inputs.n_features, np.float64)
    transposed = one.T.tocsr()
    gram += (transposed @ one).toarray()
    cross += (transposed @ csr(targets, pair.targets.n_features, np.float64)).toarray()


@partial(jax.jit, static_argnames=("n_inputs", "n_targets"))
def _products(inputs, targets, n_inputs, n_targets):
    one = sparse_codes.dense(inputs, n_inputs)
    both = jnp.concatenate([one, sparse_codes.dense(targets, n_targets)], axis=1)
    return jnp.matmul(one.T, both, precision=jax.lax.Precision.HIGHEST)


def _add_dense(inputs, targets, pair, size, gram, cross) -> None:
    n1 = pair.inputs.n_features

    def filled(codes):
        """As many rows at each call: one compiled program."""
        missing = [(0, size - len(codes.values)), (0, 0)]
        return SparseCodes(*(jnp.array(np.pad(part, missing)) for part in codes))

    both = np.asarray(_products(filled(inputs), filled(targets), n1, pair.targets.n_features))
    gram += both[:, :n1]
    cross += both[:, n1:]


def one_block(given: Moments) -> Moments:
    """Its total, unless it is one float64 block already."""
    return given if given.blocks == 1 and given.gram.dtype == np.float64 else given.total()


def mean_square(given: Moments) -> tuple[np.ndarray, np.ndarray]:
    """(`[n1]` mean of F1_i^2, `[n2]` variance of F2_j), over all tokens of the blocks; float64.

    Raises:
        InputError: there are no tokens.
    """
    whole = one_block(given)
    tokens = float(whole.count[0])
    if tokens <= 0:
        raise InputError("moments of no tokens: give blocks with tokens")
    mean = whole.target_sum[0] / tokens
    return np.diagonal(whole.gram[0]) / tokens, np.maximum(whole.target_square[0] / tokens - mean**2, 0)
