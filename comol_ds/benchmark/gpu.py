"""What one GPU reaches: kernels beside its bandwidth and cuBLAS, steps beside LoRA's, and as much of a 70B as fits.

    rates   `gpu_rates`: memory bandwidth, bf16 products, and what the mixture and whole layers reach of them
    ratio   the step suite's CoMoL, LoRA and frozen base side by side, few layers of 70B's geometry, nothing recomputed
    size    `gpu_size`: Llama-3.1-70B with as many layers as fit, activations checkpointed, beside the planner's memory

tokens/s, and MFU as `mfu` counts it, of the last two. A device whose data sheet is not known has no MFU; its rate as a
fraction of the measured one of products is given in any case.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from comol_ds.benchmark import gpu_size, step
from comol_ds.benchmark.gpu_rates import RatesCase, measure_rates, say
from comol_ds.benchmark.mfu import flops_per_token, peak_flops
from comol_ds.benchmark.whole_models import ROWS, ModelCase, model_config
from comol_ds.errors import UserError

T = TypeVar("T")
RATIO_CONTENDERS = ("comol", "lora", "frozen")


@dataclass(frozen=True)
class GpuCase:
    """What the suite measures, apart from the rates' sizes.

    Attributes:
        folder: an empty one.
        layers: of the size part; None for the most that the planner says fit.
        tokens: of a row; a step of the ratio part has 4 rows, one of the size part 1.
        ratio_layers: of each of the ratio part's three models.
        rounds: timed turns of every contender.
        peak_tflops: the device's, dense bf16; None for its data sheet's.
    """

    folder: Path
    layers: int | None = None
    tokens: int = 2048
    ratio_layers: int = 4
    rounds: int = 10
    peak_tflops: float | None = None


def measure_gpu(case: GpuCase) -> dict[str, Any]:
    """All three parts, told as they come, each in processes of its own, so that none takes memory from the next.

    Returns:
        A dictionary that can be written as JSON: rates, ratio and size; peak_flops, FLOP/s, or None.

    Raises:
        UserError: a peak that is not positive; a device too small for one layer.
        RuntimeError, subprocess.TimeoutExpired: as `run_ranks` does.
    """
    if case.peak_tflops is not None and not case.peak_tflops > 0:
        raise UserError(f"--peak_tflops {case.peak_tflops}: must be positive")
    rates = in_fresh_process(measure_rates, RatesCase(rounds=case.rounds))
    peak = peak_flops(rates["device"], case.peak_tflops)
    if peak is None:
        say(f"\nno MFU: {rates['device']} is not in the table of data sheets; give its rate by --peak_tflops")
    say(f"\nsteps of {', '.join(RATIO_CONTENDERS)}, {case.ratio_layers} layers of 70B's geometry each")
    ratio_case = replace(step.GEOMETRIES["70b"], layers=case.ratio_layers, tokens=ROWS * case.tokens)
    ratio = measure_ratio(ratio_case, case.folder / "ratio", case.rounds, peak, rates["flops_per_second"])
    say(f"{ratio_table(ratio)}\n")
    size_folder = case.folder / "size"
    size_folder.mkdir()
    free = in_fresh_process(free_memory)
    layers = case.layers or gpu_size.most_layers(size_folder, case.tokens, free)
    size = gpu_size.measure_size(size_folder, layers, case.tokens) | {"free_bytes": free}
    size |= utilization(size["flops_per_second"], peak, rates["flops_per_second"])
    say(size_table(size))
    return {"peak_flops": peak, "rates": rates, "ratio": ratio, "size": size}


def measure_ratio(
    case: ModelCase, folder: Path, rounds: int, peak: float | None, product_rate: float
) -> dict[str, Any]:
    """`measure_step` on one rank, and of every contender tokens_per_second, mfu and of_products.

    Args:
        case: the model.
        folder: is made.
        peak: FLOP/s of the device, or None.
        product_rate: FLOP/s, measured.
    """
    folder.mkdir()
    result = step.measure_step(case, "zero3-1", folder, RATIO_CONTENDERS, rounds, warmup=2)
    per_second = {name: case.tokens / taken["median"] for name, taken in result["seconds"].items()}
    flops = flops_per_token(model_config(case), case.tokens // ROWS)
    reached = {name: utilization(tokens * flops, peak, product_rate) for name, tokens in per_second.items()}
    return result | {
        "tokens_per_second": per_second,
        "mfu": {name: fractions["mfu"] for name, fractions in reached.items()},
        "of_products": {name: fractions["of_products"] for name, fractions in reached.items()},
    }


def utilization(flops_per_second: float, peak: float | None, product_rate: float) -> dict[str, float | None]:
    """mfu, of the peak where it is known, and of_products, of the measured rate; nobody's guess takes their place."""
    return {
        "mfu": None if peak is None else flops_per_second / peak,
        "of_products": flops_per_second / product_rate,
    }


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """The function's result; the process ends, and with it what it holds of the GPU."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def free_memory() -> int:
    """Bytes of the GPU that tensors of this process could have, its CUDA context taken off."""
    torch.empty(1, device="cuda")
    return torch.cuda.mem_get_info()[0]


def ratio_table(ratio: dict[str, Any]) -> str:
    """The step suite's table, and what the contenders reach."""
    lines = [step.table(ratio), f"{'':10}{'tokens/s':>10}{'MFU':>8}{'of products':>13}"]
    lines += [
        f"{name:10}{tokens:10,.0f}{_percent(ratio['mfu'][name]):>8}{_percent(ratio['of_products'][name]):>13}"
        for name, tokens in ratio["tokens_per_second"].items()
    ]
    return "\n".join(lines)


def size_table(size: dict[str, Any]) -> str:
    """The size part in three lines."""
    failed = "".join(f"; {layers} layers: out of memory" for layers in size["out_of_memory"])
    gib = {name: f"{size[name] / 2**30:.2f}" for name in ("peak_bytes", "planned_peak_bytes", "free_bytes")}
    return (
        f"Llama-3.1-70B's geometry, {size['layers']} of {gpu_size.MOST_LAYERS} layers{failed}:"
        f" {size['parameters'] / 1e9:.2f} B bf16 parameters, rows of {size['tokens']} tokens, checkpointed\n"
        f"{size['median_seconds']:.2f} s per step, {size['tokens_per_second']:,.0f} tokens/s,"
        f" MFU {_percent(size['mfu'])}, {_percent(size['of_products'])} of the measured rate of products\n"
        f"peak {gib['peak_bytes']} GiB, planned {gib['planned_peak_bytes']}, free before {gib['free_bytes']}"
    )


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"
