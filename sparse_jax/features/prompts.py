"""Prompts as rows of one length, each with the places that count: what searches by prompts read.

Prompts are filled up on the right. A causal model does not see what comes later, so padding changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from sparse_jax.errors import InputError
from sparse_jax.features.counted_codes import BATCH_ROWS


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of at most `length` tokens.

    Attributes:
        tokens: `[prompts, length]` ids; any valid id behind the end.
        mask: `[prompts, length]` places that count: neither padding nor among the first `skip_positions`, nor of ids
            that never count.
        last: `[prompts]` position of the last token.
    """

    tokens: Int32[np.ndarray, "prompts length"]
    mask: Bool[np.ndarray, "prompts length"]
    last: Int32[np.ndarray, " prompts"]

    def __len__(self) -> int:
        return len(self.tokens)


def make_prompts(
    ids: Sequence[np.ndarray],
    *,
    longest: int,
    bos_id: int | None = None,
    skip_positions: int = 1,
    masked_ids: Sequence[int] = (),
    length: int | None = None,
) -> Prompts:
    """Prompts from their token ids.

    Args:
        ids: of each prompt, without a begin-of-text token.
        longest: positions that the model has.
        bos_id: put before each prompt, where the model has always seen it; None: nothing.
        skip_positions: positions at the start that do not count (attention sinks), as in the dictionary's training.
        masked_ids: ids that never count.
        length: positions of all rows; None: as many as the longest prompt needs.

    Raises:
        InputError: no prompts, an empty one, one that is too long, or one of which no place counts.
    """
    if not len(ids):
        raise InputError("there are no prompts; give at least one")
    start = [] if bos_id is None else [bos_id]
    rows = [np.concatenate([np.array(start, np.int32), np.asarray(row, np.int32)]) for row in ids]
    room = longest if length is None else min(longest, length)
    for i, row in enumerate(rows):
        if len(ids[i]) == 0:
            raise InputError(f"prompt {i + 1} is empty")
        if len(row) > room:
            raise InputError(f"prompt {i + 1} has {len(row)} tokens: there is room for {room}")
    width = length or max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, skip_positions : len(row)] = True
    mask &= ~np.isin(tokens, np.asarray(tuple(masked_ids), np.int32))
    if not mask.any(axis=1).all():
        raise InputError(
            f"prompt {1 + int(np.argmin(mask.any(axis=1)))} has no token that counts: the first {skip_positions} "
            "positions and separators never do"
        )
    return Prompts(tokens, mask, np.array([len(row) - 1 for row in rows], np.int32))


def prompt_batches(prompts: Prompts, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[np.ndarray, Prompts]]:
    """(numbers, prompts) in batches of one shape; the last is filled up with rows, number -1, that never count."""
    padded = np.concatenate([np.arange(len(prompts)), np.full(-len(prompts) % batch_rows, -1)])
    for start in range(0, len(padded), batch_rows):
        part = padded[start : start + batch_rows]
        mask = prompts.mask[part] & (part >= 0)[:, None]
        yield part, Prompts(prompts.tokens[part], mask, prompts.last[part])
