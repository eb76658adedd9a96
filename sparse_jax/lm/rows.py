"""Packing: documents joined into one stream of tokens and cut into rows, with targets and the mask."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sparse_jax.errors import InputError
from sparse_jax.lm.documents import Document
from sparse_jax.lm.order import row_indices
from sparse_jax.lm.row_cuts import Cuts, Packing, document_cuts, joined_cuts, together
from sparse_jax.lm.tokenizer import Tokenizer

# Bytes of text that are encoded at once: enough to keep all cores busy, little beside the tokens of a run.
_GROUP_BYTES = 1 << 21


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
    """A text cut into rows of `context` tokens; make it with `pack`, index it for tokens.

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


@dataclass(frozen=True)
class Layout:
    """How documents become rows.

    context: tokens in a row, at least 2.
    skip_positions: positions at the start of each row that the mask leaves out (attention sinks stand there).
    bos: `row` puts the begin-of-text token at the start of each row, which then takes context - 1 tokens of the stream.
        `joining.row_bos` says which a model needs.
    stride: how many tokens lie between the beginnings of rows; None: rows do not overlap.
    packing: `joined` cuts the stream whatever documents a row crosses; `documents` begins a row with each document.
        See `row_cuts`.
    """

    context: int
    skip_positions: int = 1
    bos: Literal["none", "row"] = "none"
    stride: int | None = None
    packing: Packing = "joined"

    @property
    def width(self) -> int:
        """Tokens of the stream in a row."""
        return self.context - (self.bos == "row")

    @property
    def step(self) -> int:
        """Tokens of the stream from the beginning of one row to that of the next."""
        return self.width if self.stride is None else self.stride

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises InputError for what cannot be, before any text is read."""
        check_packing(tokenizer, self.context, self.skip_positions, bos=self.bos)
        if self.packing not in get_args(Packing):
            raise InputError(f"packing {self.packing!r}; give {' or '.join(get_args(Packing))}")
        if self.stride is not None and not 1 <= self.stride <= self.width:
            raise InputError(
                f"--stride {self.stride}: give 1 to {self.width}, the tokens of text in a row; more leaves some out"
            )


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    context: int,
    *,
    skip_positions: int = 1,
    limit: int | None = None,
    bos: Literal["none", "row"] = "none",
    stride: int | None = None,
    packing: Packing = "joined",
) -> Rows:
    """Documents joined into one stream, a separator before each, and the stream cut into rows from its start.

    A row needs the token after it as its last target; what is left at the end is dropped and counted. The last target
    of a document that is cut apart (`packing="documents"`) is the separator.

    context, skip_positions, bos, stride, packing: see `Layout`.
    limit: at most this many tokens in all rows together. No document is read beyond the one that completes them (a
        few more, where documents are cut apart).

    Raises InputError for a number out of range, a tokenizer without a separator or (with `row`) without a
    begin-of-text token, and a text too short for one row.
    """
    check_packing(tokenizer, context, skip_positions, limit, bos)
    layout = Layout(context, skip_positions, bos, stride, packing)
    return next(row_windows(documents, tokenizer, layout, limit=limit))


def row_windows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    layout: Layout,
    *,
    window_rows: int | None = None,
    limit: int | None = None,
) -> Iterator[Rows]:
    """The rows of `pack`, `window_rows` at a time, each window read and encoded when it is asked for.

    A window is a `Rows` of its own: its documents and their numbers are those that it holds, and its `n_dropped` is of
    what was read until then. All have `window_rows` rows but the last, which has what is left. None: one window of all.

    Raises InputError as `pack`.
    """
    layout.check(tokenizer)
    most = None if limit is None else limit // layout.context
    window_rows = window_rows or most or _ENDLESS
    reader = _Reader(iter(documents), tokenizer, layout)
    given = 0
    while most is None or given < most:
        wanted = window_rows if most is None else min(window_rows, most - given)
        reader.read(wanted)
        if not reader.waiting:
            break
        window = reader.take(wanted)
        given += window.n_rows
        yield window
        if window.n_rows < wanted:
            break
    if not given:
        raise InputError(
            f"the text is shorter than one row: {count_of(reader.documents, 'document')}, "
            f"{count_of(reader.tokens, 'token')} with separators, where a row of {layout.context} needs "
            f"{layout.width + 1}; give more text or a smaller --context"
        )


def fills_a_row(documents: Iterable[Document], tokenizer: Tokenizer, layout: Layout) -> bool:
    """Whether the documents make at least one row; reads and encodes no more than that takes."""
    reader = _Reader(iter(documents), tokenizer, layout)
    reader.read(1)
    return reader.waiting > 0


# More rows than any text has.
_ENDLESS = 1 << 62


class _Reader:
    """Documents read and encoded as rows are wanted; holds the tokens that stand in rows not yet taken.

    Places are counted from the first token that is held.

    Attributes:
        documents, tokens: read so far, separators counted as tokens.
        waiting: rows that have been cut and not taken.
    """

    def __init__(self, source: Iterator[Document], tokenizer: Tokenizer, layout: Layout):
        self._source, self._tokenizer, self._layout = source, tokenizer, layout
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        self._pieces: list[np.ndarray] = []
        self._starts: list[int] = []
        self._names: list[str] = []
        self._cuts: list[Cuts] = []
        self._length, self._ended = 0, False
        self.documents = self.tokens = self.waiting = self._forgotten = 0
        # Where the next row of joined documents begins, and whether one stands before it.
        self._next, self._follows = 0, False

    def read(self, rows: int) -> None:
        """Read until so many rows wait, or the text ends."""
        layout = self._layout
        while self.waiting < rows and not self._ended:
            need = (rows - self.waiting - 1) * layout.step + layout.width + 1
            if layout.packing == "joined":
                need += self._next - self._length
            group = _group(self._source, min(_GROUP_BYTES, need))
            self._ended = not group
            for document, ids in zip(group, self._tokenizer.encode_documents([each.text for each in group])):
                self._add(document.name, ids.astype(self._dtype))
            if layout.packing == "joined":
                cuts = joined_cuts(self._next, self._length, layout.width, layout.step, overlaps=self._follows)
                self._wait(cuts)
                self._next += len(cuts.starts) * layout.step
                self._follows |= len(cuts.starts) > 0

    def _add(self, name: str, ids: np.ndarray) -> None:
        """A document, and a separator before it."""
        layout = self._layout
        self.documents, self.tokens = self.documents + 1, self.tokens + 1 + len(ids)
        if layout.packing == "documents":
            skip = max(0, layout.skip_positions - (layout.bos == "row"))
            cuts = document_cuts(self._length + 1, len(ids), layout.width, layout.step, skip)
            if not len(cuts.starts):
                return
            self._wait(cuts)
        self._pieces += [self._separator, ids]
        self._starts.append(self._length)
        self._names.append(name)
        self._length += 1 + len(ids)

    def _wait(self, cuts: Cuts) -> None:
        self._cuts.append(cuts)
        self.waiting += len(cuts.starts)

    @property
    def _separator(self) -> np.ndarray:
        return np.array([self._tokenizer.separator_id], self._dtype)

    def take(self, rows: int) -> Rows:
        """The next rows, at most so many, of those that wait; what stands before the rest is forgotten."""
        # A separator stands before whatever document comes next: the last target of one that is cut apart.
        stream = np.concatenate([*self._pieces, self._separator])
        length = self._length + (self._layout.packing == "documents")
        cuts = together(self._cuts)
        taken, left = cuts.part(slice(rows)), cuts.part(slice(rows, None))
        window = self._rows(stream[:length], taken)
        keep_from = int(left.starts[0]) if len(left.starts) else self._length
        if self._layout.packing == "joined":
            keep_from = min(keep_from, self._next)
        first = max(0, int(np.searchsorted(self._starts, keep_from, side="right")) - 1)
        self._pieces, self._length = [stream[keep_from : self._length].copy()], self._length - keep_from
        self._starts = [start - keep_from for start in self._starts[first:]]
        self._names, self._forgotten = self._names[first:], self._forgotten + first
        self._cuts, self.waiting = [left.moved(keep_from)], len(left.starts)
        self._next = max(0, self._next - keep_from)
        return window

    def _rows(self, stream: np.ndarray, cuts: Cuts) -> Rows:
        layout, tokenizer = self._layout, self._tokenizer
        first, end = int(cuts.starts[0]), int(cuts.starts[-1] + cuts.lengths[-1])
        starts = np.array(self._starts, np.int64)
        # Of the documents that begin before the first row, only the one that it begins in.
        inside = slice(max(0, int(np.searchsorted(starts, first, side="right")) - 1), int(np.searchsorted(starts, end)))
        plain = layout.packing == "joined" and layout.step == layout.width
        special = {tokenizer.separator_id, tokenizer.bos_id, tokenizer.pad_id} - {None}
        return Rows(
            stream=stream[first : end + 1],
            document_starts=starts[inside] - first,
            documents=tuple(self._names[inside]),
            context=layout.context,
            skip_positions=layout.skip_positions,
            masked_ids=tuple(sorted(special)),
            bos_id=tokenizer.bos_id if layout.bos == "row" else None,
            fill_id=tokenizer.separator_id if tokenizer.pad_id is None else tokenizer.pad_id,
            n_dropped=self.tokens - int((cuts.lengths - cuts.repeated).sum()),
            cuts=None if plain else cuts.moved(first),
            documents_before=self._forgotten + inside.start,
        )


def check_packing(
    tokenizer: Tokenizer, context: int, skip_positions: int = 0, limit: int | None = None, bos: str = "none"
) -> None:
    """Raises InputError for what `pack` cannot use, before any text is read."""
    if bos not in ("none", "row"):
        raise InputError(f"bos is {bos!r}; give 'none' or 'row'")
    if context < 2:
        raise InputError(f"context is {context}; a row must have at least 2 tokens")
    if not 0 <= skip_positions < context:
        raise InputError(
            f"skip_positions is {skip_positions}; give 0 to {context - 1}, less than the context of {context}"
        )
    if limit is not None and limit < context:
        raise InputError(
            f"{limit} tokens make no row of {context}; give at least {context} tokens or a smaller --context"
        )
    if tokenizer.separator_id is None:
        raise InputError(
            "the tokenizer has no end-of-text token to stand between documents; name one as eos_token in its folder"
        )
    if bos == "row" and tokenizer.bos_id is None:
        raise InputError("the tokenizer has no begin-of-text token to start rows with; give bos 'none'")


def _group(source: Iterator[Document], size: int) -> list[Document]:
    """Documents until their bytes reach `size`: a byte is at most a token, so none is read that is not needed."""
    group = []
    while size > 0 and (document := next(source, None)) is not None:
        group.append(document)
        # A separator stands before the document, and may be a newline after it.
        size -= len(document.text.encode()) + 2
    return group


def count_of(number: int, noun: str) -> str:
    """`1 document`, `2,000 documents`: for messages."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
