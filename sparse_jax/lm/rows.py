"""Packing: documents joined into one stream of tokens and cut into rows, with targets and the mask."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sparse_jax.errors import InputError
from sparse_jax.lm.documents import Document
from sparse_jax.lm.tokenizer import Tokenizer

# Bytes of text that are encoded at once: enough to keep all cores busy, little beside the tokens of a run.
_GROUP_BYTES = 1 << 21


class RowBatch(NamedTuple):
    """Some rows; `...` is the shape of the indices they were asked for with.

    tokens: the ids.
    targets: the id that follows each token in the stream; -1 in an empty row, which has none.
    mask: True where a position counts. False for padding, separators and begin-of-text tokens, for the first
        `skip_positions` of each row and for all of an empty row. CE and KL average the predictions made at True.
    document: the place in `Rows.documents` of the document each token belongs to; -1 in an empty row.
    """

    tokens: Int32[np.ndarray, "*batch context"]
    targets: Int32[np.ndarray, "*batch context"]
    mask: Bool[np.ndarray, "*batch context"]
    document: Int32[np.ndarray, "*batch context"]


@dataclass(frozen=True, eq=False)
class Rows:
    """A text cut into rows of `context` tokens; make it with `pack`, index it for tokens.

    stream: [n_rows * width + 1] all tokens in order, uint16 where the vocabulary allows, else int32. Width is
        `context`, or `context - 1` where each row begins with a begin-of-text token. Row i is
        stream[i * width : (i + 1) * width]; the last token is only a target.
    document_starts: [n_documents] where in the stream each document's separator stands, ascending.
    documents: [n_documents] their names. Only documents with a token in some row are here.
    context: tokens in a row.
    skip_positions: positions at the start of each row that the mask leaves out.
    masked_ids: ids that the mask leaves out wherever they stand.
    bos_id: the id at the start of each row; None if rows are cut from the stream alone.
    fill_id: the id that empty rows hold.
    n_dropped: tokens that were read and stand in no row: the ragged rest, or what lay beyond the limit.
    """

    stream: np.ndarray
    document_starts: Int64[np.ndarray, " documents"]
    documents: tuple[str, ...]
    context: int
    skip_positions: int
    masked_ids: tuple[int, ...]
    bos_id: int | None
    fill_id: int
    n_dropped: int

    @property
    def width(self) -> int:
        """Tokens of the stream in each row."""
        return self.context - (self.bos_id is not None)

    @property
    def n_rows(self) -> int:
        return (len(self.stream) - 1) // self.width

    @property
    def n_tokens(self) -> int:
        """Tokens in all rows together, begin-of-text tokens of rows and masked positions included."""
        return self.n_rows * self.context

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, indices: int | slice | Int64[np.ndarray, "*batch"]) -> RowBatch:
        """The rows at `indices`, an integer, a slice or integers of any shape; -1 is an empty row.

        An empty row fills a ragged last batch up to a fixed shape: no position of it counts. Raises IndexError for
        an index below -1 or not below `n_rows`, TypeError for anything but integers.
        """
        if isinstance(indices, slice):
            indices = np.arange(self.n_rows)[indices]
        index = np.asarray(indices)
        if index.size and index.dtype.kind not in "iu":
            raise TypeError(f"rows are indexed by integers, not by {index.dtype}")
        index = index.astype(np.int64)
        if index.size and (index.min() < -1 or index.max() >= self.n_rows):
            raise IndexError(
                f"rows {index.min()} to {index.max()} of {self.n_rows}; give 0 to {self.n_rows - 1}, or -1"
            )
        places = np.maximum(index, 0)[..., None] * self.width + np.arange(self.width + 1)
        window = self.stream[places].astype(np.int32)
        tokens, targets, places = window[..., :-1], window[..., 1:], places[..., :-1]
        if self.bos_id is not None:
            tokens = np.concatenate([np.full_like(window[..., :1], self.bos_id), tokens], -1)
            targets = window
            places = np.concatenate([places[..., :1], places], -1)
        empty = (index < 0)[..., None]
        counts = (np.arange(self.context) >= self.skip_positions) & ~np.isin(tokens, self.masked_ids) & ~empty
        document = np.searchsorted(self.document_starts, places, side="right").astype(np.int32) - 1
        return RowBatch(
            np.where(empty, np.int32(self.fill_id), tokens),
            np.where(empty, np.int32(-1), targets),
            counts,
            np.where(empty, np.int32(-1), document),
        )


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    context: int,
    *,
    skip_positions: int = 1,
    limit: int | None = None,
    bos: Literal["none", "row"] = "none",
) -> Rows:
    """Documents joined into one stream, a separator before each, and the stream cut into rows from its start.

    A row needs the token after it as its last target; what is left at the end is dropped and counted.

    context: tokens in a row, at least 2.
    skip_positions: positions at the start of each row that the mask leaves out (attention sinks stand there).
    limit: at most this many tokens in all rows together. No document is read beyond the one that completes them.
    bos: `row` puts the begin-of-text token at the start of each row, which then takes context - 1 tokens of the stream.
        `joining.row_bos` says which a model needs.

    Raises InputError for a number out of range, a tokenizer without a separator or (with `row`) without a
    begin-of-text token, and a text too short for one row.
    """
    check_packing(tokenizer, context, skip_positions, limit, bos)
    width = context - (bos == "row")
    stream = _read(documents, tokenizer, None if limit is None else limit // context * width + 1)
    n_rows = (stream.length - 1) // width
    if limit is not None:
        n_rows = min(n_rows, limit // context)
    if n_rows < 1:
        raise InputError(
            f"the text is shorter than one row: {count_of(len(stream.names), 'document')}, "
            f"{count_of(stream.length, 'token')} with separators, where a row of {context} needs {width + 1}; "
            "give more text or a smaller --context"
        )
    starts = np.array(stream.starts, np.int64)
    starts = starts[starts < n_rows * width]
    special = {tokenizer.separator_id, tokenizer.bos_id, tokenizer.pad_id} - {None}
    return Rows(
        stream=np.concatenate(stream.pieces)[: n_rows * width + 1],
        document_starts=starts,
        documents=tuple(stream.names[: len(starts)]),
        context=context,
        skip_positions=skip_positions,
        masked_ids=tuple(sorted(special)),
        bos_id=tokenizer.bos_id if bos == "row" else None,
        fill_id=tokenizer.separator_id if tokenizer.pad_id is None else tokenizer.pad_id,
        n_dropped=stream.length - n_rows * width,
    )


def fills_a_row(documents: Iterable[Document], tokenizer: Tokenizer, context: int) -> bool:
    """Whether the documents make at least one row of `context` tokens; reads and encodes no more than that takes."""
    return _read(documents, tokenizer, context + 1).length > context


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


class _Stream(NamedTuple):
    pieces: list[np.ndarray]
    starts: list[int]
    names: list[str]
    length: int


def _read(source: Iterable[Document], tokenizer: Tokenizer, need: int | None) -> _Stream:
    """The tokens of the documents, until there are `need` of them."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    separator = np.array([tokenizer.separator_id], dtype)
    pieces, starts, names, length = [], [], [], 0
    source = iter(source)
    while need is None or length < need:
        group = _group(source, _GROUP_BYTES if need is None else min(_GROUP_BYTES, need - length))
        if not group:
            break
        for document, ids in zip(group, tokenizer.encode_documents([document.text for document in group])):
            pieces += [separator, ids.astype(dtype)]
            starts.append(length)
            names.append(document.name)
            length += 1 + len(ids)
    return _Stream(pieces, starts, names, length)


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
