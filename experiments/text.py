"""The text of an experiment as rows: which documents, joined or apart, read whole or as it goes."""

import functools
from collections.abc import Iterable

from experiments.text_flags import TextFlags
from sparse_jax.errors import InputError
from sparse_jax.lm import truthfulqa
from sparse_jax.lm.documents import Document, fingerprint
from sparse_jax.lm.holdout import split
from sparse_jax.lm.packing import Layout, pack, row_windows
from sparse_jax.lm.row_stream import WINDOW_ROWS, RowStream
from sparse_jax.lm.rows import Rows
from sparse_jax.lm.tokenizer import Tokenizer


def is_hub(source: str | None) -> bool:
    """Whether a text is a dataset of the hub, which may have no end."""
    return str(source).startswith("hub:")


def layout(flags: TextFlags) -> Layout:
    """How the flags make rows of documents; `bos` must have been resolved."""
    packing = flags.packing
    if packing == "auto":
        packing = "documents" if flags.text == truthfulqa.NAME else "joined"
    return Layout(flags.context, flags.skip_positions, flags.bos, flags.stride, packing)


def text_fingerprint(flags: TextFlags) -> str:
    """What the text is: see `documents.fingerprint`."""
    return truthfulqa.fingerprint() if flags.text == truthfulqa.NAME else fingerprint(flags.text)


def check_text(flags: TextFlags) -> None:
    """Raises InputError for flags that fit no text, before anything is loaded."""
    if flags.window_rows is not None and flags.window_rows < 1:
        raise InputError(f"--window-rows {flags.window_rows}: give a positive number")
    if flags.text == truthfulqa.NAME:
        if flags.eval_text is not None:
            raise InputError(f"--eval-text with --text {flags.text}: its questions are split by --holdout")
        if flags.packing == "joined":
            raise InputError(f"--packing joined with --text {flags.text}: prompts stand in rows of their own")


def sides(flags: TextFlags, tokenizer: Tokenizer) -> tuple[Iterable[Document], Iterable[Document]]:
    """Documents to train on and documents held out.

    Raises:
        InputError: a text that cannot be read, a side without a row, a document on both sides.
    """
    rows = layout(flags)
    rows.check(tokenizer)
    if flags.text == truthfulqa.NAME:
        made = [
            truthfulqa.prompts(tokenizer, rows.width, held_out=held, fraction=flags.holdout) for held in (False, True)
        ]
        for name, side in zip(("training", "held-out"), made):
            if not side.documents:
                raise InputError(f"--holdout {flags.holdout} leaves no {name} question; give another share")
            print(prompt_summary(name, side, rows.width), flush=True)
        return made[0], made[1]
    return split(
        flags.text, flags.eval_text, fraction=flags.holdout, text_field=flags.text_field,
        tokenizer=tokenizer, context=flags.context, packing=rows.packing,
    )  # fmt: skip


def prompt_summary(name: str, side: truthfulqa.Prompts, room: int) -> str:
    """How many shots the prompts of a side have, in one line."""
    shots = ", ".join(f"{count} with {shots}" for shots, count in side.shots.items())
    long = f"; {side.too_long} fill more than a row by themselves" if side.too_long else ""
    return (
        f"{len(side.documents)} {name} prompts, as many shots up to {truthfulqa.SHOTS} as fit in {room} tokens: "
        f"{shots}{long}"
    )


def whole(side: Iterable[Document], tokenizer: Tokenizer, rows: Layout, limit: int | None = None) -> Rows:
    """All rows of a side, at most `limit` tokens."""
    return pack(
        side, tokenizer, rows.context, skip_positions=rows.skip_positions, limit=limit, bos=rows.bos,
        stride=rows.stride, packing=rows.packing,
    )  # fmt: skip


def training_rows(flags: TextFlags, side: Iterable[Document], tokenizer: Tokenizer) -> Rows | RowStream:
    """The rows to train on: all in memory, or read as they are wanted.

    Raises:
        InputError: the text cannot be read or has not one row.
    """
    window = flags.window_rows or (WINDOW_ROWS if is_hub(flags.text) else None)
    if window is None:
        return whole(side, tokenizer, layout(flags))
    return RowStream(functools.partial(row_windows, side, tokenizer, layout(flags), window_rows=window), window)


def held_out_rows(flags: TextFlags, side: Iterable[Document], tokenizer: Tokenizer, wanted: int) -> Rows:
    """The rows to evaluate on: of a hub dataset no more than are wanted, in tokens."""
    limit = max(wanted, flags.context) if is_hub(flags.eval_text or flags.text) else None
    return whole(side, tokenizer, layout(flags), limit)
