"""The accelerator of this rank: name, precision, memory."""

import resource

import torch
from deepspeed.accelerator import get_accelerator


def device() -> torch.device:
    """The device that this rank computes on."""
    return torch.device(get_accelerator().current_device_name())


def supports_bf16() -> bool:
    """Whether the accelerator computes in bfloat16."""
    return bool(get_accelerator().is_bf16_supported())


def prefers_bf16() -> bool:
    """Whether bfloat16 is the better default: on accelerators that have it, not on CPUs, which often emulate it."""
    return supports_bf16() and get_accelerator().device_name() != "cpu"


def peak_memory_bytes() -> int:
    """Peak allocated device memory of this process; on a CPU, its peak resident size."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return int(get_accelerator().max_memory_allocated())
