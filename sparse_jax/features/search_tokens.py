r"""Search by tokens or by a regular expression: which features fire where a target holds?

    target = token_target([tokenizer.encode([" king"])[0][0]])
    target = regex_target(r"“[^”]*”", tokenizer.token_strings(range(vocab_size)))
    sums = target_sums(lm, coder, site, text, numbers, target)
    best = ranking(sums.scores().f1[:, 0])

A target says for every place of a row whether it holds. Only sums are kept, so the text may be of any length, and sums
of parts add up (`merge`). Masked places count for nothing, nor do those whose activation
exceeds `max_norm`.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from sparse_jax.dictionaries import Normalised
from sparse_jax.errors import InputError
from sparse_jax.features.counted_codes import BATCH_ROWS, counted_codes, row_batches
from sparse_jax.features.target_scores import Scores, scores_of
from sparse_jax.lm.model import LanguageModel
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.sites import Site

# Token ids of rows -> [rows, position, targets], where each target holds.
Target = Callable[[Int32[np.ndarray, "rows position"]], Bool[np.ndarray, "rows position targets"]]


class TargetSums(NamedTuple):
    """Sums over the places that count.

    Attributes:
        places: how many count.
        target: at how many of them each target holds.
        fired: at how many each feature fires.
        sums, squares: of each feature's activation, 0 where it does not fire.
        hits: at how many places feature and target agree.
        hit_sums: sum of the activation at the target's places.
    """

    places: Int64[np.ndarray, ""]
    target: Int64[np.ndarray, " targets"]
    fired: Int64[np.ndarray, " features"]
    sums: Float64[np.ndarray, " features"]
    squares: Float64[np.ndarray, " features"]
    hits: Int64[np.ndarray, "features targets"]
    hit_sums: Float64[np.ndarray, "features targets"]

    def merge(self, other: "TargetSums") -> "TargetSums":
        """The sums of both parts."""
        return TargetSums(*(a + b for a, b in zip(self, other)))

    def scores(self) -> Scores:
        """Each `[features, targets]`."""
        return scores_of(
            int(self.places),
            self.target,
            self.fired[:, None],
            self.sums[:, None],
            self.squares[:, None],
            self.hits,
            self.hit_sums,
        )


def token_target(ids: Iterable[int]) -> Target:
    """Holds where the token is one of these."""
    wanted = np.asarray(sorted(ids), np.int32)
    return lambda tokens: np.isin(tokens, wanted)[..., None]


def regex_target(pattern: str, strings: list[str], *, ends: bool = False) -> Target:
    """Holds at the tokens that a match of the expression overlaps, in the text of the row.

    Args:
        pattern: of Python's `re`; "." matches newlines too. Matches of no length are passed over.
        strings: how each token of the vocabulary is written (`Tokenizer.token_strings`).
        ends: only at the token in which a match ends.

    Raises:
        InputError: not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"regular expression {pattern!r}: {error}") from error
    lengths = np.array([len(string) for string in strings])

    def of_row(row: np.ndarray) -> np.ndarray:
        text, stops = "".join(strings[i] for i in row), np.cumsum(lengths[row])
        holds = np.zeros(len(row), bool)
        for match in compiled.finditer(text):
            if match.end() > match.start():
                # The tokens that hold the first and the last character of the match.
                first, last = np.searchsorted(stops, [match.start(), match.end() - 1], side="right")
                holds[last if ends else first : last + 1] = True
        return holds

    return lambda tokens: np.stack([of_row(row) for row in tokens])[..., None]


@partial(jax.jit, static_argnames=("site",))
def _batch_sums(lm, coder, tokens, mask, holds, max_norm, site) -> TargetSums:
    codes, counted = counted_codes(lm, coder, tokens, mask, max_norm, site)
    codes = codes.reshape(-1, codes.shape[-1])
    holds = (holds & counted[..., None]).reshape(len(codes), -1).astype(jnp.float32)
    fires = (codes > 0).astype(jnp.float32)
    # Whole numbers below 2^24 are exact in float32.
    hits = jnp.matmul(fires.T, holds, precision=jax.lax.Precision.HIGHEST)
    return TargetSums(
        places=jnp.sum(counted, dtype=jnp.int32),
        target=jnp.sum(holds > 0, axis=0, dtype=jnp.int32),
        fired=jnp.sum(codes > 0, axis=0, dtype=jnp.int32),
        sums=jnp.sum(codes, axis=0),
        squares=jnp.sum(codes * codes, axis=0),
        hits=hits.astype(jnp.int32),
        hit_sums=jnp.matmul(codes.T, holds, precision=jax.lax.Precision.HIGHEST),
    )


def target_sums(
    lm: LanguageModel,
    coder: Normalised,
    site: Site,
    text: Rows,
    numbers: Int64[np.ndarray, " rows"],
    target: Target,
    *,
    max_norm: float = float("inf"),
    batch_rows: int = BATCH_ROWS,
) -> TargetSums:
    """Run the text through model and encoder, and sum how each feature agrees with each target.

    Args:
        lm, site, coder: model, place, dictionary.
        text, numbers: which rows of which text; at least one.
        target: where each target holds.
        max_norm: places with a larger activation do not count.
        batch_rows: rows at once, a multiple of 8 or fewer.
    """
    total = None
    for _, rows in row_batches(text, numbers, batch_rows):
        found = _batch_sums(
            lm,
            coder,
            jnp.array(rows.tokens),
            jnp.array(rows.mask),
            jnp.array(target(rows.tokens)),
            jnp.float32(max_norm),
            site,
        )
        whole = TargetSums(*(np.asarray(v, np.int64 if v.dtype == jnp.int32 else np.float64) for v in found))
        total = whole if total is None else total.merge(whole)
    return total
