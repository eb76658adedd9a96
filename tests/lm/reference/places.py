"""Where in a PyTorch model each site is read and changed."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple


def whole(tensor):
    return tensor


def heads(head_dim: int) -> Callable:
    """`[..., heads * head_dim]` seen as `[..., head, head_dim]`."""
    return lambda tensor: tensor.unflatten(-1, (-1, head_dim))


class Place(NamedTuple):
    """A site of one layer.

    Attributes:
        site: as text.
        module: the PyTorch module it belongs to.
        side: the module's first input, its (first) output, or the pattern inside an attention module.
        view: the site's value as a view of that tensor: an edit is written through it, in place, so that everything
            that reads the tensor later, the residual branch too, reads the edited one.
    """

    site: str
    module: Any
    side: Literal["input", "output", "pattern"]
    view: Callable = whole
