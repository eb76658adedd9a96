"""Blocks made one ahead: while training uses one, a thread reads (or computes) the next.

Their values are those of the blocks, so nothing depends on it. Reading a store waits for a disk, and harvesting on an
accelerator for the host; on a CPU that computes activations itself nothing is gained.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from sparse_jax.activations.blocks import RememberedBlocks
from sparse_jax.activations.stored_blocks import BlocksAt, StoredBlocks


class Ahead:
    """Blocks of which the one after the last that was asked for is being made; close it when it is no longer used.

    Attributes:
        blocks: whose.
        last: the last block that will be asked for: none behind it is made.
    """

    def __init__(self, blocks: Any, last: int):
        self.blocks, self.last = blocks, last
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self._next: tuple[int, Future] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.blocks, name)

    def __getitem__(self, index: int) -> Any:
        """Block `index`; raises what the blocks raise."""
        made = (
            self._next[1]
            if self._next and self._next[0] == index
            else self._pool.submit(self.blocks.__getitem__, index)
        )
        block = made.result()
        self._next = (index + 1, self._pool.submit(self.blocks.__getitem__, index + 1)) if index < self.last else None
        return block

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def worth_it(blocks: Any) -> bool:
    """Whether making blocks ahead can save time here: see above.

    Never where a model computes them over the devices of several processes: these exchange tokens, and must do so at
    the same place among their steps, which a thread would not keep to.
    """
    inner = getattr(blocks, "blocks", blocks) if isinstance(blocks, RememberedBlocks) else blocks
    if jax.process_count() > 1 and not isinstance(inner, StoredBlocks | BlocksAt):
        return False
    return jax.default_backend() != "cpu" or isinstance(blocks, StoredBlocks | BlocksAt)
