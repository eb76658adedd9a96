"""Packing: documents joined into one stream of tokens, or kept apart, and cut into rows: whole, or window by window."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.lm.documents import Document
from sparse_jax.lm.row_cuts import Cuts, Packing, document_cuts, joined_cuts, together
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.tokenizer import Tokenizer

# Bytes of text that are encoded at once: enough to keep all cores busy, little beside the tokens of a run.
_GROUP_BYTES = 1 << 21


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
