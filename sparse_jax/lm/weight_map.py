"""Where each parameter of a port stands in a checkpoint, and what its axes are called."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# A logical axis: its name and its size. The names are those of `sharding.RULES`.
Axis = tuple[str, int]


@dataclass(frozen=True)
class Weight:
    """One parameter of the port and where it comes from.

    Attributes:
        source: the tensor's name in the checkpoint, with `{layer}` for those of a block.
        axes: the parameter's axes, in order (without the layer axis that stacking puts in front).
        inputs: how many of the axes, from the first, the tensor on disk has flattened into one.
        transposed: whether the tensor on disk is `[outputs, inputs]`, as PyTorch's Linear keeps it.
    """

    source: str
    axes: tuple[Axis, ...]
    inputs: int = 0
    transposed: bool = False

    @property
    def port_shape(self) -> tuple[int, ...]:
        """Shape of the parameter of one layer."""
        return tuple(size for _, size in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor on disk."""
        outputs = math.prod(self.port_shape[self.inputs :])
        if not self.inputs:
            return (outputs,)
        inputs = math.prod(self.port_shape[: self.inputs])
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    def convert(self, tensor: Any) -> Any:
        """The parameter of one layer from its tensor (NumPy or jax)."""
        return (tensor.T if self.transposed else tensor).reshape(self.port_shape)


def linear(
    name: str, inputs: tuple[Axis, ...], outputs: tuple[Axis, ...], *, bias: bool = True, conv1d: bool = False
) -> dict[str, Weight]:
    """Kernel `[*inputs, *outputs]` (and bias `[*outputs]`) of a linear map `name`.

    conv1d: the kernel lies as `[inputs, outputs]` on disk (GPT-2's Conv1D), not the other way round.
    """
    found = {"kernel": Weight(f"{name}.weight", (*inputs, *outputs), len(inputs), transposed=not conv1d)}
    return found | ({"bias": Weight(f"{name}.bias", outputs)} if bias else {})


def norm(name: str, axis: Axis, *, bias: bool = True) -> dict[str, Weight]:
    """Scale (and bias) of a norm `name`."""
    found = {"scale": Weight(f"{name}.weight", (axis,))}
    return found | ({"bias": Weight(f"{name}.bias", (axis,))} if bias else {})


def table(name: str, rows: Axis, columns: Axis) -> Weight:
    """A matrix that is the same here and on disk: an embedding or an unembedding, `[rows, columns]`."""
    return Weight(name, (rows, columns), 1)


def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Weight]]:
    """(path, Weight) of a nested dict of weights."""
    for key, value in tree.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
