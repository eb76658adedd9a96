"""Texts of given tokens."""

import numpy as np

from sparse_jax.lm.rows import Rows


def joined_rows(stream: np.ndarray, starts: np.ndarray, context: int) -> Rows:
    """Rows of a stream of tokens whose documents begin at `starts`, each with a separator, 0, which is put there."""
    stream = stream.astype(np.uint16)
    stream[starts] = 0
    return Rows(
        stream=stream,
        document_starts=starts,
        documents=tuple(f"document {i}" for i in range(len(starts))),
        context=context,
        skip_positions=1,
        masked_ids=(0,),
        bos_id=None,
        fill_id=0,
        n_dropped=0,
    )
