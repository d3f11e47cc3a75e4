"""World size to batch arithmetic: micro x accumulation x data-parallel = global."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

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
