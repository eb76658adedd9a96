"""Which documents are held out for evaluation, and the two sides of a text: to train on, to evaluate on."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sparse_jax.errors import InputError
from sparse_jax.lm import embedded
from sparse_jax.lm.documents import Document, documents
from sparse_jax.lm.packing import Layout, check_packing, count_of, fills_a_row
from sparse_jax.lm.row_cuts import Packing
from sparse_jax.lm.tokenizer import Tokenizer


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
    packing: Packing = "joined",
) -> tuple[Side, Side]:
    """Documents to train on and documents to evaluate on, which no training ever sees.

    One source: its documents divided by `is_held_out`. Two: all of `source`, less what is always held out of an
    embedded text, and all of `eval_source`. Sources, splits and the text field are as in `documents`.

    fraction: the share of documents held out, of one source that is not embedded.
    tokenizer, context: give both to check that each side fills a row; that reads and encodes no more than it takes.
    packing: how the rows are to be made (see `row_cuts`).

    Raises InputError for a source that cannot be read; if a side has no document, or not one row; and if a document of
    `eval_source` is also trained on. That is found at once, except where a source is a hub dataset: then when the
    second of the two copies is read.
    """
    _check_fraction(fraction)
    if tokenizer is not None and context is not None:
        check_packing(tokenizer, context)
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
    full = [_has_enough(side, tokenizer, context, packing) for side in sides]
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


def _has_enough(side: Side, tokenizer: Tokenizer | None, context: int | None, packing: Packing) -> bool:
    if tokenizer is None or context is None:
        return next(iter(side), None) is not None
    return fills_a_row(side, tokenizer, Layout(context, packing=packing))


def _too_short(
    source: str | Path, eval_source: str | Path | None, sides: tuple[Side, Side], full: list[bool], fraction: float
) -> InputError:
    side = "training" if not full[0] else "evaluation"
    n_train, n_eval = (sum(1 for _ in side) for side in sides)
    if eval_source is not None:
        given, number = (source, n_train) if not full[0] else (eval_source, n_eval)
        return InputError(
            f"the {side} text {str(given)!r} ({count_of(number, 'document')}) does not fill one row; give a longer one"
        )
    change = "--eval-text or a larger --holdout" if full[0] else "more text, or --eval-text"
    return InputError(
        f"the text {str(source)!r} has {count_of(n_train + n_eval, 'document')}, {n_eval} of them held out at "
        f"--holdout {fraction}: those for {side} do not fill one row; give {change}"
    )
