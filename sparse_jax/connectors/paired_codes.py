"""Codes of the same tokens at several sites: what connectors are learnt from.

    codes = SiteCodes("resid_pre.3", 2048, values, indices)           [tokens, slots], a value of 0 is an empty slot
    store = CodeStore({"resid_pre.3": codes, "mlp_out.3": ...}, tokens)
    pair  = store.pair(["resid_pre.3"], "mlp_out.3")                  several inputs stand side by side
    train, held_out = pair.split(held_out=0.1, seed=0)                by documents

Codes are in the units of each dictionary (of activations as its normaliser leaves them). A raw site is codes of which
every slot is used: `raw_site`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes


@dataclass(frozen=True, eq=False)
class SiteCodes:
    """Sparse codes at one site, or at several that stand side by side. Numpy, host (memory maps allowed).

    Attributes:
        name: `str(Site)`; several sites are joined by "+".
        n_features: features, or numbers of a raw site.
        values: `[tokens, slots]` float32; 0 is an empty slot.
        indices: `[tokens, slots]` integers, any valid number in an empty slot.
        overflow: active features, over all tokens, that found no slot and are missing.
    """

    name: str
    n_features: int
    values: np.ndarray
    indices: np.ndarray
    overflow: int = 0

    def __post_init__(self):
        if self.values.shape != self.indices.shape or self.values.ndim != 2:
            raise InputError(
                f"{self.name}: values {self.values.shape} and indices {self.indices.shape} of codes: give two equal "
                "shapes [tokens, slots]"
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def slots(self) -> int:
        """Features that a token can have active."""
        return self.values.shape[1]

    def at(self, rows: np.ndarray | slice) -> SparseCodes:
        """Codes of some tokens."""
        return SparseCodes(
            np.ascontiguousarray(self.values[rows], np.float32), np.ascontiguousarray(self.indices[rows], np.int32)
        )

    def dense(self, rows: np.ndarray | slice) -> np.ndarray:
        """`[tokens, n_features]` float32, with their zeros."""
        values, indices = self.at(rows)
        out = np.zeros((len(values), self.n_features), np.float32)
        np.add.at(out, (np.arange(len(values))[:, None], indices), values)
        return out

    def of_features(self, kept: np.ndarray) -> "SiteCodes":
        """Codes of the features `kept` alone, numbered by their place there; each once."""
        place = np.full(self.n_features, -1, np.int64)
        place[kept] = np.arange(len(kept))
        at = place[np.asarray(self.indices)]
        values = np.where(at >= 0, self.values, 0).astype(np.float32)
        return SiteCodes(self.name, len(kept), values, np.maximum(at, 0).astype(np.int32))


def raw_site(name: str, x: np.ndarray) -> SiteCodes:
    """A site's own numbers `[tokens, width]` as codes: each is a feature, each slot is used."""
    indices = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape)
    return SiteCodes(name, x.shape[1], x, indices)


def joined(sites: Sequence[SiteCodes]) -> SiteCodes:
    """Codes of several sites side by side; the features of each begin where those of the one before end."""
    if len(sites) == 1:
        return sites[0]
    starts = np.cumsum([0, *(site.n_features for site in sites[:-1])])
    return SiteCodes(
        "+".join(site.name for site in sites),
        sum(site.n_features for site in sites),
        np.concatenate([site.values for site in sites], axis=1),
        np.concatenate([np.asarray(site.indices, np.int32) + start for site, start in zip(sites, starts)], axis=1),
        sum(site.overflow for site in sites),
    )


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where tokens stand, `[tokens]` each. Only tokens that the mask lets count are here.

    Attributes:
        token: int32 id.
        document: int32 number of its document.
        row: int64 number of its row of text.
        position: int32 position in that row.
    """

    token: np.ndarray
    document: np.ndarray
    row: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.token)

    def at(self, rows: np.ndarray | slice) -> "Tokens":
        """Some of them."""
        return Tokens(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclass(frozen=True, eq=False)
class Pair:
    """Inputs and targets of the same tokens.

    Attributes:
        inputs, targets: codes.
        tokens: where they stand.
    """

    inputs: SiteCodes
    targets: SiteCodes
    tokens: Tokens

    def __post_init__(self):
        if not len(self.inputs) == len(self.targets) == len(self.tokens):
            raise InputError(
                f"{len(self.inputs)} input codes, {len(self.targets)} target codes, {len(self.tokens)} tokens: give as "
                "many of each"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, rows: np.ndarray | slice) -> "Pair":
        """Some of the tokens."""
        sides = (
            dataclasses.replace(side, values=side.values[rows], indices=side.indices[rows], overflow=0)
            for side in (self.inputs, self.targets)
        )
        return Pair(*sides, self.tokens.at(rows))

    def split(self, held_out: float, seed: int = 0) -> tuple["Pair", "Pair"]:
        """(training, held-out) tokens: whole documents, drawn until their share of tokens reaches `held_out`.

        Raises:
            InputError: a share outside (0, 1), or fewer than two documents.
        """
        if not 0 < held_out < 1:
            raise InputError(f"a held-out share of {held_out}: give one between 0 and 1")
        documents, inverse, counts = np.unique(self.tokens.document, return_inverse=True, return_counts=True)
        if len(documents) < 2:
            raise InputError(f"{len(documents)} document(s): a held-out share by documents needs two")
        order = np.random.default_rng(seed).permutation(len(documents))
        reached = int(np.searchsorted(np.cumsum(counts[order]), held_out * len(self))) + 1
        out = np.zeros(len(documents), bool)
        out[order[: min(reached, len(documents) - 1)]] = True
        return self.at(np.flatnonzero(~out[inverse])), self.at(np.flatnonzero(out[inverse]))


@dataclass(frozen=True, eq=False)
class CodeStore:
    """Codes of the same tokens at several sites.

    Attributes:
        sites: name -> codes.
        tokens: where they stand.
    """

    sites: dict[str, SiteCodes]
    tokens: Tokens

    def pair(self, inputs: Sequence[str], target: str) -> Pair:
        """Inputs (one site, or several side by side) and a target.

        Raises:
            InputError: a site is not here.
        """
        if missing := [name for name in (*inputs, target) if name not in self.sites]:
            raise InputError(f"no codes of {', '.join(missing)}; there are those of {', '.join(self.sites)}")
        return Pair(joined([self.sites[name] for name in inputs]), self.sites[target], self.tokens)
