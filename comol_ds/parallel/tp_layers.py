"""Linear layers of which each tensor-parallel rank holds a slice, and what fills the adapter's seams beside them.

Glossary: K tensor-parallel ranks. A column-parallel weight is split on O, its input is whole and its output a slice; a
row-parallel weight is split on I, its input is a slice and its output a partial sum. Both multiply with F.linear: a
transposed view of the weight would be saved for backward and keep the weight that ZeRO-3 gathered alive.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from comol_ds.adapters.routing import InputDropout, PartialSums, Routed
from comol_ds.layout import RankGrid, Shard
from comol_ds.parallel.collectives import copy_to_tensor_parallel, sum_over_tensor_parallel
from comol_ds.parallel.mesh import Mesh


def shard_parameter(parameter: nn.Parameter, shard: Shard) -> nn.Parameter:
    """A frozen parameter on the same device, of the shard's shape. It remembers the shard; its values are not set."""
    shape = list(parameter.shape)
    shape[shard.dim] = shard.size
    local = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device), requires_grad=False)
    local.shard = shard
    return local


class ColumnParallelLinear(nn.Linear):
    """y [..., O/K] = x [..., I] W^T + b, W and b split on O."""

    def __init__(self, whole: nn.Linear, mesh: Mesh) -> None:
        shard = mesh.shard(whole.out_features, dim=0)
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, shard.size
        self.weight = shard_parameter(whole.weight, shard)
        self.bias = None if whole.bias is None else shard_parameter(whole.bias, shard)


class RowParallelLinear(nn.Linear):
    """y [..., O] = sum over ranks of x [..., I/K] W^T, + b; W split on I, b whole.

    Attributes:
        summed_outside: whoever wraps this layer sums its partial output together with other partial sums.
    """

    def __init__(self, whole: nn.Linear, mesh: Mesh) -> None:
        shard = mesh.shard(whole.in_features, dim=1)
        nn.Module.__init__(self)
        self.in_features, self.out_features = shard.size, whole.out_features
        self.weight = shard_parameter(whole.weight, shard)
        self.bias = whole.bias
        self.group = mesh.tensor_group
        self.summed_outside = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        partial = F.linear(x, self.weight)
        return partial if self.summed_outside else self.add_bias(sum_over_tensor_parallel(partial, self.group))

    def add_bias(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + self.bias


class RowPartialSums(PartialSums):
    """One all-reduce for y of a row-parallel base and each adapter's h and logits side by side, O + R (+ E) wide."""

    def __init__(self, base: RowParallelLinear) -> None:
        super().__init__()
        base.summed_outside = True
        self.base = [base]  # in a list: the base is registered once, in the layer that owns it

    def forward(self, y: torch.Tensor, routed: list[Routed]) -> tuple[torch.Tensor, list[Routed]]:
        base = self.base[0]
        parts = [y, *(part for pair in routed for part in pair if part is not None)]
        assert all(part.dtype == y.dtype for part in parts), "base and adapter compute in one precision here"
        fused = torch.cat(parts, dim=-1) if len(parts) > 1 else y
        whole = sum_over_tensor_parallel(fused, base.group).split([part.shape[-1] for part in parts], dim=-1)
        rest = iter(whole[1:])
        summed = [(next(rest), None if logits is None else next(rest)) for _, logits in routed]
        return base.add_bias(whole[0]), summed


class ShardedInputDropout(InputDropout):
    """Dropout on an input of which every rank holds other columns: other masks, from one common random state.

    The seed of each mask is drawn from torch's default generator of the host, which runs alike on all tensor-parallel
    ranks, and the rank's number is added. So the ranks stay in step with each other, activation checkpointing, which
    restores the default generators, draws the same mask again, and a resumed run continues with the same masks.
    """

    def __init__(self, grid: RankGrid) -> None:
        super().__init__()
        self.ranks, self.rank = grid.tensor_parallel, grid.tp_rank

    def forward(self, x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
        if not (self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0):
            return x
        common = int(torch.randint(2**48, (), device="cpu"))
        generator = torch.Generator(x.device).manual_seed(common * self.ranks + self.rank)
        mask = torch.empty_like(x).bernoulli_(1 - dropout.p, generator=generator)
        return x * mask.div_(1 - dropout.p)


class SharedInput:
    """One `copy_to_tensor_parallel` for the column-parallel layers that read the same tensor: q, k, v; gate, up.

    A forward pre-hook of each of them. Backward then sums their gradients locally and over the ranks once, [N, I],
    instead of once per layer. What counts as the same is the tensor object, so a model that gives one of the layers
    another input gets another copy.
    """

    def __init__(self, readers: int, mesh: Mesh) -> None:
        self.readers = readers
        self.group = mesh.tensor_group
        self._source: torch.Tensor | None = None
        self._copy: torch.Tensor | None = None
        self._left = 0

    def __call__(self, module: nn.Module, args: Sequence[Any]) -> tuple[Any, ...]:
        x, *rest = args
        if self._source is not x:
            self._source, self._copy, self._left = x, copy_to_tensor_parallel(x, self.group), self.readers
        copy = self._copy
        self._left -= 1
        if self._left == 0:  # keep no activation alive beyond its last reader
            self._source = self._copy = None
        return (copy, *rest)
