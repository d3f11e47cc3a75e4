"""Llama-3.1-70B on one GPU, as many of its layers as fit: CoMoL trained by launch/train.py, beside the planner's word.

Activation checkpointing is on, and a step is one row. The whole model in bf16 is 131 GiB.
"""

import bisect
import os
import statistics
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from comol_ds.benchmark import geometry
from comol_ds.benchmark.gpu_rates import say
from comol_ds.benchmark.mfu import flops_per_token
from comol_ds.errors import UserError

MOST_LAYERS = 80
# After a run out of memory: 6.4 GiB in bf16, more than what the planner leaves out.
_FEWER_LAYERS = 4
_STEPS = 5
_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# Remainders in fixed segments can come to what 80 layers leave free:
# https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
_GROWING_SEGMENTS = "expandable_segments:True"


def most_layers(folder: Path, tokens: int, free_bytes: int) -> int:
    """The most layers, up to all, whose planned peak a device with ``free_bytes`` has room for.

    Args:
        folder: takes configurations.
        tokens: of the row that is a step.

    Raises:
        UserError: not even one layer fits.
    """

    def peak(layers: int) -> int:
        return geometry.plan_layout(_case(folder, layers, tokens)).peak

    fitting = bisect.bisect_right(range(1, MOST_LAYERS + 1), free_bytes, key=peak)
    if not fitting:
        raise UserError(
            f"one layer of Llama-3.1-70B needs {peak(1) / 2**30:.1f} GiB and the device has"
            f" {free_bytes / 2**30:.1f} GiB free: end what else runs on it, or take fewer --tokens than {tokens}"
        )
    return fitting


def measure_size(folder: Path, layers: int, tokens: int) -> dict[str, Any]:
    """Train ``layers`` layers on the GPU, or, each time that its memory does not suffice, four fewer.

    Args:
        folder: an empty one, for configurations, data and run folders.
        layers: decoder layers.
        tokens: of the row that is a step.

    Returns:
        A dictionary that can be written as JSON: layers; parameters, without the adapter; tokens; seconds of every step
        and median_seconds, of those after the first, which warms up; tokens_per_second; flops_per_second by
        `flops_per_token`; peak_bytes, allocated; planned_peak_bytes; out_of_memory, the numbers of layers with which a
        run failed so.

    Raises:
        RuntimeError, subprocess.TimeoutExpired: as `run_ranks` does; out of memory only if no layers are left to drop.
    """
    out_of_memory: list[int] = []
    while True:
        case = _case(folder / f"{layers}_layers", layers, tokens)
        case.folder.mkdir()
        plan = geometry.plan_layout(case)
        say(f"training {layers} layers, planned peak {plan.peak / 2**30:.1f} GiB")
        try:
            run = geometry.train_layout(case, environment={_ALLOCATOR: os.environ.get(_ALLOCATOR, _GROWING_SEGMENTS)})
            break
        except RuntimeError as error:
            if not is_out_of_memory(error) or layers <= _FEWER_LAYERS:
                raise
        say(f"{layers} layers: out of memory")
        out_of_memory.append(layers)
        layers -= _FEWER_LAYERS
    seconds = statistics.median(run["seconds"][1:])
    return {
        "layers": layers,
        "parameters": plan.everything - plan.trainable,
        "tokens": tokens,
        "seconds": run["seconds"],
        "median_seconds": seconds,
        "tokens_per_second": run["tokens_per_step"] / seconds,
        "flops_per_second": run["tokens_per_step"] / seconds * flops_per_token(model_config(layers), tokens),
        "peak_bytes": run["peak_bytes"][0],
        "planned_peak_bytes": plan.peak,
        "out_of_memory": out_of_memory,
    }


def model_config(layers: int) -> LlamaConfig:
    """The geometry with this many layers."""
    return LlamaConfig(**geometry.LLAMA_3_1_70B | {"num_hidden_layers": layers})


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether ranks failed because the device had no memory left: what torch, CUDA and cuBLAS say then."""
    said = str(error)
    return any(words in said for words in ("OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def _case(folder: Path, layers: int, tokens: int) -> geometry.GeometryCase:
    return geometry.GeometryCase(folder, layers, ranks=1, steps=_STEPS, tokens=tokens, checkpointing="full")
