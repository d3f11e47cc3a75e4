"""How a run lies on its world: the settings, the ranks, the batches and the DeepSpeed dictionary, made to agree."""

from dataclasses import dataclass, replace
from typing import Any

from comol_ds.config import RunConfig
from comol_ds.ds_config import resolve_ds_config, tensor_parallel_size
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout, RankGrid, plan_batches, plan_grid
from comol_ds.parallel.groups import World
from comol_ds.parallel.zero_config import check_hpz, check_weight_storage, check_zero_block


@dataclass(frozen=True)
class RunLayout:
    """A resolved run of one rank; batch sizes and tensor-parallel size are decided in ``config``."""

    config: RunConfig
    grid: RankGrid
    batches: BatchLayout
    ds_config: dict[str, Any]


def resolve_layout(config: RunConfig, template: dict[str, Any], world: World) -> RunLayout:
    """Resolve a run for a world, which need not exist.

    Args:
        config: settings in which the precision is decided.
        template: the DeepSpeed JSON as the user wrote it.
        world: one rank's place.

    Raises:
        UserError: sizes that do not divide, or a JSON that contradicts the run or that DeepSpeed would refuse.
    """
    tensor_parallel = tensor_parallel_size(template, config.parallel.tensor_parallel_size)
    across = config.parallel.allow_cross_node_tp
    grid = plan_grid(world.rank, world.size, tensor_parallel, world.local_size, across)
    if grid.tp_rank != world.local_rank % tensor_parallel and not across:
        raise UserError(
            f"rank {world.rank} is number {world.local_rank} of its node: consecutive ranks lie on different nodes;"
            " start srun with --distribution=block, or accept the slower links with --allow_cross_node_tp"
        )
    optimizer = config.optimizer
    batches = plan_batches(grid.data_parallel, optimizer.per_device_train_batch_size, optimizer.global_batch_size)
    config = replace(
        config,
        optimizer=replace(optimizer, global_batch_size=batches.global_batch),
        parallel=replace(config.parallel, tensor_parallel_size=tensor_parallel),
    )
    ds_config = resolve_ds_config(template, config, batches, bool(config.model.bf16))
    check_zero_block(ds_config)
    check_weight_storage(ds_config)
    check_hpz(ds_config, world)
    return RunLayout(config, grid, batches, ds_config)
