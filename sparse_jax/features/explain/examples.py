"""A fragment as it is shown: tokens, the feature's activation at each, on a scale from 0 to 10."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

# The scale that language models read and answer on.
LARGEST = 10


@dataclass(frozen=True)
class Example:
    """A fragment with the activations of one feature.

    Attributes:
        tokens: as text, leading spaces kept.
        activations: `[length]` 0 where silent.
        counts: `[length]` where tokens count.
        row, start: where it stands in the text.
        document: the name of the document it begins in.
    """

    tokens: tuple[str, ...]
    activations: Float32[np.ndarray, " length"]
    counts: np.ndarray
    row: int
    start: int
    document: str

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    def levels(self, maximum: float) -> Int[np.ndarray, " length"]:
        """Activations as integers from 0 to 10, where 10 is the feature's maximum."""
        scaled = np.asarray(self.activations, np.float64) / maximum if maximum > 0 else np.zeros(len(self.tokens))
        return np.clip(np.rint(LARGEST * scaled), 0, LARGEST).astype(np.int64)

    def active(self, maximum: float) -> np.ndarray:
        """`[length]` bool: tokens of level 1 and above; where there is none, the strongest, if it fires at all.

        A trace of activation that rounds to nothing would only hide where the feature is active.
        """
        marked = self.levels(maximum) > 0
        if not marked.any() and self.activations.max() > 0:
            marked[int(np.argmax(self.activations))] = True
        return marked

    def marked(self, where: np.ndarray) -> str:
        """The text, with the tokens at `where` between [[ and ]]; neighbours share a pair."""
        out = []
        for i, token in enumerate(self.tokens):
            before, after = i > 0 and where[i - 1], i + 1 < len(where) and where[i + 1]
            out.append(("[[" if where[i] and not before else "") + token + ("]]" if where[i] and not after else ""))
        return "".join(out)
