"""What an adapter method declares about its parameters, in one table, and what follows from it.

An adapter wraps a base Linear and owns a few parameters per Linear. A method declares each as an `AdapterParameter`:
its name, its axes as letters, its initializer. Shapes, counts, the folder's checks and the placement under tensor
parallelism are all derived from the letters, so a new method is one file with its own table.

Axis letters: I in_features and O out_features of the base Linear, R rank, E experts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from comol_ds.errors import UserError

BaseKind = Literal["column", "row"]

# A column-parallel base (q, k, v, gate, up) splits its outputs over the ranks, a row-parallel one (o, down) its inputs.
SHARDED_AXIS: dict[str, str] = {"column": "O", "row": "I"}


@dataclass(frozen=True)
class AdapterParameter:
    """One trainable tensor beside every adapted Linear.

    Attributes:
        name: attribute and state-dict name, e.g. "comol_A".
        axes: one letter per dimension, e.g. ("R", "I").
        initialize: fills a whole (unsharded) tensor in place, drawing from the global torch generator of its device.
    """

    name: str
    axes: tuple[str, ...]
    initialize: Callable[[torch.Tensor], object]

    def shape(self, sizes: "AxisSizes") -> tuple[int, ...]:
        """Shape of the whole tensor beside a Linear of these sizes."""
        return tuple(getattr(sizes, axis) for axis in self.axes)

    def sharded_dim(self, base: BaseKind) -> int | None:
        """Dimension that is split over tensor-parallel ranks beside a base of this kind; None where replicated."""
        axis = SHARDED_AXIS[base]
        return self.axes.index(axis) if axis in self.axes else None


@dataclass(frozen=True)
class AxisSizes:
    """Sizes behind the axis letters for one adapted Linear."""

    I: int  # noqa: E741 - the axis letter
    O: int  # noqa: E741 - the axis letter
    R: int
    E: int


Table = Sequence[AdapterParameter]


def parameter_names(table: Table) -> tuple[str, ...]:
    """Names in declaration order, which is also the order of initialization."""
    return tuple(parameter.name for parameter in table)


def parameter_shapes(table: Table, sizes: AxisSizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape beside one Linear."""
    return {parameter.name: parameter.shape(sizes) for parameter in table}


def count_adapter_parameters(table: Table, sizes: AxisSizes) -> int:
    """Trainable numbers beside one Linear. For CoMoL with the core router: R (I + O) + E (R^2 + R)."""
    total = 0
    for parameter in table:
        numel = 1
        for size in parameter.shape(sizes):
            numel *= size
        total += numel
    return total


def count_over_linears(table: Table, linears: Iterable[tuple[int, int]], r: int, num_experts: int) -> int:
    """Trainable numbers beside all adapted Linears, given as (in_features, out_features) pairs."""
    return sum(count_adapter_parameters(table, AxisSizes(i, o, r, num_experts)) for i, o in linears)


def infer_sizes(table: Table, shapes: dict[str, tuple[int, ...]]) -> AxisSizes:
    """Axis sizes of one Linear from its adapter's shapes.

    Raises:
        UserError: a name is missing, a tensor has another number of dimensions, or one letter has two sizes.
    """
    sizes: dict[str, int] = {}
    for parameter in table:
        if parameter.name not in shapes:
            raise UserError(f"tensor {parameter.name} is missing (a module needs {', '.join(parameter_names(table))})")
        shape = shapes[parameter.name]
        if len(shape) != len(parameter.axes):
            raise UserError(f"{parameter.name} has shape {list(shape)}, expected axes [{', '.join(parameter.axes)}]")
        for axis, size in zip(parameter.axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise UserError(f"{parameter.name} has {axis}={size}, but an earlier tensor of it has {sizes[axis]}")
    return AxisSizes(**sizes)
