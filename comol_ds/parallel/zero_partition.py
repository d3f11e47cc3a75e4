"""Whole tensors out of ZeRO's partitions and tensor-parallel slices: counts, master copies, the adapter's state."""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from peft import PeftModel, get_peft_model_state_dict

from comol_ds.parallel.collectives import join_slices
from comol_ds.parallel.groups import mesh


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of the model; partitioned parameters count whole."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def gather_adapter(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The adapter's state dict in PEFT's naming: fp32 master weights, whole, on CPU; empty on ranks other than 0.

    A collective call. Gathers one parameter at a time, over ZeRO's partitions and tensor-parallel slices, and nothing
    of the frozen base. The tensors are the same whatever the layout that trained them.
    """
    whole = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = over_tensor_parallel(parameter, full_fp32(parameter, engine.zero_optimization_stage()))
        if dist.get_rank() == 0:
            whole[name] = value.to("cpu", copy=True)
    if dist.get_rank() != 0:
        return {}
    return adapter_state_dict(engine.module, whole)


def adapter_state_dict(model: PeftModel, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT's names (no adapter name in the key) for tensors named as in ``model.named_parameters()``."""
    state = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def full_fp32(parameter: torch.nn.Parameter, stage: int) -> torch.Tensor:
    """The fp32 value of one trainable parameter, over all data-parallel ranks."""
    if stage == 0:
        return parameter.detach().float()
    return safe_get_full_fp32_param(parameter).reshape(getattr(parameter, "ds_shape", parameter.shape))


def over_tensor_parallel(parameter: torch.nn.Parameter, local: torch.Tensor) -> torch.Tensor:
    """The whole tensor from the ranks' slices; a replicated tensor is whole already."""
    shard = getattr(parameter, "shard", None)
    return local if shard is None else join_slices(local, shard, parameter.whole_shape, mesh().tensor_group)
