"""What is planned: a run's settings, resolved for a world that need not exist here."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from comol_ds.config import RunConfig
from comol_ds.ds_config import zero_stage
from comol_ds.errors import UserError
from comol_ds.layout import BatchLayout, RankGrid, divisors, either
from comol_ds.parallel.groups import World
from comol_ds.parallel.run_layout import resolve_layout


@dataclass(frozen=True)
class Request:
    """A resolved run.

    Attributes:
        config: precision, tensor-parallel size and batch sizes are decided in it.
        ds_config: the resolved DeepSpeed dictionary.
        grid: rank 0 of the world: of tensor-parallel slices of unequal size it holds the largest.
        batches: the batch arithmetic.
        ranks_per_node: processes that share a host's memory.
    """

    config: RunConfig
    ds_config: dict[str, Any]
    grid: RankGrid
    batches: BatchLayout
    ranks_per_node: int

    @cached_property
    def stage(self) -> int:
        return zero_stage(self.ds_config)

    @cached_property
    def zero(self) -> DeepSpeedZeroConfig:
        """The ZeRO block with DeepSpeed's defaults filled in."""
        return DeepSpeedZeroConfig(**self.ds_config["zero_optimization"])

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights, the adapter's working copy, activations and, unless the JSON says else, gradients."""
        return torch.bfloat16 if self.config.model.bf16 else torch.float32

    @property
    def gradient_dtype(self) -> torch.dtype:
        """In which gradients accumulate over micro-batches."""
        return _DTYPES.get((self.ds_config.get("data_types") or {}).get("grad_accum_dtype"), self.dtype)

    @property
    def reduced_dtype(self) -> torch.dtype:
        """In which gradients travel."""
        return _DTYPES.get(self.ds_config.get("communication_data_type"), self.dtype)

    def offload_device(self, what: str) -> str:
        """Where the JSON puts "param" or "optimizer": "none" (the accelerator), "cpu" or "nvme"."""
        block = getattr(self.zero, f"offload_{what}")
        return "none" if block is None else str(getattr(block.device, "value", block.device))


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(config: RunConfig, template: dict[str, Any], world_size: int, nodes: int) -> Request:
    """Resolve a run for a world of ``world_size`` ranks on ``nodes`` nodes.

    Args:
        config: settings with model_name_or_path filled in; bf16 is what the accelerators will compute in.
        template: the DeepSpeed JSON as the user wrote it.

    Raises:
        UserError: what the run itself would refuse of sizes and of the JSON; nodes that do not divide the world.
    """
    if world_size % nodes:
        raise UserError(
            f"--nodes {nodes} does not divide --world_size {world_size}; use {either(divisors(world_size))}"
        )
    ranks_per_node = world_size // nodes
    layout = resolve_layout(config, template, World(0, world_size, 0, ranks_per_node))
    return Request(layout.config, layout.ds_config, layout.grid, layout.batches, ranks_per_node)
