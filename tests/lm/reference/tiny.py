"""What a tiny model is: a config, a batch, and the tensors that its checkpoint holds."""

from typing import NamedTuple


class Tiny(NamedTuple):
    """A tiny model: `config.json` as a dict, and the shape of the batch its golden values are for."""

    config: dict
    rows: int
    length: int


class Drawn(NamedTuple):
    """A tensor of a checkpoint, to be drawn at random.

    Attributes:
        shape: as it lies on disk.
        inputs: how many numbers each output of a linear map sums; None for an embedding, a bias, a norm.
        norm: whether it is the scale of a norm.
    """

    shape: tuple[int, ...]
    inputs: int | None = None
    norm: bool = False


def layer_norm(name: str, width: int) -> dict[str, Drawn]:
    return {f"{name}.weight": Drawn((width,), norm=True), f"{name}.bias": Drawn((width,))}


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Drawn]:
    """A PyTorch Linear, which keeps its kernel as `[outputs, inputs]`."""
    found = {f"{name}.weight": Drawn((outputs, inputs), inputs)}
    return found | ({f"{name}.bias": Drawn((outputs,))} if bias else {})
