"""A text read as it goes: rows in windows, of which only the last few are in memory and the next is being made.

While the model runs on one window, a thread reads and encodes the one after it (tokenizers work outside Python's lock),
so that the device does not wait for the tokenizer. The order is permuted within windows (`order.windowed_row_indices`),
so that a place in it is a function of the seed and the text before the end of its window, whether or not the text's end
is known. To go back is to read the text from its start again, as a resumed run does.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Int64

from sparse_jax.errors import InputError
from sparse_jax.lm.order import windowed_row_indices
from sparse_jax.lm.rows import RowBatch, Rows, checked_indices

# Rows in a window where nothing else is said: a million tokens in rows of 256.
WINDOW_ROWS = 4096
# Windows in memory: a block of activations may cross from one to the next.
_KEPT = 2


class RowStream:
    """Rows of a text of unknown length, indexed as `Rows` are, without jumping back and forth.

    Attributes:
        context: tokens in a row.
        window_rows: rows in each window but the last.
        documents: names of the documents read so far.
        n_rows: rows of the whole text; None until its end has been reached.
    """

    def __init__(self, windows: Callable[[], Iterator[Rows]], window_rows: int = WINDOW_ROWS):
        """Args: what begins to read the text (`packing.row_windows`); the rows in its windows. The first is read now.

        Raises:
            InputError: the text cannot be read or is shorter than one row.
        """
        self._open, self.window_rows = windows, window_rows
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self.documents: list[str] = []
        self.n_rows: int | None = None
        self._begin()
        self.context, self.fill_id = self._window(0).context, self._window(0).fill_id
        self.masked_ids, self.skip_positions = self._window(0).masked_ids, self._window(0).skip_positions

    def _begin(self) -> None:
        """Read from the start of the text; names that have been read before are kept."""
        self._source, self._kept = self._open(), {}
        self._ahead: Future = self._pool.submit(next, self._source, None)
        self._at = 0  # the number of the window that is being read

    @property
    def n_tokens(self) -> int | None:
        """As `Rows.n_tokens`; None until the end of the text has been reached."""
        return None if self.n_rows is None else self.n_rows * self.context

    def reach(self, end: int) -> int:
        """`end`, or the number of rows where the text turns out to have fewer: it is read so far.

        Raises:
            InputError: the text cannot be read any further.
        """
        while self.n_rows is None and self._at * self.window_rows < end:
            self._window(self._at)
        return end if self.n_rows is None else min(end, self.n_rows)

    def ordered(self, seed: int, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """The rows at places start .. start + count - 1 of the order that a seed gives."""
        self.reach(start + count)
        n_rows = self._at * self.window_rows if self.n_rows is None else self.n_rows
        return windowed_row_indices(n_rows, self.window_rows, seed, start, count)

    def __getitem__(self, indices: Int64[np.ndarray, " rows"]) -> RowBatch:
        """The rows at `indices [rows]`; -1 is an empty row.

        Raises:
            InputError: the text cannot be read any further.
            IndexError: a row that the text does not have.
        """
        index = checked_indices(indices, (1 << 62) if self.n_rows is None else self.n_rows).reshape(-1)
        windows = np.where(index < 0, -1, index // self.window_rows)
        found: RowBatch | None = None
        for number in sorted(set(windows.tolist()) - {-1}) or [max(0, self._at - 1)]:
            window = self._window(number)
            if window is None:
                raise IndexError(f"row {index.max()} of {self.n_rows}")
            here = windows == number
            batch = window[np.where(here, index - number * self.window_rows, -1)]
            document = np.where(batch.document < 0, -1, batch.document + window.documents_before).astype(np.int32)
            batch = batch._replace(document=document)
            if found is not None:
                batch = RowBatch(*(np.where(here[:, None], new, old) for new, old in zip(batch, found)))
            found = batch
        return found

    def _window(self, number: int) -> Rows | None:
        """Window `number`, read if need be; None behind the end of the text."""
        if number in self._kept:
            return self._kept[number]
        if number < self._at:
            self._ahead.cancel()
            if not self._ahead.cancelled():
                self._ahead.exception()  # wait for the thread to come to rest
            self._begin()
        while self._at <= number:
            try:
                window = self._ahead.result()
            except InputError as error:
                raise InputError(f"after {self._at * self.window_rows:,} rows of text: {error}") from error
            if window is None:
                self.n_rows = self._at * self.window_rows if self.n_rows is None else self.n_rows
                return None
            self._ahead = self._pool.submit(next, self._source, None)
            self._keep(window)
        return self._kept[number]

    def _keep(self, window: Rows) -> None:
        first = window.documents_before
        self.documents[first : first + len(window.documents)] = window.documents
        self._kept[self._at] = window
        self._kept.pop(self._at - _KEPT, None)
        self._at += 1
        if window.n_rows < self.window_rows:
            self.n_rows = (self._at - 1) * self.window_rows + window.n_rows
