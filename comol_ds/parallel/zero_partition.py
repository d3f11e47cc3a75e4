"""Whole tensors out of ZeRO's partitions: counts, fp32 master copies, the adapter's state dict."""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from peft import PeftModel, get_peft_model_state_dict


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of the model; partitioned parameters count whole."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def gather_adapter(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The adapter's state dict in PEFT's naming: fp32 master weights, whole, on CPU; empty on ranks other than 0.

    A collective call. Gathers one parameter at a time and nothing of the frozen base.
    """
    whole = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = _full_fp32(parameter)
        if dist.get_rank() == 0:
            whole[name] = value.to("cpu", copy=True)
    if dist.get_rank() != 0:
        return {}
    return adapter_state_dict(engine.module, whole)


def adapter_state_dict(model: PeftModel, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT's names (no adapter name in the key) for tensors named as in ``model.named_parameters()``."""
    state = get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _full_fp32(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole fp32 value of one trainable parameter at ZeRO stage 1, 2 or 3."""
    return safe_get_full_fp32_param(parameter).reshape(getattr(parameter, "ds_shape", parameter.shape))
