"""The two collectives of tensor parallelism as differentiable operations (f and g of Megatron-LM, arXiv 1909.08053),
and one that puts slices together.

All take the tensor-parallel group; tensors are whole on every rank of it, or hold one partial sum per rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from comol_ds.layout import Shard


def copy_to_tensor_parallel(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Identity forward; backward sums the ranks' partial gradients. For an input that column-parallel layers read."""
    return _CopyToTensorParallel.apply(x, group) if x.requires_grad and torch.is_grad_enabled() else x


def sum_over_tensor_parallel(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum of the ranks' partial tensors; backward hands the whole gradient to each. For a row-parallel layer's output.

    Works in place on ``x``, which must be a fresh tensor that nothing else reads.
    """
    return _SumOverTensorParallel.apply(x, group)


def join_slices(
    local: torch.Tensor, shard: Shard, whole_shape: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """The whole tensor from the ranks' slices, which may differ by one row; on every rank, without a gradient."""
    whole = local.new_zeros(whole_shape)
    shard.part_of(whole).copy_(local)
    dist.all_reduce(whole, group=group)
    return whole


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # not in place: autograd may hand the same tensor to another branch
        whole = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.group)
        return whole, None


class _SumOverTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        assert x.is_contiguous()
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
