"""Codes of the sites that an experiment on connections joins: collected once for all layers, and split by documents."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.connecting import Ends, Opened
from experiments.connecting_flags import ConnectingFlags
from experiments.data import Data
from experiments.reading import BLOCK_ROWS
from sparse_jax.connectors.collect_codes import collect_codes
from sparse_jax.connectors.paired_codes import CodeStore, Pair
from sparse_jax.errors import InputError
from sparse_jax.lm.order import row_indices
from sparse_jax.lm.rows import Rows

# Folder of the codes in a run folder, where they are not given.
CODES = "codes"


@dataclass(frozen=True)
class Sides:
    """The pairs of a connection.

    Attributes:
        fit: training text, what connectors are fitted on.
        validation: other documents of it, on which choices are made.
        held_out: held-out text, what figures are of.
    """

    fit: Pair
    validation: Pair
    held_out: Pair


@dataclass(frozen=True)
class Codes:
    """Codes of all sites.

    Attributes:
        train, held_out: of either text.
        numbers: rows of `data.evaluation` that are read.
    """

    train: CodeStore
    held_out: CodeStore
    numbers: np.ndarray

    def sides(self, ends: Ends, flags: ConnectingFlags) -> Sides:
        """The pairs of one connection."""
        fit, validation = self.train.pair(ends.inputs, ends.target).split(flags.validation, flags.seed)
        return Sides(fit, validation, self.held_out.pair(ends.inputs, ends.target))


def collect(flags: ConnectingFlags, opened: Opened) -> Codes:
    """Codes of all sites on both texts, in files; those of the same model, text and dictionaries are used again.

    Raises:
        InputError: --codes holds others; a text of too few documents.
    """
    from tqdm import tqdm

    data, folder = opened.data, flags.codes or flags.out / CODES
    count = min(len(data.train), max(1, -(-flags.tokens // data.train.context)))
    rows = {
        "train": (data.train, np.sort(row_indices(len(data.train), flags.seed, 0, count))),
        "held_out": (data.evaluation, np.sort(held_out_rows(flags, data))),
    }
    stores = {}
    for name, (text, numbers) in rows.items():
        _check_documents(text, numbers, name)
        with tqdm(total=numbers.size * text.context, desc=f"codes, {name.replace('_', '-')} text", unit="token",
                  unit_scale=True, mininterval=0.5) as bar:  # fmt: skip
            arguments = (data.lm, text, numbers, opened.coders)
            kept = {"max_norms": opened.max_norms(), "folder": folder / name, "progress": bar.update}
            stores[name] = _collected(arguments, kept, flags)
    return Codes(stores["train"], stores["held_out"], rows["held_out"][1])


def held_out_rows(flags: ConnectingFlags, data: Data) -> np.ndarray:
    """Rows of the held-out text that are read."""
    count = min(len(data.evaluation), max(1, flags.eval_tokens // data.evaluation.context))
    return row_indices(len(data.evaluation), 0, 0, count)


def spread_rows(numbers: np.ndarray, count: int) -> np.ndarray:
    """So many of the rows, at least one, evenly from first to last: of all documents that those have."""
    count = min(len(numbers), max(1, count))
    return numbers[np.arange(count) * len(numbers) // count]


def _collected(arguments, kept, flags) -> CodeStore:
    folder: Path = kept["folder"]
    places = [folder, folder.with_name(f"{folder.name}.unfinished")]
    before = any(place.exists() for place in places)
    try:
        return collect_codes(*arguments, **kept)
    except InputError:
        # Codes of another run in our own folder are in the way; in a folder that was given they are someone else's.
        if not before or flags.codes is not None or flags.resume:
            raise
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        return collect_codes(*arguments, **kept)


def _check_documents(text: Rows, numbers: np.ndarray, name: str) -> None:
    _, _, mask, document = text[spread_rows(numbers, 4 * BLOCK_ROWS)]
    if len(np.unique(document[mask])) < 2:
        flag = "--tokens" if name == "train" else "--eval-tokens"
        raise InputError(f"the {name.replace('_', '-')} text has fewer than two documents: raise {flag}")
