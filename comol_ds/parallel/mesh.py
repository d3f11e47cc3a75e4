"""The process groups of a world of data_parallel x tensor_parallel ranks, and the ``mpu`` that DeepSpeed asks for them.

DeepSpeed reads model-parallel groups through an object in Megatron's style: methods get_{model,data}_parallel_{group,
rank,world_size} and the get_tensor_model_parallel_* variants. It must have no ``initialize_sequence_parallel``, which
DeepSpeed takes for a promise of sequence parallelism.
"""

from datetime import timedelta

import torch.distributed as dist

from comol_ds.layout import RankGrid, Shard, shard_of


class Mesh:
    """This rank's place and its two groups; a group of one rank is None and needs no communication.

    Attributes:
        grid: the arithmetic.
        tensor_group: ranks that share one copy of the model.
        data_group: ranks that hold the same shard and see different records.
    """

    def __init__(self, grid: RankGrid, timeout: timedelta | None = None) -> None:
        """A collective call: every rank creates every group, in one order."""
        self.grid = grid
        self.tensor_group: dist.ProcessGroup | None = None
        self.data_group: dist.ProcessGroup | None = None
        if grid.tensor_parallel > 1:
            self.tensor_group = _my_group(grid.tensor_groups(), timeout)
            self.data_group = _my_group(grid.data_groups(), timeout)

    def shard(self, total: int, dim: int) -> Shard:
        """This rank's part of a dimension of size ``total``."""
        return shard_of(total, dim, self.grid.tensor_parallel, self.grid.tp_rank)

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self.grid.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.grid.tensor_parallel

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.grid.rank - self.grid.tp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.grid.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.grid.data_parallel

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.grid.data_groups()[self.grid.tp_rank]


def _my_group(all_ranks: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(all_ranks, timeout=timeout)
    return group
