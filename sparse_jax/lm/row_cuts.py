"""Where rows of text begin and end in a stream of tokens: cut across documents or within each, apart or overlapping.

    joined      one row after the other through the whole stream, `stride` tokens apart, whatever documents they cross
    documents   each document apart: rows begin with it (without the separator before it), `stride` tokens apart, until
                its last token has stood in one; the last row may be short

Where the stride is less than a row, rows overlap. A token then counts only in the first row that it stands in, so that
every token still counts once, and all but those of the first row have at least width - stride tokens before them.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

Packing = Literal["joined", "documents"]


class Cuts(NamedTuple):
    """Rows as places in a stream.

    starts: [rows] where each begins.
    lengths: [rows] its tokens, `width` or, at the end of a document, fewer.
    repeated: [rows] how many of its first tokens have stood in the row before.
    """

    starts: Int64[np.ndarray, " rows"]
    lengths: Int32[np.ndarray, " rows"]
    repeated: Int32[np.ndarray, " rows"]

    def part(self, rows: slice) -> "Cuts":
        """Some of the rows."""
        return Cuts(*(values[rows] for values in self))

    def moved(self, by: int) -> "Cuts":
        """The same rows in a stream that begins `by` tokens later."""
        return self._replace(starts=self.starts - by)


def no_cuts() -> Cuts:
    """No row."""
    return Cuts(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))


def together(several: list[Cuts]) -> Cuts:
    """The rows of all, in this order."""
    return Cuts(*(np.concatenate(values) for values in zip(no_cuts(), *several)))


def joined_cuts(first: int, length: int, width: int, stride: int, *, overlaps: bool) -> Cuts:
    """The rows from place `first` on that fit into a stream of `length` tokens with the token after each.

    overlaps: a row stands before the first of these, `stride` tokens earlier.
    """
    count = max(0, (length - first - width - 1) // stride + 1)
    starts = first + stride * np.arange(count, dtype=np.int64)
    repeated = np.full(count, width - stride, np.int32)
    if count and not overlaps:
        repeated[0] = 0
    return Cuts(starts, np.full(count, width, np.int32), repeated)


def document_cuts(start: int, length: int, width: int, stride: int, skip: int) -> Cuts:
    """The rows of a document of `length` tokens that begins at place `start`.

    skip: the first tokens of a row that never count; a document of no more than these makes no row.
    """
    if length <= skip:
        return no_cuts()
    count = 1 + max(0, -(-(length - width) // stride))
    offsets = stride * np.arange(count, dtype=np.int64)
    lengths = np.minimum(width, length - offsets).astype(np.int32)
    repeated = np.full(count, width - stride, np.int32)
    repeated[0] = 0
    return Cuts(start + offsets, lengths, repeated)
