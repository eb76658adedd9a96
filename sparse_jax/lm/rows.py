"""From documents to rows of tokens: packing, the mask, what is held out for evaluation, and the order of the rows."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sparse_jax.errors import InputError
from sparse_jax.lm import embedded
from sparse_jax.lm.documents import Document, documents
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

    Raises InputError for a number out of range, a tokenizer without a separator or (with `row`) without a
    begin-of-text token, and a text too short for one row.
    """
    _check(tokenizer, context, skip_positions, limit, bos)
    width = context - (bos == "row")
    stream = _read(documents, tokenizer, None if limit is None else limit // context * width + 1)
    n_rows = (stream.length - 1) // width
    if limit is not None:
        n_rows = min(n_rows, limit // context)
    if n_rows < 1:
        raise InputError(
            f"the text is shorter than one row: {_count(len(stream.names), 'document')}, "
            f"{_count(stream.length, 'token')} with separators, where a row of {context} needs {width + 1}; "
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


def _check(tokenizer: Tokenizer, context: int, skip_positions: int, limit: int | None, bos: str) -> None:
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


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def is_held_out(document: Document, fraction: float = 0.05) -> bool:
    """Whether a document is kept for evaluation: a function of the document alone.

    Of the embedded texts `Persuasion`, `Pride and Prejudice` and the last nine State of the Union addresses, whatever
    the fraction. Any other document if a hash of its text is in the lowest `fraction` of all hashes, so that it is on
    the same side in every run, and so are its copies.
    """
    if document.name in embedded.DOCUMENT_NAMES:
        return document.name in embedded.HELD_OUT
    return _content_hash(document) < fraction * 2**64


def hold_out(documents: Iterable[Document], *, fraction: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents held out for evaluation, each whole (see `is_held_out`), in their order.

    Raises InputError unless 0 < fraction < 1.
    """
    _check_fraction(fraction)
    sides = ([], [])
    for document in documents:
        sides[is_held_out(document, fraction)].append(document)
    return sides


def _content_hash(document: Document) -> int:
    return int.from_bytes(hashlib.blake2b(document.text.strip().encode(), digest_size=8).digest(), "big")


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise InputError(f"--holdout is {fraction}; give a share of the documents between 0 and 1, such as 0.05")


@dataclass(frozen=True, eq=False)
class Side:
    """Documents to train on or to evaluate on; each iteration reads the text anew."""

    read: Callable[[], Iterator[Document]] = field(repr=False)

    def __iter__(self) -> Iterator[Document]:
        return self.read()


def split(
    source: str | Path,
    eval_source: str | Path | None = None,
    *,
    fraction: float = 0.05,
    hub_split: str = "train",
    eval_hub_split: str = "train",
    text_field: str = "text",
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
) -> tuple[Side, Side]:
    """Documents to train on and documents to evaluate on, which no training ever sees.

    One source: its documents divided by `is_held_out`. Two: all of `source`, less what is always held out of an
    embedded text, and all of `eval_source`. Sources, splits and the text field are as in `documents`.

    fraction: the share of documents held out, of one source that is not embedded.
    tokenizer, context: give both to check that each side fills a row; that reads and encodes no more than it takes.

    Raises InputError for a source that cannot be read; if a side has no document, or not one row; and if a document of
    `eval_source` is also trained on. That is found at once, except where a source is a hub dataset: then when the
    second of the two copies is read.
    """
    _check_fraction(fraction)
    if tokenizer is not None and context is not None:
        _check(tokenizer, context, 0, None, "none")
    train = functools.partial(documents, source, split=hub_split, text_field=text_field)
    if eval_source is None:
        sides = tuple(Side(functools.partial(_divided, train, fraction, held)) for held in (False, True))
    else:
        evaluation = functools.partial(documents, eval_source, split=eval_hub_split, text_field=text_field)
        seen = (set(), set())
        sides = tuple(Side(functools.partial(_guarded, read, seen, i)) for i, read in enumerate((train, evaluation)))
        if not any(str(given).startswith("hub:") for given in (source, eval_source)):
            for _ in itertools.chain(sides[1], sides[0]):
                pass
    full = [_fills_a_row(side, tokenizer, context) for side in sides]
    if not all(full):
        raise _too_short(source, eval_source, sides, full, fraction)
    return sides


def _divided(read: Callable[[], Iterator[Document]], fraction: float, held: bool) -> Iterator[Document]:
    return (document for document in read() if is_held_out(document, fraction) == held)


def _guarded(read: Callable[[], Iterator[Document]], seen: tuple[set, set], side: int) -> Iterator[Document]:
    """One of two sources: training (0) or evaluation (1); an error for a document that the other has read."""
    for document in read():
        if side == 0 and document.name in embedded.HELD_OUT:
            continue
        content = _content_hash(document)
        if content in seen[1 - side]:
            raise InputError(
                f"the document {document.name!r} is in both the training and the evaluation text; give an --eval-text "
                "that shares none with --text, or none: then documents of --text are held out"
            )
        seen[side].add(content)
        yield document


def _fills_a_row(side: Side, tokenizer: Tokenizer | None, context: int | None) -> bool:
    if tokenizer is None or context is None:
        return next(iter(side), None) is not None
    return _read(side, tokenizer, context + 1).length > context


def _too_short(
    source: str | Path, eval_source: str | Path | None, sides: tuple[Side, Side], full: list[bool], fraction: float
) -> InputError:
    side = "training" if not full[0] else "evaluation"
    n_train, n_eval = (sum(1 for _ in side) for side in sides)
    if eval_source is not None:
        given, number = (source, n_train) if not full[0] else (eval_source, n_eval)
        return InputError(
            f"the {side} text {str(given)!r} ({_count(number, 'document')}) does not fill one row; give a longer one"
        )
    change = "--eval-text or a larger --holdout" if full[0] else "more text, or --eval-text"
    return InputError(
        f"the text {str(source)!r} has {_count(n_train + n_eval, 'document')}, {n_eval} of them held out at --holdout "
        f"{fraction}: those for {side} do not fill one row; give {change}"
    )


def row_order(n_rows: int, seed: int, epoch: int) -> Int64[np.ndarray, " n_rows"]:
    """The order of the rows in one epoch: a permutation of 0 .. n_rows - 1 fixed by the three numbers.

    The same on every machine and with every NumPy: only the raw output of the generator is used, which NumPy promises
    to keep, not its shuffling, which it does not.

    Raises InputError for n_rows below 1 or a negative seed or epoch.
    """
    _check_order(n_rows, seed, epoch)
    return _order(int(n_rows), int(seed), int(epoch)).copy()


def _check_order(n_rows: int, seed: int, epoch: int) -> None:
    if n_rows < 1 or seed < 0 or epoch < 0:
        raise InputError(
            f"n_rows {n_rows}, seed {seed}, epoch {epoch}: n_rows must be at least 1, seed and epoch at least 0"
        )


# Consecutive batches ask for the same epoch.
@functools.lru_cache(maxsize=2)
def _order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch, n_rows])).random_raw(n_rows)
    return np.argsort(raw, kind="stable").astype(np.int64)


def row_indices(n_rows: int, seed: int, start: int, count: int) -> Int64[np.ndarray, " count"]:
    """The rows at places start .. start + count - 1 of all epochs' orders one after another, without end.

    So the data are a function of a place: a run that resumes at `start` sees what it would have seen.

    Raises InputError as `row_order`, and for a negative start or count.
    """
    if start < 0 or count < 0:
        raise InputError(f"start {start}, count {count}: both must be at least 0")
    _check_order(n_rows, seed, 0)
    first, last = start // n_rows, (start + count - 1) // n_rows
    orders = [_order(int(n_rows), int(seed), epoch) for epoch in range(first, last + 1)]
    skip = start - first * n_rows
    return np.concatenate([np.zeros(0, np.int64), *orders])[skip : skip + count]
