"""Random weights in the place of a checkpoint's: any geometry, for benchmarks, from a configuration alone."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from comol_ds.errors import UserError
from comol_ds.parallel.loading import Allocated, allocate_weights
from comol_ds.parallel.mesh import Mesh


def draw_weights(model: nn.Module, base: PreTrainedModel, ds_config: dict[str, Any], mesh: Mesh, seed: int) -> None:
    """Give every parameter on meta memory and random values; no rank ever holds more than its part.

    Matrices are drawn from N(0, initializer_range), each rank its own part, so the values depend on the layout; biases
    are 0, and other vectors what the model family starts them with.

    Args:
        model: parameters on meta with this rank's shapes; others have memory.
        base: the same model without the adapter's wrapping.
        ds_config: the resolved DeepSpeed dictionary.
        mesh: the ranks.
        seed: of the run.

    Raises:
        UserError: with ZeRO++'s second copy within a node, which would have to hold the same values.
    """
    if ds_config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
        raise UserError(
            "--init_random: each rank draws its own part, which zero_hpz_partition_size would need twice; remove it"
        )
    std = base.config.get_text_config().initializer_range
    for index, allocated in enumerate(allocate_weights(model, ds_config, mesh)):
        vector = _vector(base, allocated)
        for start, memory in allocated.held:
            if vector is not None:
                memory.copy_(vector[start : start + memory.numel()])
            elif allocated.attribute == "bias":
                memory.zero_()
            else:
                first_row = allocated.shard.start if allocated.shard else 0
                generator = torch.Generator(memory.device)
                generator.manual_seed(hash((seed, index, first_row, start)) % 2**63)
                memory.normal_(0, std, generator=generator)


def _vector(base: PreTrainedModel, allocated: Allocated) -> torch.Tensor | None:
    """The whole initial value of a norm's weight, by the rule of its family; None for anything else."""
    owner = allocated.owner
    if isinstance(owner, nn.Linear | nn.Embedding):
        return None
    # the module as it was declared: on this rank its parameter may be a partition of no shape by now
    fresh = copy.copy(owner)
    size = getattr(owner, allocated.attribute)
    size = getattr(size, "ds_shape", size.shape)
    fresh._parameters = {allocated.attribute: nn.Parameter(torch.empty(size))}
    base._init_weights(fresh)
    return fresh._parameters[allocated.attribute].detach().flatten()
