"""Cross-entropy of every token, in fp32 without an fp32 copy of the logits, whole or split over the vocabulary.

Both passes go over chunks of rows, and only a chunk of the logits ever stands in fp32. Between the passes the logits
stay as the head returned them, beside two numbers per row; backward writes the gradient over them.

Glossary: N rows (tokens), V vocabulary, K tensor-parallel ranks, each with V/K columns (one more or less at the ends).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# Elements of a chunk: 128 MiB in fp32, two of which exist at a time. At V = 128,256 that is 261 rows.
CHUNK_ELEMENTS = 1 << 25


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignored: int,
    first: int = 0,
    size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Cross-entropy per row in fp32 (float64 for float64 logits), 0 where the target is ``ignored``.

    NaN where the target is no id of the vocabulary; looking at the ids to raise instead would wait for the device.
    If autograd computed the logits and they are contiguous, backward overwrites them with their gradient: who reads
    them later, reads that.

    Args:
        logits: [N, V], or this rank's [N, V/K], any float type.
        targets: [N], ids in the whole vocabulary or ``ignored``; alike on all ranks of the group.
        ignored: the target without a loss.
        first: id of the first column.
        size: V; None: the number of columns.
        group: the ranks that hold the other columns; None: there are none.

    Returns:
        [N], alike on all ranks of the group, which pass 3 N numbers to each other in two collectives.
    """
    columns = targets - first
    owned = (columns >= 0) & (columns < logits.shape[1])
    losses = _CrossEntropy.apply(logits, columns.masked_fill(~owned, 0), owned, group, _is_ours(logits))
    beyond = (targets < 0) | (targets >= (size or logits.shape[1]))
    return losses.masked_fill(beyond, float("nan")).masked_fill(targets == ignored, 0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,  # [N, V/K]
        columns: torch.Tensor,  # [N], the target's own column, 0 where another rank has it
        owned: torch.Tensor,  # [N]
        group: dist.ProcessGroup | None,
        overwrite: bool,
    ) -> torch.Tensor:
        highest = logits.new_empty(len(logits), dtype=_wide(logits))
        sums, picked = torch.empty_like(highest), torch.empty_like(highest)
        for rows in _chunks(logits):
            chunk = logits[rows].to(highest.dtype)
            highest[rows] = chunk.amax(1)
            picked[rows] = chunk.gather(1, columns[rows, None]).squeeze(1)
            sums[rows] = (chunk - highest[rows, None]).exp_().sum(1)
        if group is not None and len(logits):
            highest, sums, picked = _over_ranks(highest, sums, picked, owned, group)
        ctx.save_for_backward(logits, columns, owned, highest, sums)
        ctx.overwrite = overwrite
        # not (highest + log sums) - picked: a small loss would drown in the rounding of large logits
        return sums.log() - (picked - highest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # [N]
        logits, columns, owned, highest, sums = ctx.saved_tensors
        result = logits if ctx.overwrite else torch.empty_like(logits)
        scale, at_target = gradient / sums, -gradient * owned
        for rows in _chunks(logits):
            chunk = logits[rows].to(highest.dtype, copy=True).sub_(highest[rows, None]).exp_().mul_(scale[rows, None])
            result[rows] = chunk.scatter_add_(1, columns[rows, None], at_target[rows, None])
        return result, None, None, None, None


def _over_ranks(
    highest: torch.Tensor,
    sums: torch.Tensor,
    picked: torch.Tensor,
    owned: torch.Tensor,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each rank's maximum, sum of exponentials below it, and target's logit -> those of the whole vocabulary."""
    everywhere = highest.clone()
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=group)
    both = torch.stack([sums * (highest - everywhere).exp_(), picked.masked_fill(~owned, 0)])  # [2, N]
    dist.all_reduce(both, group=group)
    return everywhere, both[0], both[1]


def _is_ours(logits: torch.Tensor) -> bool:
    """Whether the memory may be written over: dense, and computed under autograd, not a leaf or a view of one."""
    base = logits if logits._base is None else logits._base
    return logits.requires_grad and not base.is_leaf and logits.is_contiguous()


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Row ranges of at most CHUNK_ELEMENTS logits, but one row at least."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
