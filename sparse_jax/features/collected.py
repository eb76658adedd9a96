"""What one pass over a text says of every feature of a dictionary: host arrays that merge, and that are saved whole."""

import dataclasses
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.features.coactive import Coactive
from sparse_jax.features.places import Places, across_quantiles, drawn, merged, strongest
from sparse_jax.features.token_counts import TokenCounts

# A feature with at least so many firings, of which more than this share are at starts of rows, is an outlier feature.
OUTLIER_FIRINGS, OUTLIER_SHARE = 10, 0.5


@dataclass(frozen=True, eq=False)
class Collected:
    """What `collect` found; `n` features, c = max(code, 0). See `collect` for what counts as a firing.

    Attributes:
        tokens: tokens that counted.
        fired: `[n]` int64 firings.
        sums: `[4, n]` float64: sums of c, c^2, c^3, c^4 over all tokens that count.
        maximum: `[n]` float32 largest code; 0 where it never fires.
        first: `[n]` int64 firings at the first position of a row that counts.
        first_delimiters: `[n]` int64 firings on the first delimiter of a row that counts and is not at `first`.
        delimiters: `[n]` int64 firings on delimiter tokens, wherever they stand.
        top: the strongest places, strongest first, of each row one at most.
        sample: a uniform sample of all firings of the feature, in random order.
        token_counts: on which tokens it fires, how often, how strongly.
        coactive: features that fire together, from a uniform sample of tokens.
        rows: `[rows]` int64, which rows of the text were read, ascending.
        seed: decides the samples.
    """

    tokens: int
    fired: np.ndarray
    sums: np.ndarray
    maximum: np.ndarray
    first: np.ndarray
    first_delimiters: np.ndarray
    delimiters: np.ndarray
    top: Places
    sample: Places
    token_counts: TokenCounts
    coactive: Coactive
    rows: np.ndarray
    seed: int

    @property
    def n_features(self) -> int:
        return len(self.fired)

    @property
    def density(self) -> np.ndarray:
        """`[n]` float64: share of the tokens that count on which the feature fires."""
        return self.fired / max(1, self.tokens)

    @property
    def mean(self) -> np.ndarray:
        """`[n]` float64: mean code where the feature fires; 0 where it never does."""
        return self.sums[0] / np.maximum(self.fired, 1)

    @property
    def variance(self) -> np.ndarray:
        """`[n]` float64: of c over all tokens that count, those where it is 0 included."""
        return self._central()[1]

    @property
    def skew(self) -> np.ndarray:
        """`[n]` float64: third central moment over all tokens / variance^1.5; 0 where the variance is 0."""
        return self._standardised(3)

    @property
    def kurtosis(self) -> np.ndarray:
        """`[n]` float64: fourth central moment over all tokens / variance^2 (3 for a normal distribution); or 0."""
        return self._standardised(4)

    def _central(self) -> tuple[np.ndarray, ...]:
        """Mean and the second to fourth central moments over all tokens."""
        m1, m2, m3, m4 = self.sums / max(1, self.tokens)
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        return m1, np.maximum(m2 - m1**2, 0), third, m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4

    def _standardised(self, power: int) -> np.ndarray:
        central = self._central()
        variance = central[1]
        # Below the rounding of the sums there is no variance: the feature is constant, or silent.
        varies = variance > 1e-12 * self.sums[1] / max(1, self.tokens)
        return np.where(varies, central[power - 1], 0) / np.where(varies, variance, 1) ** (power / 2)

    @property
    def outlier(self) -> np.ndarray:
        """`[n]` bool: outlier features, that fire where attention sinks stand rather than on a meaning.

        Of at least 10 firings more than half are at the first position of a row that counts or on its first delimiter.
        A feature of full stops fires on all of a row's full stops and is none.
        """
        share = (self.first + self.first_delimiters) / np.maximum(self.fired, 1)
        return (self.fired >= OUTLIER_FIRINGS) & (share > OUTLIER_SHARE)

    def quantile_samples(self, quantiles: int = 10, per_quantile: int = 2, *, distinct_rows: bool = False) -> Places:
        """Places drawn uniformly from each quantile of a feature's firings: `[n, quantiles, per_quantile]`.

        The lowest quantile first; see `places.across_quantiles`.
        """
        return across_quantiles(self.sample, quantiles, per_quantile, distinct_rows=distinct_rows)

    def merge(self, other: "Collected") -> "Collected":
        """What would have been collected of both texts at once; of parts of one text that share no row.

        Raises:
            InputError: they share rows, or were collected with other seeds, edges, features or sizes.
        """
        self._check_merges(other)
        counts = ("tokens", "fired", "sums", "first", "first_delimiters", "delimiters")
        return Collected(
            **{name: getattr(self, name) + getattr(other, name) for name in counts},
            maximum=np.maximum(self.maximum, other.maximum),
            top=merged(self.top, other.top, strongest, self.seed),
            sample=merged(self.sample, other.sample, drawn, self.seed),
            token_counts=self.token_counts.merge(other.token_counts),
            coactive=self.coactive.merge(other.coactive, self.seed),
            rows=np.union1d(self.rows, other.rows),
            seed=self.seed,
        )

    def _check_merges(self, other: "Collected") -> None:
        if len(common := np.intersect1d(self.rows, other.rows)):
            raise InputError(f"both parts hold row {common[0]} of the text ({len(common)} in all): give disjoint parts")
        for name, of in _SIZES.items():
            if of(self) != of(other):
                raise InputError(f"parts of {name} {of(self)} and {of(other)} do not merge: collect them alike")

    def save(self, path: Path) -> None:
        """Write as `.npz`, whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial.npz")
        try:
            np.savez(temporary, **_flat(self))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Collected":
        """Read what `save` wrote.

        Raises:
            InputError: there is none, or it is damaged or another file.
        """
        try:
            with np.load(path, allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            parts = {name: _part(kind, name, arrays) for name, kind in _PARTS.items()}
            plain = {name: arrays[name] for name in cls.__dataclass_fields__ if name not in parts}
        except FileNotFoundError:
            raise InputError(f"{path} is not there: give a file that `Collected.save` wrote") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} cannot be read as what was collected of features: {error}") from error
        return cls(**parts, **{name: int(a) if a.ndim == 0 else a for name, a in plain.items()})


_SIZES = {
    "seed": lambda c: c.seed,
    "features": lambda c: c.n_features,
    "top": lambda c: c.top.values.shape[1],
    "sample": lambda c: c.sample.values.shape[1],
    "co-active tokens": lambda c: c.coactive.limit,
}
_PARTS = {"top": Places, "sample": Places, "token_counts": TokenCounts, "coactive": Coactive}


def _fields(kind) -> tuple[str, ...]:
    return kind._fields if hasattr(kind, "_fields") else tuple(field.name for field in dataclasses.fields(kind))


def _flat(collected: Collected) -> dict[str, np.ndarray]:
    """Every array by a name of its own."""
    made = {}
    for name in _fields(Collected):
        value = getattr(collected, name)
        parts = {f"{name}.{part}": getattr(value, part) for part in _fields(_PARTS[name])} if name in _PARTS else None
        made |= parts or {name: value}
    return {name: np.asarray(value) for name, value in made.items()}


def _part(kind, name: str, arrays: dict[str, np.ndarray]):
    values = {part: arrays[f"{name}.{part}"] for part in _fields(kind)}
    return kind(**{part: int(a) if a.ndim == 0 else a for part, a in values.items()})
