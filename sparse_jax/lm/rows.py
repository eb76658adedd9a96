"""A text as rows of tokens, with targets and the mask; `packing` makes them of documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sparse_jax.lm.order import row_indices
from sparse_jax.lm.row_cuts import Cuts


class RowBatch(NamedTuple):
    """Some rows; `...` is the shape of the indices they were asked for with.

    tokens: the ids.
    targets: the id that follows each token in the stream; -1 behind the end of a short row and in an empty one.
    mask: True where a position counts. False for padding, separators and begin-of-text tokens, for the first
        `skip_positions` of each row, for what has counted in an earlier row and for all of an empty row. CE and KL
        average the predictions made at True.
    document: the place in `Rows.documents` of the document each token belongs to; -1 where there is no token.
    """

    tokens: Int32[np.ndarray, "*batch context"]
    targets: Int32[np.ndarray, "*batch context"]
    mask: Bool[np.ndarray, "*batch context"]
    document: Int32[np.ndarray, "*batch context"]


@dataclass(frozen=True, eq=False)
class Rows:
    """A text cut into rows of `context` tokens; make it with `packing.pack`, index it for tokens.

    stream: [tokens] all tokens in order, uint16 where the vocabulary allows, else int32. The last token is only a
        target.
    document_starts: [n_documents] where in the stream each document's separator stands, ascending.
    documents: [n_documents] their names. Only documents with a token in some row are here.
    context: tokens in a row.
    skip_positions: positions at the start of each row that the mask leaves out.
    masked_ids: ids that the mask leaves out wherever they stand.
    bos_id: the id at the start of each row; None if rows are cut from the stream alone.
    fill_id: the id that stands behind the end of a short row, and in empty rows.
    n_dropped: tokens that were read and stand in no row: the ragged rest, what lay beyond the limit, separators of
        documents that are cut apart.
    cuts: where each row stands in the stream; None: they follow each other, `width` tokens each.
    documents_before: how many documents of the text end before the first row; above 0 in windows only.
    """

    stream: np.ndarray
    document_starts: Int64[np.ndarray, " documents"]
    documents: Sequence[str]
    context: int
    skip_positions: int
    masked_ids: tuple[int, ...]
    bos_id: int | None
    fill_id: int
    n_dropped: int
    cuts: Cuts | None = None
    documents_before: int = 0

    @property
    def width(self) -> int:
        """Tokens of the stream in each row: `context`, or one less where each begins with a begin-of-text token."""
        return self.context - (self.bos_id is not None)

    @property
    def n_rows(self) -> int:
        return (len(self.stream) - 1) // self.width if self.cuts is None else len(self.cuts.starts)

    @property
    def n_tokens(self) -> int:
        """Positions of all rows together: begin-of-text tokens, masked, repeated and filled ones included."""
        return self.n_rows * self.context

    def __len__(self) -> int:
        return self.n_rows

    @property
    def window_rows(self) -> None:
        """The order is permuted as a whole (a `RowStream`'s within windows)."""
        return None

    def reach(self, end: int) -> int:
        """`end`, or the number of rows where there are fewer."""
        return min(end, self.n_rows)

    def ordered(self, seed: int, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """The rows at places start .. start + count - 1 of the order that a seed gives: see `order.row_indices`."""
        return row_indices(self.n_rows, seed, start, count)

    def __getitem__(self, indices: int | slice | Int64[np.ndarray, "*batch"]) -> RowBatch:
        """The rows at `indices`, an integer, a slice or integers of any shape; -1 is an empty row.

        An empty row fills a ragged last batch up to a fixed shape: no position of it counts. Raises IndexError for
        an index below -1 or not below `n_rows`, TypeError for anything but integers.
        """
        index = checked_indices(indices, self.n_rows)
        inside = np.maximum(index, 0)
        offsets = np.arange(self.width + 1)
        if self.cuts is None:
            starts, lengths, repeated = inside * self.width, np.full(index.shape, self.width), np.zeros(index.shape)
        else:
            starts, lengths, repeated = (values[inside] for values in self.cuts)
        lengths = np.where(index < 0, 0, lengths)[..., None]
        # Behind the end of a short last row there may be no token: what is read there is replaced below.
        places = np.minimum(starts[..., None] + offsets, len(self.stream) - 1)
        window = self.stream[places].astype(np.int32)
        there = offsets[:-1] < lengths
        tokens = np.where(there, window[..., :-1], np.int32(self.fill_id))
        targets = np.where(there, window[..., 1:], np.int32(-1))
        fresh = there & (offsets[:-1] >= repeated[..., None])
        document = np.searchsorted(self.document_starts, places[..., :-1], side="right").astype(np.int32) - 1
        document = np.where(there, document, np.int32(-1))
        if self.bos_id is not None:
            real = there[..., :1]
            bos = np.where(real, np.int32(self.bos_id), np.int32(self.fill_id))
            targets = np.concatenate([np.where(real, tokens[..., :1], np.int32(-1)), targets], -1)
            tokens = np.concatenate([bos, tokens], -1)
            # It stands for no token of the text, and counts where it is not masked as what it is: in no other row.
            fresh = np.concatenate([real, fresh], -1)
            document = np.concatenate([document[..., :1], document], -1)
        counts = (np.arange(self.context) >= self.skip_positions) & ~np.isin(tokens, self.masked_ids) & fresh
        return RowBatch(tokens, targets, counts, document)


def checked_indices(indices, n_rows: int) -> Int64[np.ndarray, "*batch"]:
    """What `Rows` is indexed with, as integers; raises what `Rows.__getitem__` does."""
    if isinstance(indices, slice):
        indices = np.arange(n_rows)[indices]
    index = np.asarray(indices)
    if index.size and index.dtype.kind not in "iu":
        raise TypeError(f"rows are indexed by integers, not by {index.dtype}")
    index = index.astype(np.int64)
    if index.size and (index.min() < -1 or index.max() >= n_rows):
        raise IndexError(f"rows {index.min()} to {index.max()} of {n_rows}; give 0 to {n_rows - 1}, or -1")
    return index
