"""World size to ranks and batches.

Ranks: data-parallel x tensor-parallel = world. Records: micro x accumulation x data-parallel = global.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from comol_ds.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class BatchLayout:
    """How one optimizer step's records are spread over ranks and micro-batches.

    All sizes are in records (rows of the micro-batch when packing).
    """

    data_parallel: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.data_parallel

    def part(self, units: Sequence[T], number: int, rank: int) -> Sequence[T]:
        """What one rank works on in micro-batch ``number`` (from 0) of a step, out of the step's global batch.

        Neighbours go to the ranks of one micro-batch: of units sorted by length, the ranks then get equally long ones.
        """
        start = (number * self.data_parallel + rank) * self.micro_batch
        return units[start : start + self.micro_batch]

    def __str__(self) -> str:
        return (
            f"{self.micro_batch} micro x {self.accumulation} accumulation x {self.data_parallel} data-parallel"
            f" = {self.global_batch} global"
        )


def plan_batches(data_parallel: int, micro_batch: int, global_batch: int | None) -> BatchLayout:
    """Derive the accumulation from the global batch size.

    Args:
        data_parallel: number of data-parallel ranks.
        micro_batch: records per rank and forward pass.
        global_batch: records per optimizer step over all ranks; None means one micro-batch per rank.

    Raises:
        UserError: the global batch is no multiple of micro_batch x data_parallel.
    """
    per_pass = micro_batch * data_parallel
    if global_batch is None:
        global_batch = per_pass
    if global_batch < per_pass or global_batch % per_pass:
        lower = max(per_pass, global_batch // per_pass * per_pass)
        raise UserError(
            f"--global_batch_size {global_batch} is not a multiple of --per_device_train_batch_size {micro_batch}"
            f" x {data_parallel} data-parallel ranks = {per_pass}; use {lower} or {lower + per_pass}"
        )
    return BatchLayout(data_parallel, micro_batch, global_batch // per_pass)


@dataclass(frozen=True)
class RankGrid:
    """One rank's place in a world of data_parallel x tensor_parallel ranks.

    Tensor-parallel peers stand on consecutive ranks, the fast links of one node; data-parallel peers a stride apart.
    """

    rank: int
    size: int
    tensor_parallel: int = 1

    @property
    def data_parallel(self) -> int:
        return self.size // self.tensor_parallel

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tensor_parallel

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tensor_parallel

    def tensor_groups(self) -> list[list[int]]:
        """The ranks of every tensor-parallel group: [0, 1], [2, 3] for 4 ranks and 2 tensor-parallel."""
        starts = range(0, self.size, self.tensor_parallel)
        return [list(range(start, start + self.tensor_parallel)) for start in starts]

    def data_groups(self) -> list[list[int]]:
        """The ranks of every data-parallel group: [0, 2], [1, 3] for 4 ranks and 2 tensor-parallel."""
        return [list(range(first, self.size, self.tensor_parallel)) for first in range(self.tensor_parallel)]


def plan_grid(rank: int, size: int, tensor_parallel: int, local_size: int, allow_cross_node: bool) -> RankGrid:
    """Divide the world into tensor-parallel groups, each within one node.

    Args:
        rank: this process among all.
        size: number of processes.
        tensor_parallel: ranks that share one copy of the model.
        local_size: ranks on this node; nodes hold consecutive ranks.
        allow_cross_node: let a group lie on several nodes.

    Raises:
        UserError: the size is no multiple of tensor_parallel, or a group would lie on several nodes.
    """
    within_node = [k for k in divisors(size) if allow_cross_node or local_size % k == 0]
    if size % tensor_parallel:
        raise UserError(
            f"--tensor_parallel_size {tensor_parallel} does not divide the world of {size} ranks;"
            f" use {either(within_node)}, or start a multiple of {tensor_parallel} ranks"
        )
    if tensor_parallel not in within_node:
        reason = (
            f"is more than the {local_size} ranks of a node"
            if tensor_parallel > local_size
            else f"does not divide the {local_size} ranks of a node, so a group would lie on two"
        )
        raise UserError(
            f"--tensor_parallel_size {tensor_parallel} {reason}; use {either(within_node)}, or accept the slower links"
            " between nodes with --allow_cross_node_tp"
        )
    return RankGrid(rank, size, tensor_parallel)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, 1 and itself included, in rising order."""
    return [k for k in range(1, number + 1) if number % k == 0]


def either(values: Sequence[int]) -> str:
    """A choice in words: [1, 2, 4] -> "1, 2 or 4"."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True)
class Shard:
    """The part [start, stop) of dimension ``dim`` that one tensor-parallel rank holds of a whole tensor."""

    dim: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def part_of(self, whole: Any) -> Any:
        """The view of a whole tensor that is this part."""
        return whole.narrow(self.dim, self.start, self.size)


def shard_of(total: int, dim: int, parts: int, index: int) -> Shard:
    """Part ``index`` of ``parts`` contiguous, near-equal parts: the first ``total % parts`` are longer by one."""
    size, longer = divmod(total, parts)
    start = index * size + min(index, longer)
    return Shard(dim, start, start + size + (index < longer))
